"""Ranks from two searches: what is suggested, what stock PEFT makes of it, and what is refused."""

import copy
import json
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import models
import rankwise as rw
import runs
import warm
from rankwise.commands.suggest import Suggestion, Wanted, check_free, uniform_ranks
from rankwise.errors import InputError
from rankwise.ranks import sites
from rankwise.settings import RunConfig


def searched(base, folder: Path, worth, budget: int, scale: float = 2.0, rank: int = 6, **options) -> Suggestion:
    """The suggestion of two searches that have learnt σ_k² ∝ worth(seed, place of the layer, k)."""
    folders = []
    for seed in (0, 1):
        model = get_peft_model(base(), LoraConfig(r=rank, lora_alpha=scale * rank, **options))
        draw = torch.Generator().manual_seed(seed)
        for place, site in enumerate(sites(model)):
            r, shape = site.rank, (site.A.flatten(1).T.shape, site.B.flatten(1).shape)
            QA, QB = (torch.linalg.qr(torch.randn(each, generator=draw))[0] for each in shape)
            sigma = torch.tensor([worth(seed, place, k) ** 0.5 for k in range(r)])
            with torch.no_grad():
                site.A.copy_(QA.T.reshape(site.A.shape))
                site.B.copy_((QB * sigma).reshape(site.B.shape))
        rw.save(model, folder / str(seed) / "adapter")
        folders.append(folder / str(seed))
    of = [
        RunConfig(task="stdlib-kind", method={"name": "lora", "rank": rank}, max_steps=9, seed=seed) for seed in (0, 1)
    ]
    return Suggestion.of(Wanted(of, budget, scale), folders)


def agreed(seed, place, k):
    """Two seeds that have learnt nearly the same, more at the later layers."""
    return (1 + place) ** 2 / (k + 1) ** 2 * (1 + 0.01 * ((place + seed) % 3))


def luck(seed, place, k):
    return torch.rand(99, generator=torch.Generator().manual_seed(seed))[place].item() / (k + 1)


def one(auto, kind, **more):
    """A function that makes the same small model of a family each time."""
    return lambda: next(models.every_model(auto, {kind: kind}, **more))[1]


def layers_of(model) -> dict[str, tuple[int, float]]:
    return {site.name: (site.rank, site.scaling) for site in sites(model)}


def classifier():
    return models.model("bert")


llama = one(transformers.AutoModelForCausalLM, "llama")


def costs_of(base, **options) -> int:
    """Parameters of rank 1 in all layers."""
    return sum(site.cost for site in sites(get_peft_model(base(), LoraConfig(r=1, **options))))


def added(base, config) -> PeftModel:
    """What stock PEFT makes of a suggestion, as read from a file."""
    return get_peft_model(base(), LoraConfig(**json.loads(json.dumps(config))))


def certain(suggestion: Suggestion) -> Suggestion:
    """The same without doubts, which a few layers leave."""
    suggestion.__dict__["doubts"] = []
    return suggestion


def check(base, suggestion: Suggestion, scale: float = 2.0) -> None:
    """The model has the suggested ranks, each scaled by s, and trains exactly what is said, apart from its head."""
    model = added(base, suggestion.config)
    assert {site.name: site.rank for site in sites(model)} == {n: r for n, r in suggestion.ranks.items() if r}
    assert all(site.scaling == pytest.approx(scale) for site in sites(model))
    assert sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n) == suggestion.parameters
    assert suggestion.parameters <= suggestion.wanted.budget


WRITES = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(("kind", "more"), [("llama", {}), ("gpt2", {"fan_in_fan_out": True}), ("gpt_neox", {})])
def test_stock_peft_adds_the_suggested_ranks(tmp_path: Path, kind: str, more) -> None:
    base, options = one(transformers.AutoModelForCausalLM, kind), {**WRITES, **more}
    found = certain(searched(base, tmp_path, agreed, 3 * costs_of(base, **options) + 7, **options))
    assert len({*found.ranks.values()}) > 1
    assert found.config["task_type"] == "CAUSAL_LM"
    check(base, found)


@pytest.mark.large
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:The following .*_pattern keys", "ignore:target_parameters")
def test_stock_peft_adds_the_suggested_ranks_in_every_family(tmp_path: Path) -> None:
    checked = 0
    for kind, model in models.every_model(transformers.AutoModelForCausalLM, models.WRITERS):
        base = lambda model=model: copy.deepcopy(model)  # noqa: E731
        try:
            budget = costs_of(base, **WRITES) + 7
        except ValueError:  # PEFT finds no linear layer in it, or none that it can adapt
            continue
        try:
            found = searched(base, tmp_path / kind, agreed, budget, rank=2, **WRITES)
        except InputError as error:  # PEFT adapts the experts' one parameter, which has no ranks by layer
            assert "target_parameters" in str(error)
            continue
        check(base, certain(found))
        checked += 1
    assert checked > 60


def test_two_searches_that_disagree_suggest_uniform_ranks(tmp_path: Path) -> None:
    budget = 3 * costs_of(llama, **WRITES) + 7
    found = searched(llama, tmp_path, luck, budget, **WRITES)
    assert found.doubts and {*found.ranks.values()} == {3}
    assert found.config["r"] == 3 and found.config["lora_alpha"] == 6
    assert found.config["rank_pattern"] == found.config["alpha_pattern"] == {}
    assert "no evidence for ranks other than uniform ones" in "\n".join(found.lines())
    assert found.as_json()["uniform"] is True
    check(llama, found)


@pytest.mark.parametrize("worth", [luck, agreed])
def test_a_budget_below_rank_1_everywhere_is_spread_or_spent_where_two_searches_agree(tmp_path: Path, worth) -> None:
    budget = costs_of(llama, **WRITES) // 4
    found = searched(llama, tmp_path, worth, budget, rank=2, **WRITES)
    spread = found.agreement.uniform
    assert {*spread.values()} == {0, 1}
    if worth is luck:
        assert found.doubts and found.ranks == spread
    assert found.config["r"] >= 1 and len(found.config["target_modules"]) == sum(map(bool, found.ranks.values()))
    check(llama, found)
    check(llama, certain(found))


def test_both_searches_count_the_same_whatever_their_losses_were(tmp_path: Path) -> None:
    """One seed's factors are a thousand times larger, which says nothing about layers."""
    budget = 2 * costs_of(llama, **WRITES)
    plain = searched(llama, tmp_path / "a", agreed, budget, **WRITES)
    larger = searched(llama, tmp_path / "b", lambda s, p, k: agreed(s, p, k) * (1e6 if s else 1), budget, **WRITES)
    assert plain.ranks == larger.ranks
    assert plain.agreement.kept == pytest.approx(larger.agreement.kept)


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    options = {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}
    found = searched(classifier, tmp_path, agreed, 3 * costs_of(classifier, **options), **options)
    model = added(classifier, found.config)
    assert any(p.requires_grad and "classifier" in name for name, p in model.named_parameters())
    check(classifier, found)


class Nested(nn.Module):
    """One layer's name is the end of another one's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"proj": nn.Linear(8, 8), "out": nn.Linear(8, 8)})

    def forward(self, x):
        return self.inner["out"](self.inner["proj"](self.proj(x)))


@pytest.mark.parametrize("empty", [0, 1])
def test_a_layer_without_rank_is_left_out_though_its_name_ends_as_another_one(tmp_path: Path, empty: int) -> None:
    worth = lambda seed, place, k: 1e-9 if place == empty else 1.0 + k  # noqa: E731
    found = certain(searched(Nested, tmp_path, worth, 64, target_modules=["proj", "inner.out"]))
    assert sorted(found.ranks.values()) == [0, 2, 2]
    check(Nested, found)


def test_the_folder_is_an_untrained_adapter_of_these_ranks(tmp_path: Path) -> None:
    found = searched(llama, tmp_path, agreed, 3 * costs_of(llama, **WRITES), **WRITES)
    found.write(tmp_path / "start")
    model = PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)
    assert layers_of(model) == layers_of(added(llama, found.config))
    with torch.no_grad():
        ids = models.LLAMA_IDS % models.VOCABULARY
        assert torch.equal(model.eval()(input_ids=ids).logits, llama()(input_ids=ids).logits)
    for site in sites(model):
        assert site.A.requires_grad and not site.B.any()
    started, fresh = (
        torch.cat([site.A.detach().flatten() for site in sites(each)]) for each in (model, added(llama, found.config))
    )
    assert started.std().item() == pytest.approx(fresh.std().item(), rel=0.1)
    assert found.save_picture(tmp_path / "plans.svg").read_text().startswith("<?xml")


def test_what_is_written_next_to_the_file(tmp_path: Path) -> None:
    found = searched(llama, tmp_path, agreed, 3 * costs_of(llama, **WRITES), **WRITES)
    out = tmp_path / "new" / "lora.json"
    found.write(out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["lora.axolotl.yaml", "lora.json"]
    assert json.loads(out.read_text()) == found.config
    taken = yaml.safe_load(out.with_suffix(".axolotl.yaml").read_text())
    assert taken["lora_rank_pattern"] == found.config["rank_pattern"] and taken["lora_r"] == found.config["r"]
    assert all(type(alpha) is int for alpha in taken["lora_alpha_pattern"].values())
    with pytest.raises(InputError, match="lora.json: is there already; give another name, or --force"):
        check_free(out, force=False)
    check_free(out, force=True)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"strange holds thesis.tex"):
        check_free(strange, force=True)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"folder.json: is a folder; give the name of a file"):
        check_free(tmp_path / "folder.json", force=True)


def test_the_snippets_of_peft_and_unsloth_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth wants a GPU; in its place stands what its get_peft_model does with these options."""
    found = searched(llama, tmp_path, agreed, 3 * costs_of(llama, **WRITES), **WRITES)
    out = tmp_path / "lora.json"
    found.write(out)
    unsloth = types.ModuleType("unsloth")
    unsloth.FastLanguageModel = types.SimpleNamespace(
        get_peft_model=lambda model, **kwargs: get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **kwargs))
    )
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    for trainer in ("PEFT, TRL", "Unsloth"):
        names = {"model": llama()}
        exec(found.snippets(out)[trainer], names)
        assert layers_of(names["model"]) == layers_of(added(llama, found.config))
        assert f"adds {found.parameters:,} parameters" in found.snippets(out)[trainer]
    found.write(tmp_path / "start")
    names = {"model": llama()}
    exec(found.snippets(tmp_path / "start")["PEFT, TRL"], names)
    assert layers_of(names["model"]) == layers_of(added(llama, found.config))


def test_no_trainer_is_told_to_read_what_it_would_ignore(tmp_path: Path) -> None:
    budget = 3 * costs_of(llama, **WRITES)
    out = Path("lora.json")
    told = searched(llama, tmp_path / "a", agreed, budget, **WRITES).snippets(out)
    assert "would ignore others" in told["LLaMA-Factory"] and "rank_pattern" not in told["LLaMA-Factory"]
    assert "-o lora, a folder" in told["LLaMA-Factory"]
    fractions = searched(llama, tmp_path / "b", agreed, budget, scale=1.3, **WRITES)
    assert fractions.snippets(out)["axolotl"].startswith("takes whole alphas only")
    fractions.write(tmp_path / "lora.json")
    assert not (tmp_path / "lora.axolotl.yaml").exists()
    check(llama, fractions, scale=1.3)
    reads = searched(classifier, tmp_path / "c", agreed, 9_000, target_modules=["query"], task_type="SEQ_CLS")
    assert [*reads.snippets(out)] == ["PEFT, TRL", "axolotl, LLaMA-Factory, Unsloth"]


def test_a_search_that_has_learnt_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has learnt nothing: give it more steps"):
        searched(llama, tmp_path, lambda *_: 0.0, 9_000, target_modules=["q_proj"])


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=6), st.integers(1, 2_000))
def test_uniform_ranks_are_the_largest_within_the_budget(layers, budget) -> None:
    costs, limits = ({str(place): each[part] for place, each in enumerate(layers)} for part in (0, 1))
    if max(costs.values()) > budget:
        with pytest.raises(InputError, match=r"rank 1 of \d alone needs"):
            uniform_ranks(costs, limits, budget)
        return
    found = uniform_ranks(costs, limits, budget)
    if sum(costs.values()) > budget:
        left = budget - sum(found[name] * costs[name] for name in costs)
        assert {*found.values()} == {0, 1}
        assert 0 <= left < max(cost for name, cost in costs.items() if not found[name])
        return
    rank, cost = max(found.values()), sum(found[name] * costs[name] for name in costs)
    assert cost <= budget and found == {name: min(rank, limits[name]) for name in costs}
    more = sum(min(rank + 1, limits[name]) * costs[name] for name in costs)
    assert more > budget or rank == max(limits.values())


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A run of a small BERT, as a user's file would have it."""
    made = tmp_path_factory.mktemp("settings")
    given = {key: value for key, value in runs.SETTINGS.items() if key not in ("id", "max_steps", "checkpoint_every")}
    return {
        **given,
        "model": runs.bert(made / "bert"),
        "runs": str(made / "runs"),
        "method": {"name": "lora", "rank": 2},
    }


def test_the_searches_are_short_runs_of_the_users_settings(settings) -> None:
    wanted = Wanted.of({**settings, "warmup": 500.0}, ["method.alpha=6", "seed=7"], 3_500)
    first, second = wanted.runs
    assert (first.seed, second.seed) == (7, 8) and first.model_copy(update={"seed": 8}) == second
    assert first.method["rank"] == 6 and first.method["alpha"] == 18 and wanted.scale == 3
    assert first.max_steps == 100 and first.warmup == 0.06 and first.runs.endswith("/runs/suggest")
    assert first.task["name"] == "stdlib-kind" and first.learning_rate == settings["learning_rate"]
    assert Wanted.of(settings, [], 500).runs[0].method["rank"] == 2  # less than rank 1 everywhere, which costs 960


def test_those_of_a_run_are_next_to_it(settings, tmp_path: Path) -> None:
    folder = runs.make(tmp_path / "mine" / "run", model=settings["model"])
    first, _ = Wanted.of(folder, [], 3_500).runs
    assert first.runs == str(tmp_path / "mine" / "suggest") and first.max_steps == 100
    with pytest.raises(InputError, match="the settings of a run are in its run.yaml"):
        Wanted.of(folder, ["seed=3"], 3_500)


@pytest.mark.parametrize(
    ("budget", "more", "message"),
    [
        (90, [], r"budget = 90: rank 1 of .*dense alone needs 96 parameters; raise it, or name other targets"),
        (10**6, [], r"budget = 1000000: allows rank 32 everywhere, the most that .* can use, which leaves nothing"),
        (3_500, ["seed=[0,1]"], "seed"),
        (3_500, ["task=stdlib-kinds"], "did you mean"),
        (3_500, ["method.targets=[queri]"], "matches no linear layer"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(settings, budget, more, message, cli, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    code, out, err = cli("suggest", file, *more, "--budget", budget)
    assert code == 2 and out == "" and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert not Path(settings["runs"]).exists()


def test_the_experiment_of_a_sweep_is_no_run(settings, cli, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**settings, "vary": {"seed": [0, 1]}}))
    code, _, err = cli("suggest", file, "--budget", 3_500)
    assert code == 2 and "rankwise compare" in err


def start(arguments, **more):
    command = [sys.executable, "-m", "rankwise", "suggest", *map(str, arguments)]
    return warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.large
def test_killed_in_the_middle_the_same_command_ends_with_the_same(settings, tmp_path: Path) -> None:
    """Both searches for real: once undisturbed, once killed with kill -9 again and again."""
    answers = {}
    for name in ("undisturbed", "killed"):
        file, out = tmp_path / f"{name}.yaml", tmp_path / f"{name}.json"
        file.write_text(yaml.safe_dump({**settings, "runs": str(tmp_path / name)}))
        arguments = [file, "--budget", 3_500, "--steps", 40, "--jobs", 1, "--json", "-o", out]
        kills = 3 if name == "killed" else 0
        while True:
            process = start(arguments)
            store, seen = tmp_path / name / "suggest", len(list((tmp_path / name).glob("suggest/*/checkpoint-*")))
            while kills and process.poll() is None:
                if len(list(store.glob("*/checkpoint-*")) + list(store.glob("*/result.json"))) > seen:
                    process.kill()
                    kills -= 1
                    break
                time.sleep(0.01)
            text, err = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, err
        answers[name] = json.loads(text)
        assert json.loads(out.read_text()) == answers[name]["config"]
    for answer in answers.values():
        del answer["searches"], answer["snippets"]
    assert answers["undisturbed"] == answers["killed"] and kills == 0
    assert (
        answers["killed"]["uniform"] and answers["killed"]["parameters"] == 2_880
    )  # a random model has little to learn


@pytest.mark.large
def test_on_minilm_two_seeds_agree(settings, tmp_path: Path, cli) -> None:
    """The other outcome for real: a pretrained model learns more at some layers than at others, with either seed."""
    out = tmp_path / "lora.json"
    given = {"task": "stdlib-kind", "max_length": 48, "runs": str(tmp_path / "runs")}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(given))
    code, text, err = cli("suggest", file, "--budget", 340_000, "--steps", 30, "--jobs", 1, "-o", out)
    assert code == 0, err
    assert "the two agree on where rank is used" in text and "no evidence" not in text
    config = json.loads(out.read_text())
    assert config["rank_pattern"] and config["alpha_pattern"].keys() == config["rank_pattern"].keys()
    again = rw.suggest(given, budget=340_000, steps=30, out=tmp_path / "again.json")  # what is there is read
    assert again.config == config
