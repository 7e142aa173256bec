from pathlib import Path
from typing import Any

import pytest
import yaml

from rankwise.errors import InputError
from rankwise.settings import Experiment, RunConfig, json_schema, load
from rankwise.settings.run import put
from small_schema import SCHEMA, SWEEP, one, sweep


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"- 1\n- 2\n", "expected `key: value` lines, found a list"),
        (b"task: [cola\n", "line 2: not valid YAML"),
        (b"task: cola\ntask: mrpc\n", "line 2: not valid YAML: the key 'task' is given twice"),
        (b"task: \xff\xfe\n", "not a text file in UTF-8"),
    ],
)
def test_a_broken_file_is_named_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(file, [], SCHEMA)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("task: cola\n")
    with pytest.raises(InputError, match=r'no such file \(did you mean "quickstart.yaml"\?\)'):
        load(tmp_path / "quikstart.yaml", [], SCHEMA)
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path, [], SCHEMA)


def test_what_python_gives_is_checked_as_a_file_is() -> None:
    circular: dict[str, Any] = {"task": "cola"}
    circular["model"] = circular
    deep: Any = "x"
    for _ in range(5_000):
        deep = [deep]
    for settings in (circular, {"task": "cola", "model": deep}, {"task": "cola", (1, 2): 3}):
        with pytest.raises(InputError, match="^settings that cannot be written as YAML: "):
            load(settings, [], SCHEMA)
    with pytest.raises(InputError, match="holds a character that no text may have"):
        load({"task": "cola", "runs": "a\0b"}, [], SCHEMA)
    assert one(runs=Path("a")).runs == "a"


def test_the_file_names_the_experiment_and_its_runs(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    experiment = load(file, [], SCHEMA)
    assert isinstance(experiment, Experiment)
    assert (experiment.name, experiment.runs) == ("small", "runs/small")
    assert {config.runs for config in experiment.configs} == {"runs/small"}
    elsewhere = load(file, ["runs=/tmp/x"], SCHEMA)
    assert elsewhere.runs == "/tmp/x"


@pytest.mark.parametrize(
    ("override", "runs"),
    [
        ("seed=5", [(5, "head", 0.1, None), (5, "lora", 1e-3, 4), (5, "lora", 3e-3, 4)]),
        ("method=head", [(0, "head", 0.1, None), (1, "head", 0.1, None)]),
        (
            "learning_rate=0.2",
            [(0, "head", 0.2, None), (0, "lora", 0.2, 4), (1, "head", 0.2, None), (1, "lora", 0.2, 4)],
        ),
    ],
)
def test_an_override_wins_over_the_axes(override: str, runs: list[Any]) -> None:
    found = [(c.seed, c.method["name"], c.learning_rate, c.method.get("rank")) for c in sweep(override)]
    assert sorted(found, key=str) == runs


def test_an_option_reaches_the_methods_that_have_it() -> None:
    assert {c.method.get("rank") for c in sweep("method.rank=2")} == {2, None}
    with pytest.raises(InputError, match=r'method.rnk: none of the varied methods has this option .*"rank"'):
        sweep("method.rnk=2")


def test_an_option_of_varied_tasks_is_set_on_the_command_line_or_refused() -> None:
    settings = {**SWEEP, "vary": {"task": ["cola", "mrpc"], "seed": [0]}}
    experiment = load(settings, ["task.protocol=halves"], SCHEMA)
    assert isinstance(experiment, Experiment)
    assert [config.task.get("protocol") for config in experiment.configs] == [None, "halves"]
    with pytest.raises(InputError, match="task.protocl: none of the varied tasks has this option"):
        load(settings, ["task.protocl=halves"], SCHEMA)
    chained = {"vary": {"seed": [0]}, "chain": [{"task": "cola"}, {"task": "mrpc"}]}
    with pytest.raises(InputError, match="task.protocol: the stages of the chain set it"):
        load(chained, ["task.protocol=halves"], SCHEMA)


SMALL = {
    "task": "cola",
    "epochs": 9,
    "vary": {"seed": [0, 1, 2], "method": [{"name": "lora", "learning_rate": [1e-3, 3e-3]}, "head"]},
    "smoke": {"seed": 1, "learning_rate": 2e-3, "epochs": 1, "model": "random-bert"},
}


def runs(content: dict[str, Any], *settings: str) -> list[RunConfig]:
    experiment = load(content, list(settings), SCHEMA)
    assert isinstance(experiment, Experiment)
    return list(experiment.configs)


def test_what_smoke_sets_is_taken_at_that_scale_alone() -> None:
    smoke = runs(SMALL, "scale=smoke")
    assert {(c.seed, c.learning_rate, c.epochs, c.model) for c in smoke} == {(1, 2e-3, 1.0, "random-bert")}
    assert len(smoke) == 2 and smoke == runs({**SMALL, "scale": "smoke"})
    full = runs(SMALL)
    assert full == runs({key: value for key, value in SMALL.items() if key != "smoke"})
    assert runs({**SMALL, "scale": "smoke"}, "scale=full")[0].max_steps is None


def test_the_section_small_sets_what_it_says_and_no_more() -> None:
    both = {**SMALL, "small": {"model": "smollm2", "train_rows": 900, "vary.seed": [4, 5]}}
    small = runs(both, "scale=small")
    assert {(c.seed, c.model, c.train_rows, c.epochs, c.scale) for c in small} == {
        (seed, "smollm2", 900, 9.0, "small") for seed in (4, 5)
    }
    assert {c.train_rows for c in runs(both, "scale=small", "train_rows=5000")} == {5000}
    assert runs(both) == runs(SMALL) and runs(both, "scale=smoke") == runs(SMALL, "scale=smoke")
    for setting in ({}, {"small": None}):
        with pytest.raises(InputError, match="^scale = small: there is no section `small`; add one, as in `small: {"):
            load({**SMALL, **setting}, ["scale=small"], SCHEMA)


def test_the_run_of_a_section_small_is_read_again_from_its_run_yaml() -> None:
    [run] = runs({**SMALL, "vary": {"seed": [3]}, "small": {"epochs": 2}}, "scale=small")
    again = load({**run.model_dump(mode="json"), "id": run.id, "made_with": {}}, [], SCHEMA)
    assert isinstance(again, RunConfig) and (again.id, again.scale, again.epochs) == (run.id, "small", 2.0)


def test_the_command_line_wins_over_smoke() -> None:
    for setting in ("seed=[4,5]", "vary.seed=[4,5]"):
        assert {c.seed for c in runs(SMALL, "scale=smoke", setting)} == {4, 5}
    one_run = load({"task": "cola", "smoke": {"epochs": 1, "seed": 7}, "scale": "smoke"}, ["seed=8"], SCHEMA)
    assert isinstance(one_run, RunConfig) and (one_run.epochs, one_run.seed) == (1, 8)
    axes = {"vary.seed": [7], "vary.method": [{"name": "lora", "learning_rate": 5e-3}, "head"]}
    for setting, seeds in (("method=lora", {7}), ("seed=8", {8}), ("vary.seed=[8]", {8})):
        found = [c for c in runs({**SMALL, "smoke": axes}, "scale=smoke", setting) if c.method["name"] == "lora"]
        assert {(c.seed, c.learning_rate) for c in found} == {(seed, 5e-3) for seed in seeds}
    # what smoke sets of the methods of the file is nothing to other methods
    ranks = {**SMALL, "vary": {"method": ["lora"]}, "smoke": {"method.rank": 2}}
    assert [c.method["name"] for c in runs(ranks, "scale=smoke", "vary.method=[head]")] == ["head"]
    assert [c.method["rank"] for c in runs(ranks, "scale=smoke")] == [2]


def test_the_method_to_measure_against_is_checked() -> None:
    def reference(given: Any) -> Any:
        experiment = load({**SMALL, "report": {"title": "x", "reference": given}}, [], SCHEMA)
        assert isinstance(experiment, Experiment)
        return experiment.report["reference"]

    assert reference("head") == {"name": "head"}
    assert reference({"name": "lora", "rank": 4}) == {"name": "lora", "rank": 4}
    wrongs = {"expected a name": 3, "no such method": "lore", "has no such option": {"name": "lora", "ranks": 4}}
    for message, wrong in wrongs.items():
        with pytest.raises(InputError, match=f"^report.reference: method.*{message}"):
            reference(wrong)
    with pytest.raises(InputError, match="report.title = 3: expected string"):
        load({**SMALL, "report": {"title": 3}}, [], SCHEMA)


def test_a_method_and_a_task_may_bring_settings_of_their_own() -> None:
    content = {
        "warmup": 10,
        "epochs": 2,
        "vary": {
            "seed": [0],
            "task": [{"name": "cola", "epochs": 5}, "mrpc"],
            "method": [{"name": "lora", "warmup": 30}, {"name": "head"}],
        },
    }
    found = {(c.task["name"], c.method["name"]): (c.epochs, c.warmup) for c in runs(content)}
    assert found == {
        ("cola", "lora"): (5, 30),
        ("cola", "head"): (5, 10),
        ("mrpc", "lora"): (2, 30),
        ("mrpc", "head"): (2, 10),
    }
    # as with rates, what is given on the command line reaches all
    assert {(c.epochs, c.warmup) for c in runs(content, "epochs=1", "warmup=0")} == {(1, 0)}


def test_published_keeps_what_changes_the_protocol_and_is_seen_nowhere_else() -> None:
    content = {**SMALL, "published": {"tables": ["lora/gpt3"], "differs": "all"}}
    experiment = load(content, ["scale=smoke", "seed=0", "runs=x", "epochs=3"], SCHEMA)
    assert isinstance(experiment, Experiment) and experiment.published is not None
    assert (experiment.published.tables, experiment.published.differs) == (["lora/gpt3"], "all")
    assert experiment.published.changed == ["epochs=3"]
    assert {"smoke", "small", "published"} <= json_schema(SCHEMA)["properties"].keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"smoke": 3}, "smoke = 3: expected settings"),
        ({"small": [1]}, "small = [1]: expected settings, as in `small: {model: smollm2"),
        ({"smoke": {"epoch": 1}, "scale": "smoke"}, 'epoch: there is no such key (did you mean "epochs"?)'),
        ({"published": {"table": ["x"]}}, "published = {'changed': [], 'table': ['x']}: expected `tables: [NAME, …]`"),
        ({"published": {"tables": []}}, "published = {"),
        ({"published": "lora/gpt3"}, "published = 'lora/gpt3': expected `tables: [NAME, …]`"),
        ({"smok": {}}, 'smok: there is no such key (did you mean "smoke"?)'),
    ],
)
def test_a_wrong_smoke_or_published_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load({**SMALL, **content}, [], SCHEMA)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", ["seed", "method"])
def test_an_override_without_values_is_refused_as_in_the_file(axis: str) -> None:
    content = {**SMALL, "vary": {"seed": [0], "method": ["lora"]}, "tune": {"learning_rate": [1e-3]}}
    for setting in (f"{axis}=[]", f"vary.{axis}=[]"):
        with pytest.raises(InputError, match=rf"^vary\.{axis} = \[\]: expected a list of values, as in `{axis}: \["):
            load(content, [setting], SCHEMA)
    with pytest.raises(InputError, match="^vary: expected axes"):
        load({"vary": {}}, [], SCHEMA)


def test_axes_may_come_from_overrides_alone() -> None:
    assert [config.seed for config in runs({"task": "cola"}, "vary.seed=[0,1]")] == [0, 1]


def test_keys_below_keys_reach_what_lies_below() -> None:
    """Varying or overriding one of several columns leaves the others as they are."""
    base = {"task": {"name": "t", "columns": {"text": "body", "label": "kind"}}, "tune": {"learning_rate": [1e-3]}}
    put(base, "task.columns.label", "mood")
    put(base, "task.columns.more.deep", 1)
    put(base, "tune.learning_rate.low", 1e-5)
    assert base["task"] == {"name": "t", "columns": {"text": "body", "label": "mood", "more": {"deep": 1}}}
    assert base["tune"] == {"learning_rate": {"low": 1e-5}}
    axes = {"vary": {"seed": [0]}}
    put(axes, "vary.task.columns.label", ["kind", "mood"])
    assert axes["vary"] == {"seed": [0], "task.columns.label": ["kind", "mood"]}
    with pytest.raises(InputError, match="only method, task, trainer, vary, tune and report have keys below them"):
        put(base, "epochs.more", 1)


@pytest.mark.parametrize("name", ["[]", "{}", "1", "null", "[lora]"])
@pytest.mark.parametrize("key", ["method", "task"])
def test_a_name_that_is_no_text_is_refused_in_a_run_and_in_an_experiment(key: str, name: str) -> None:
    for given in ({"task": "t"}, {"task": "t", "vary": {"seed": [0]}}):
        with pytest.raises(InputError, match=f"^{key}: needs a name|^{key}.name = "):
            load(given, [f"{key}.name={name}"], SCHEMA)
