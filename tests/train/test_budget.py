"""The size that a budget allows: the largest that fits, for every method that has one."""

import pytest

from rankwise import methods, tasks
from rankwise.errors import InputError
from rankwise.methods import Method, build, registry
from rankwise.ranks import sites
from rankwise.settings import RunConfig, Schema, load
from rankwise.train.budget import fit
from rankwise.train.model import build as build_model
from rankwise.train.model import peak

SIZED = sorted(name for name, kind in registry().items() if kind.sizes)
TARGETS = {"targets": ["query", "value"]}
TASK = tasks.build("stdlib-kind")


def costs(method: Method) -> int:
    return peak("random-bert", TASK, method, max_length=128)


def fitted(name: str, budget: int, max_length: int = 128, **options: object) -> RunConfig:
    schema = Schema(methods.registry(), tasks.registry())
    method = {"name": name, **options}
    config = load(
        {"task": "stdlib-kind", "model": "random-bert", "method": method, "budget": budget, "max_length": max_length},
        [],
        schema,
    )
    assert isinstance(config, RunConfig)
    return fit(config)


def options_of(name: str) -> dict[str, object]:
    return {
        **(TARGETS if hasattr(registry()[name], "targets") else {}),
        **({"keep": 3} if "keep" in vars(registry()[name]()) else {}),
    }


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("budget", [20_001, pytest.param(33_333, marks=pytest.mark.large)])
def test_the_size_chosen_fits_and_one_more_would_not(name: str, budget: int) -> None:
    config = fitted(name, budget, **options_of(name))
    method = build(config.method)
    size = getattr(method, method.sizes[0])
    counted = size - (name == "adalora")  # whose smallest start is two units
    assert method == method.sized(counted)
    assert costs(method) <= budget < costs(method.sized(counted + 1))
    assert config.budget == budget and set(method.sizes) <= config.method.keys()
    assert fit(config) == config  # as a run reads it from its run.yaml


@pytest.mark.parametrize("name", SIZED)
def test_a_real_model_trains_what_was_counted(name: str) -> None:
    config = fitted(name, 20_001, **options_of(name))
    method = build(config.method)
    base, _, head = build_model("random-bert", TASK, 32)
    aside = sum(p.numel() for part in head for p in base.get_submodule(part).parameters())
    model = method.attach(base, head=head)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - aside
    if name == "random-lora":  # whose draw may be a cheaper one
        assert trained <= 20_001
    else:
        assert trained == costs(method)


def test_gates_and_weights_of_the_search_count() -> None:
    method = build({"name": "sora", "rank": 4, **TARGETS})
    plain = build({"name": "lora", "rank": 4, **TARGETS})
    base, _, head = build_model("random-bert", TASK, 32)
    count = len(sites(plain.attach(base, head=head)))
    counts = {name: costs(build({"name": name, "rank": 4, **TARGETS})) for name in ("lora", "simplex-lora")}
    assert costs(method) - counts["lora"] == 4 * count
    assert counts["simplex-lora"] - counts["lora"] == count


def test_random_sites_are_counted_at_their_most_expensive() -> None:
    options = {"name": "random-lora", "rank": 2, "keep": 1, "targets": ["query", "intermediate.dense"]}
    assert costs(build(options)) == 2 * (128 + 512)


@pytest.mark.parametrize("name", sorted(set(registry()) - set(SIZED)))
def test_a_method_without_a_size_is_outside_of_the_budget(name: str) -> None:
    assert fitted(name, 1).budget is None


def test_a_budget_that_nothing_fits_names_the_smallest_count() -> None:
    least = costs(build({"name": "lora", "rank": 1, **TARGETS}))
    with pytest.raises(InputError, match=f"budget = {least - 1}: lora trains at least {least:,} parameters"):
        fitted("lora", least - 1, **TARGETS)
    assert fitted("lora", least, **TARGETS).method["rank"] == 1


def test_a_budget_larger_than_all_that_a_site_holds_ends_at_that() -> None:
    assert fitted("lora", 10**8, **TARGETS).method["rank"] == 128


@pytest.mark.parametrize("name", ["pre-embed", "pre-layer"])
def test_a_prefix_leaves_room_for_the_longest_row(name: str) -> None:
    roomy, tight = (fitted(name, 10**8, max_length=length, infix=3) for length in (16, 100))
    assert (roomy.method["prefix"], tight.method["prefix"]) == (512 - 16 - 3, 512 - 100 - 3)
    with pytest.raises(InputError, match=r"max_length 510 \+ prefix 1 \+ infix 3 = 514: more than the 512 tokens"):
        fitted(name, 10**8, max_length=510, infix=3)


def test_a_size_that_is_given_stays_if_it_fits() -> None:
    assert fitted("lora", 20_001, rank=2, **TARGETS).method["rank"] == 2
    with pytest.raises(InputError, match="lora with rank 64 trains .* parameters; raise the budget, or leave rank out"):
        fitted("lora", 20_001, rank=64, **TARGETS)


def test_a_method_that_does_not_fit_the_model_is_named_as_ever() -> None:
    with pytest.raises(InputError, match="target 'no_such' matches no"):
        fitted("lora", 20_001, targets=["no_such"])
