import pytest

from rankwise.errors import InputError
from rankwise.settings import RunConfig, load
from small_schema import SCHEMA, one, sweep


def test_defaults_of_run_and_method_are_filled_in() -> None:
    config = one()
    assert (config.learning_rate, config.seed, config.schedule) == (1e-3, 0, "linear")
    assert config.method == {
        "name": "lora",
        "rank": 8,
        "alpha": 16.0,
        "targets": "all-linear",
        "rounding": "floor",
    }


def test_what_was_resolved_resolves_to_itself() -> None:
    config = one("method.targets=[query, key]", "scale=smoke")
    assert load(config.model_dump(mode="json"), [], SCHEMA) == config


def test_an_override_wins_and_may_be_all_there_is() -> None:
    assert one("seed=3", seed=1).seed == 3
    config = load(None, ["task=mrpc", "method.name=head"], SCHEMA)
    assert isinstance(config, RunConfig)
    assert (config.task, config.method) == ({"name": "mrpc", "protocol": "official"}, {"name": "head"})


def test_smoke_caps_rows_and_steps_and_leaves_less_alone() -> None:
    config = one(scale="smoke", train_rows=2000, max_steps=2)
    assert (config.train_rows, config.eval_rows, config.max_steps) == (64, 64, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", 'epoch: there is no such key (did you mean "epochs"?)'),
        ("epochs=three", "epochs = 'three': expected number"),
        ("epochs=0", "epochs = 0: expected greater than 0"),
        ("batch_size=1.5", "batch_size = 1.5: expected integer"),
        ("batch_size='32'", "batch_size = '32': expected integer"),
        ("seed=true", "seed = True: expected integer"),
        ("seed=-1", "seed = -1: expected greater than or equal to 0"),
        ("learning_rate=.inf", "learning_rate = inf: expected a finite number"),
        ("schedule=lin", "schedule = 'lin': expected 'linear', 'cosine' or 'constant'"),
        ("warmup=1.5", "warmup = 1.5: expected a share up to 1 or a whole number of steps"),
        ("task=colla", "task = 'colla': no such task (did you mean \"cola\"?); known: cola, mrpc"),
        ("method=lorra", "method = 'lorra': no such method (did you mean \"lora\"?); known: head, lora"),
        ("method={rank: 3}", "method: needs a name, as in `method: {name: lora}`"),
        ("method.rnk=3", 'method.rnk: lora has no such option (did you mean "rank"?)'),
        ("method.rank=four", "method.rank = 'four': expected integer"),
        ("method.rank=0", "method lora: rank = 0: expected 1 or more"),
        ("method.alpha=.nan", "method.alpha = nan: expected a finite number"),
        ("method.rounding=up", "method.rounding = 'up': expected 'floor' or 'ceil'"),
        ("method.targets=[1]", "method.targets"),
        ("model.name=x", "model.name: only method, task, trainer, vary, tune and report have keys below them"),
        ("seed", "'seed': expected key=value, as in learning_rate=1e-3"),
        ("epochs=[1", "epochs: line 1: not valid YAML"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        one(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_method_without_options_says_so() -> None:
    with pytest.raises(InputError, match="head has no such option; it has none"):
        one("method=head", "method.rank=4")


def test_a_missing_task_is_named() -> None:
    with pytest.raises(InputError, match="task: is missing"):
        load({"seed": 1}, [], SCHEMA)


def test_the_digest_is_of_the_settings_and_not_of_where_they_are_stored() -> None:
    assert one(runs="here").id == one(runs="there").id != one(seed=1).id


def test_a_number_beyond_all_counting_is_refused() -> None:
    with pytest.raises(
        InputError, match="method.rank = 99999999999999999999: expected less than or equal to 2147483647"
    ):
        one("method.rank=99999999999999999999")


def test_a_budget_leaves_the_size_open_unless_it_is_given() -> None:
    assert "rank" not in one(budget=1000).method and one(budget=1000).method["alpha"] == 16.0
    assert one("method.rank=4", budget=1000).method["rank"] == 4
    runs = sweep(budget=1000)
    assert [run.method.get("rank") for run in runs if run.method["name"] == "lora"] == [4] * 4
    free = {"method": [{"name": "lora"}], "budget": [1000, 2000]}
    assert [(run.method.get("rank"), run.budget) for run in sweep(vary=free)] == [(None, 1000), (None, 2000)]
    with pytest.raises(InputError, match="budget = 0: expected greater than or equal to 1"):
        one(budget=0)


@pytest.mark.parametrize("section", ["tune", "chain", "report", "published"])
def test_a_section_of_an_experiment_is_named_as_such_in_a_run_on_its_own(section: str) -> None:
    with pytest.raises(InputError, match=f"^{section}: belongs to an experiment, a file with `vary:`"):
        load({"task": "cola", section: {}}, [], SCHEMA)
