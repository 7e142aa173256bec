import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import jsonschema
import pytest
import yaml

from rankwise import methods, tasks
from rankwise.bench import runners
from rankwise.config import (
    LARGEST,
    LONGEST,
    MOST_RUNS,
    Contest,
    Experiment,
    RunConfig,
    Schema,
    Span,
    as_yaml,
    json_schema,
    load,
    parse_yaml,
    read_yaml,
)
from rankwise.errors import InputError, nearest, need
from rankwise.runs.grid import expand


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A method with options of every kind."""

    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 8
    alpha: float = 16
    targets: str | tuple[str, ...] = "all-linear"
    rounding: Literal["floor", "ceil"] = "floor"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank = {self.rank}: expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Bare:
    """A method without options."""


@dataclasses.dataclass(frozen=True)
class Custom:
    """A task with an option."""

    protocol: Literal["official", "halves"] = "official"


SCHEMA = Schema({"lora": Adapter, "head": Bare}, {"cola": Bare, "mrpc": Custom})
SWEEP: dict[str, Any] = {
    "task": "cola",
    "vary": {
        "method": [{"name": "lora", "rank": 4, "learning_rate": [1e-3, 3e-3]}, {"name": "head", "learning_rate": 0.1}],
        "seed": [0, 1],
    },
}


def one(*overrides: str, **settings: Any) -> RunConfig:
    config = load({"task": "cola", **settings}, overrides, SCHEMA)
    assert isinstance(config, RunConfig)
    return config


def sweep(*overrides: str, **settings: Any) -> list[RunConfig]:
    experiment = load({**SWEEP, **settings}, overrides, SCHEMA)
    assert isinstance(experiment, Experiment)
    return list(experiment.configs())


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


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("3E-05", 3e-5), ("0.01", 0.01), ("1", 1.0), ("5.e-1", 0.5)]
)
def test_a_learning_rate_is_a_number_however_it_is_written(text: str, value: float, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as a word."""
    file = tmp_path / "run.yaml"
    file.write_text(f"task: cola\nlearning_rate: {text}\n")
    config = load(file, [], SCHEMA)
    assert isinstance(config, RunConfig)
    assert config.learning_rate == one(f"learning_rate={text}").learning_rate == value


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
        ("model.name=x", "model.name: only method, task, vary, tune and report have keys below them"),
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


def test_an_experiment_is_the_product_of_its_axes_each_method_at_its_own_rates() -> None:
    runs = [(config.seed, config.method["name"], config.learning_rate) for config in sweep()]
    assert sorted(runs) == [
        *[(0, "head", 0.1), (0, "lora", 1e-3), (0, "lora", 3e-3)],
        *[(1, "head", 0.1), (1, "lora", 1e-3), (1, "lora", 3e-3)],
    ]


def test_a_methods_own_rates_take_the_place_of_the_axis() -> None:
    vary = {"method": ["lora", {"name": "head", "learning_rate": [0.1]}], "learning_rate": [1e-3, 3e-3]}
    assert sorted((c.method["name"], c.learning_rate) for c in sweep(vary=vary)) == [
        *[("head", 0.1), ("lora", 1e-3), ("lora", 3e-3)]
    ]


def test_a_dotted_axis_sets_an_option_of_each_method() -> None:
    runs = sweep(vary={"method.rank": [2, 4], "method": ["lora", {"name": "lora", "alpha": 32}]})
    assert [(c.method["rank"], c.method["alpha"]) for c in runs] == [(2, 16), (2, 32), (4, 16), (4, 32)]


def test_the_file_names_the_experiment_and_its_runs(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    experiment = load(file, [], SCHEMA)
    assert isinstance(experiment, Experiment)
    assert (experiment.name, experiment.runs) == ("small", "runs/small")
    assert {config.runs for config in experiment.configs()} == {"runs/small"}
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vary": {}}, "vary: expected axes"),
        ({"vary": {"sed": [1]}}, 'vary.sed: there is no such key (did you mean "seed"?)'),
        ({"vary": {"seed": 1}}, "vary.seed = 1: expected a list of values"),
        ({"vary": {"seed": []}}, "vary.seed = []: expected a list of values"),
        ({"vary": {"seed": [0, "one"]}}, "seed = 'one': expected integer"),
        ({"vary": {"method": ["lora", "haed"]}}, "method = 'haed': no such method (did you mean \"head\"?)"),
        ({"vary": {"method": ["lora", "head"], "method.rank": [2]}}, "method.rank: head has no such option"),
        ({"vary": {"method": [{"name": "lora", "learning_rate": []}]}}, "vary.method: lora has an empty list"),
        ({"report": {"titel": "x"}}, 'report.titel: there is no such key (did you mean "title"?)'),
        ({"epoch": 3}, 'epoch: there is no such key (did you mean "epochs"?)'),
    ],
)
def test_every_combination_is_checked_before_the_first_run(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        sweep(**settings)
    assert str(caught.value).startswith(message)


def test_the_combinations_share_no_mapping() -> None:
    first, second, *_ = sweep()
    first.method["rank"] = 99
    assert second.method.get("rank") != 99


def test_the_json_schema_knows_methods_options_and_tasks() -> None:
    schema = json_schema(SCHEMA)
    names, *tasks = schema["properties"]["task"]["oneOf"]
    assert names == {"enum": ["cola", "mrpc"]}
    assert tasks[1]["properties"]["protocol"]["default"] == "official"
    lora = next(
        entry
        for entry in schema["properties"]["method"]["oneOf"]
        if entry.get("properties", {}).get("name") == {"const": "lora"}
    )
    assert lora["properties"]["rank"] == {"type": "integer", "default": 8, "minimum": -LARGEST, "maximum": LARGEST}
    assert lora["description"] == "A method with options of every kind."
    assert lora["additionalProperties"] is False
    assert {"vary", "report", "learning_rate"} <= schema["properties"].keys()
    assert all(
        "description" in schema["properties"][key] for key in RunConfig.model_fields if key not in ("method", "task")
    )


EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
OWN = {"task": {"type": "pair", "dataset": "d", "columns": {"text": "a", "text_pair": "b", "label": "c"}}, "epochs": 1}


def test_editors_accept_by_the_schema_what_rankwise_accepts() -> None:
    check = jsonschema.Draft202012Validator(json_schema(Schema(methods.registry(), tasks.registry()))).is_valid
    for file in EXPERIMENTS:
        assert check(read_yaml(file)), file.name
    assert check(OWN) and check({"task": "mrpc", "method": {"name": "sora", "rank": 4}})
    assert check({"task": {"name": "e2e", "beams": 4}})
    assert not check({**OWN, "epoch": 1})
    assert not check({"task": {**OWN["task"], "column": {}}})
    assert not check({"task": {**OWN["task"], "name": "pair"}})
    assert not check({"task": {"dataset": "d"}})
    assert not check({"task": "mrpc", "method": {"name": "sora", "rate": 4}})


def test_nearest_is_silent_where_nothing_is_near() -> None:
    assert nearest("lorra", ["lora", "head"]) == ' (did you mean "lora"?)'
    assert nearest("xyz", ["lora", "head"]) == ""


def test_need_names_the_extra_of_a_missing_package() -> None:
    assert need("json", "bench").dumps([]) == "[]"
    with pytest.raises(InputError, match=r"surely_not_there is not installed: pip install 'rankwise\[bench\]'"):
        need("surely_not_there.part", "bench")


CHAIN: dict[str, Any] = {**SWEEP, "chain": [{"method.rank": 4, "epochs": 5.0}, {"method.rank": 2}, {"method.rank": 1}]}
CHAIN["vary"] = {"seed": [0, 1]}


def test_each_combination_becomes_a_chain_whose_runs_name_the_one_before() -> None:
    found = load(CHAIN, [], SCHEMA)
    assert isinstance(found, Experiment)
    configs = list(found.configs())
    assert [(c.seed, c.method["rank"], c.epochs) for c in configs] == [
        *((0, 4, 5.0), (0, 2, 3.0), (0, 1, 3.0)),
        *((1, 4, 5.0), (1, 2, 3.0), (1, 1, 3.0)),
    ]
    for chain in (configs[:3], configs[3:]):
        assert [c.after for c in chain] == [None, chain[0].digest(), chain[1].digest()]
        assert [c.followed for c in chain] == [True, True, False]
    assert len({c.digest() for c in configs}) == 6


def test_the_digest_is_of_the_settings_and_not_of_where_they_are_stored() -> None:
    assert one(runs="here").digest() == one(runs="there").digest() != one(seed=1).digest()


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([], "chain: expected a list"),
        ([{}], "chain: expected a list"),
        ({"method.rank": 2}, "chain: expected a list"),
        ([{"method.rank": 2}, {"epoch": 1.0}], 'chain: epoch cannot differ .*"epochs"'),
        ([{"model": "x"}], "chain: model cannot differ"),
        ([{"method": "lora"}, {"method": "head"}], "chain: head cannot follow lora"),
        ([{"method.rank": 0}], "rank = 0"),
    ],
)
def test_a_chain_that_cannot_be_gets_one_clear_line(chain: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load({**CHAIN, "chain": chain}, [], SCHEMA)


def test_the_command_line_does_not_change_what_a_chain_sets() -> None:
    settings = {**SWEEP, "chain": [{"epochs": 2.0}, {"method.rank": 2}]}
    for override in ("epochs=7", "method.rank=3"):
        with pytest.raises(InputError, match="the stages of the chain set it; change the file, or give chain="):
            load(settings, [override], SCHEMA)
    changed = load(settings, ["chain=[{epochs: 3}, {epochs: 4}]", "max_length=16"], SCHEMA)
    assert isinstance(changed, Experiment)
    assert {config.epochs for config in changed.configs()} == {3.0, 4.0}


def test_a_number_beyond_all_counting_is_refused() -> None:
    with pytest.raises(InputError, match="method.rank = 99999999999999999999: expected less than or equal to 2147"):
        one("method.rank=99999999999999999999")


def test_an_option_of_varied_tasks_is_set_on_the_command_line_or_refused() -> None:
    settings = {**SWEEP, "vary": {"task": ["cola", "mrpc"], "seed": [0]}}
    experiment = load(settings, ["task.protocol=halves"], SCHEMA)
    assert isinstance(experiment, Experiment)
    assert [config.task.get("protocol") for config in experiment.configs()] == [None, "halves"]
    with pytest.raises(InputError, match="task.protocl: none of the varied tasks has this option"):
        load(settings, ["task.protocl=halves"], SCHEMA)
    chained = {"vary": {"seed": [0]}, "chain": [{"task": "cola"}, {"task": "mrpc"}]}
    with pytest.raises(InputError, match="task.protocol: the stages of the chain set it"):
        load(chained, ["task.protocol=halves"], SCHEMA)


def test_the_schema_asks_for_no_option_that_has_a_default() -> None:
    schema = json_schema(Schema({"lora": Adapter}, tasks.registry()))
    pair = next(
        each
        for each in schema["properties"]["task"]["oneOf"]
        if each.get("properties", {}).get("name", {}).get("const") == "pair"
    )
    assert pair["required"] == [] and pair["properties"]["columns"]["default"] == {}


TUNED: dict[str, Any] = {
    "task": "cola",
    "tune": {"learning_rate": [1e-3, 3e-4], "seeds": [7, 8], "share": 0.2},
    "vary": {"seed": [0, 1], "method": [{"name": "lora"}, {"name": "head", "learning_rate": 0.1}]},
}


def contests(*overrides: str, **settings: Any) -> list[Contest]:
    experiment = load({**TUNED, **settings}, overrides, SCHEMA)
    assert isinstance(experiment, Experiment)
    return list(experiment.contests())


def test_a_contest_tries_its_rates_at_the_tuning_seeds_and_reports_the_others() -> None:
    lora, head = contests()
    assert (lora.rates, head.rates) == ((3e-4, 1e-3), (0.1,))
    tried, reported = lora.tried(3e-4), lora.reported(3e-4)
    assert [(run.seed, run.tuning, run.eval_every) for run in tried] == [(7, 0.2, None), (8, 0.2, None)]
    assert [(run.seed, run.tuning, run.eval_every) for run in reported] == [(0, None, 0), (1, None, 0)]
    assert {run.learning_rate for run in (*tried, *reported)} == {3e-4}
    assert {run.method["name"] for run in reported} == {"lora"}


def test_the_runs_of_a_tuned_experiment_are_those_reported_each_once() -> None:
    experiment = load(TUNED, [], SCHEMA)
    assert isinstance(experiment, Experiment)
    assert [(run.method["name"], run.seed, run.tuning) for run in experiment.configs()] == [
        *(("lora", 0, None), ("lora", 1, None)),
        *(("head", 0, None), ("head", 1, None)),
    ]


def test_the_command_line_sets_parts_of_the_tuning() -> None:
    lora, head = contests("tune.learning_rate={low: 1e-5, high: 1e-2}", "tune.trials=4", "seed=5")
    assert lora.rates == Span(low=1e-5, high=1e-2)
    assert (head.rates, head.seeds, head.tune.trials) == ((0.1,), (5,), 4)


def test_a_method_may_bring_a_range_of_its_own() -> None:
    (lora,) = contests(
        vary={"method": [{"name": "lora", "learning_rate": {"low": 1e-4, "high": 1e-3}}]}, tune={"trials": 3}
    )
    assert lora.rates == Span(low=1e-4, high=1e-3) and lora.seeds == (0,)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({}, "tune.learning_rate: is missing"),
        ([1e-3], "tune = .*: expected settings"),
        ({"learning_rate": []}, "tune.learning_rate = .*: expected rates to try"),
        ({"learning_rate": [1e-3, -1]}, "tune.learning_rate = -1: expected greater than 0"),
        ({"learning_rate": ["fast"]}, "tune.learning_rate = 'fast': expected number"),
        ({"learning_rate": {"low": 1e-5, "high": 1e-2}}, "tune.trials: is missing"),
        ({"learning_rate": {"low": 1e-2, "high": 1e-2}, "trials": 3}, "low = 0.01 must be below high = 0.01"),
        ({"learning_rate": {"low": 0, "high": 1}, "trials": 3}, "tune.learning_rate = 0: expected greater than 0"),
        ({"learning_rate": {"lowest": 0, "high": 1}, "trials": 3}, 'lowest: there is no such key .*"low"'),
        ({"learning_rate": {"low": 1e-5, "high": 1e-2}, "trials": 0}, "tune.trials = 0: expected greater than"),
        ({"learning_rate": {"low": 1e-5, "high": 1e-2}, "trials": 1, "at_once": 0}, "tune.at_once = 0: expected"),
        ({"learning_rate": [1e-3], "trials": 3}, "tune.trials: a list of rates is tried whole"),
        ({"learning_rate": [1e-3], "trails": 3}, 'tune.trails: there is no such key .did you mean "trials"'),
        ({"learning_rate": [1e-3], "seeds": []}, "tune.seeds = .*: expected"),
        ({"learning_rate": [1e-3], "seeds": [1, 1]}, "tune.seeds = .*: expected different numbers"),
        ({"learning_rate": [1e-3], "seeds": [-1]}, "tune.seeds = -1: expected greater than or equal to 0"),
        ({"learning_rate": [1e-3], "seeds": [2**32]}, "tune.seeds = 4294967296: expected less than"),
        ({"learning_rate": [1e-3], "share": 1.0}, "tune.share = 1.0: expected less than 1"),
        ({"learning_rate": [1e-3], "share": 0}, "tune.share = 0: expected greater than 0"),
    ],
)
def test_a_tuning_that_cannot_be_gets_one_clear_line(tune: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load({**TUNED, "tune": tune}, [], SCHEMA)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: tune chooses it"),
        ({"tuning": 0.3}, "tuning: no setting of an experiment"),
        ({"vary": {"tuning": [0.3]}}, "tuning: no setting of an experiment"),
        ({"tuning": 0.3, "tune": None}, "tuning: no setting of an experiment"),
        ({"vary": {"learning_rate": [1e-3]}}, "learning_rate: tune chooses it"),
        ({"chain": [{"epochs": 1.0}, {"epochs": 2.0}]}, "tune: the rates of a chain cannot be tuned"),
        ({"vary": {"method": [{"name": "lora", "learning_rate": [0.0]}]}}, "learning_rate of lora = 0.0: expected"),
    ],
)
def test_what_does_not_go_with_a_tuning_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load({**TUNED, **settings}, [], SCHEMA)


def test_without_its_tuning_an_experiment_needs_rates() -> None:
    """The default rate, which nobody chose, would be a poor one for most methods."""
    plain = {**TUNED, "vary": {"seed": [0], "method": [{"name": "lora"}, {"name": "head"}]}}
    with pytest.raises(InputError, match="tune = null: give a rate instead, learning_rate=1e-3 or vary"):
        load(plain, ["tune=null"], SCHEMA)
    for rates in (["learning_rate=0.01"], ["vary.learning_rate=[0.01]"]):
        rated = load(plain, ["tune=null", *rates], SCHEMA)
        assert isinstance(rated, Experiment) and {run.learning_rate for run in rated.configs()} == {0.01}
    untuned = {key: value for key, value in plain.items() if key != "tune"}
    assert load(untuned, ["tune=null"], SCHEMA) == load(untuned, [], SCHEMA)
    own = {**plain, "vary": {"method": [{"name": "lora", "learning_rate": 0.02}]}}
    rated = load(own, ["tune=null"], SCHEMA)
    assert isinstance(rated, Experiment) and {run.learning_rate for run in rated.configs()} == {0.02}


def test_a_budget_leaves_the_size_open_unless_it_is_given() -> None:
    assert "rank" not in one(budget=1000).method and one(budget=1000).method["alpha"] == 16.0
    assert one("method.rank=4", budget=1000).method["rank"] == 4
    runs = sweep(budget=1000)
    assert [run.method.get("rank") for run in runs if run.method["name"] == "lora"] == [4] * 4
    free = {"method": [{"name": "lora"}], "budget": [1000, 2000]}
    assert [(run.method.get("rank"), run.budget) for run in sweep(vary=free)] == [(None, 1000), (None, 2000)]
    with pytest.raises(InputError, match="budget = 0: expected greater than or equal to 1"):
        one(budget=0)


@pytest.mark.parametrize("word", ["1285e1020756", "012345670123", "1e5", "null", "0x1f", "plain"])
def test_a_word_is_read_as_it_was_written(word: str) -> None:
    """Twelve hex digits may look like a number, and then a run would not know its own id."""
    assert parse_yaml(as_yaml({"id": word, "rate": 1e-05})) == {"id": word, "rate": 1e-05}


# --- smoke, own settings, published -----------------------------------------------------------------------------------

SMALL = {
    "task": "cola",
    "epochs": 9,
    "vary": {"seed": [0, 1, 2], "method": [{"name": "lora", "learning_rate": [1e-3, 3e-3]}, "head"]},
    "smoke": {"seed": 1, "learning_rate": 2e-3, "epochs": 1, "model": "random-bert"},
}


def runs(content: dict[str, Any], *settings: str) -> list[RunConfig]:
    experiment = load(content, list(settings), SCHEMA)
    assert isinstance(experiment, Experiment)
    return list(experiment.configs())


def test_what_smoke_sets_is_taken_at_that_scale_alone() -> None:
    smoke = runs(SMALL, "scale=smoke")
    assert {(c.seed, c.learning_rate, c.epochs, c.model) for c in smoke} == {(1, 2e-3, 1.0, "random-bert")}
    assert len(smoke) == 2 and smoke == runs({**SMALL, "scale": "smoke"})
    full = runs(SMALL)
    assert full == runs({key: value for key, value in SMALL.items() if key != "smoke"})
    assert runs({**SMALL, "scale": "smoke"}, "scale=full")[0].max_steps is None


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
    assert {"smoke", "published"} <= json_schema(SCHEMA)["properties"].keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"smoke": 3}, "smoke = 3: expected settings"),
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


@pytest.mark.parametrize("section", ["tune", "chain", "report", "published"])
def test_a_section_of_an_experiment_is_named_as_such_in_a_run_on_its_own(section: str) -> None:
    with pytest.raises(InputError, match=f"^{section}: belongs to an experiment, a file with `vary:`"):
        load({"task": "cola", section: {}}, [], SCHEMA)


# --- what is no configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!int x", "line 1: not valid YAML: 'x' cannot be read as int"),
        ("!!bool maybe", "line 1: not valid YAML: 'maybe' cannot be read as bool"),
        ("!!timestamp soon", "line 1: not valid YAML: 'soon' cannot be read as timestamp"),
        ("!!binary é", "line 1: not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "line 1: not valid YAML: could not determine a constructor"),
        ("2020-13-45", "line 1: not valid YAML: '2020-13-45' cannot be read as timestamp"),
        ("9" * 5_000, "line 1: not valid YAML: a number of 5,000 characters"),
        ("59:" * 1_000 + "1", "line 1: not valid YAML: a number of 3,001 characters"),
        ("[" * 500, "line 1: not valid YAML: nested deeper than 50 levels"),
        ("- " * 500, "line 1: not valid YAML: nested deeper than 50 levels"),
        ("{a: " * 500, "line 1: not valid YAML: nested deeper than 50 levels"),
        ("&a [*a]", "line 1: not valid YAML: an alias stands within what it stands for"),
        ("&a {b: [*a]}", "line 1: not valid YAML: an alias stands within what it stands for"),
        ("*a", "line 1: not valid YAML: found undefined alias"),
        (f"[{'1,' * 60_000}]", "line 1: not valid YAML: more than 50,000 values"),
        ("x" * (LONGEST + 1), "1,000,001 characters of YAML: no configuration has more than 1,000,000"),
        ("{2020-01-01: 1}", "the key datetime.date(2020, 1, 1) is no text: put it in quotes"),
        ("{on: 1}", "the key True is no text: put it in quotes"),
        ("{[1]: 1}", "line 1: not valid YAML: found unhashable key"),
        ("!!set 0x", "line 1: not valid YAML: expected a mapping node, but found scalar"),
        ("!!set {a, b}", "is a set: expected text, numbers, lists or keys"),
        ("!!binary aGFsbG8=", "b'hallo' is a bytes: expected text, numbers, lists or keys"),
        (r'"\ud800"', r"'\ud800' holds a character that no text may have"),
        (r'"a\0b"', r"'a\x00b' holds a character that no text may have"),
        (r'{"a\nb": 1}', r"'a\nb' is no key"),
        ("\udcff", "not valid YAML: unacceptable character #xdcff"),
    ],
)
def test_yaml_that_is_no_configuration_gets_one_short_line(value: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        one(f"model={value}")
    assert str(caught.value).startswith("model: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "form", ["[*{0}, *{0}, *{0}]", "{{a: *{0}, b: *{0}, c: *{0}}}", "{{<<: [*{0}, *{0}], x: *{0}}}"]
)
def test_aliases_count_as_often_as_they_stand(form: str, tmp_path: Path) -> None:
    """A file of a few hundred bytes may mean billions of values."""
    lines = ["x0: &x0 {y: z}", *(f"x{n + 1}: &x{n + 1} {form.format(f'x{n}')}" for n in range(20))]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(lines) + "\ntask: cola\nmethod: {name: lora, targets: *x20}\n")
    with pytest.raises(InputError, match="not valid YAML: more than 50,000 values"):
        load(file, [], SCHEMA)


def test_aliases_in_moderation_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: cola\nvary:\n  method: [&a {name: lora, rank: 2}, {<<: *a, alpha: 3}]\n  seed: [0, 1]\n")
    assert [(c.method["rank"], c.method["alpha"]) for c in load(file, [], SCHEMA).configs()][::2] == [(2, 16), (2, 3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"vary": {"seed": list(range(101)), "max_steps": list(range(1, 101))}},
        {"vary": {"seed": list(range(1_000)), "max_steps": list(range(1, 1_001))}},
        {"vary": {f"method.{option}": [1, 2] * 50 for option in ("rank", "alpha", "targets")}},
        {"vary": {"seed": list(range(5_001))}, "chain": [{"epochs": 1}, {"epochs": 2}]},
        {"vary": {"seed": [0], "method": [{"name": "lora", "learning_rate": [rate + 1 for rate in range(10_001)]}]}},
        {"vary": {"seed": [0]}, "tune": {"learning_rate": [n + 1 for n in range(101)], "seeds": list(range(100))}},
        {"vary": {"seed": [0]}, "tune": {"learning_rate": {"low": 1, "high": 2}, "trials": 5_000, "seeds": [0, 1, 2]}},
        {"vary": {"seed": [0], "max_length": list(range(4, 6_000))}, "tune": {"learning_rate": [1, 2]}},
    ],
)
def test_an_experiment_without_end_is_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^vary: more than {MOST_RUNS:,} runs"):
        load({"task": "cola", **settings}, [], SCHEMA)


def test_a_grid_may_be_as_large_as_is_said() -> None:
    vary = {"seed": list(range(50)), "max_steps": list(range(1, 201))}
    experiment = load({"task": "cola", "vary": vary}, [], SCHEMA)
    assert isinstance(experiment, Experiment) and len(expand(experiment)) == MOST_RUNS


@pytest.mark.parametrize("key", ["after", "followed", "tuning"])
def test_what_a_section_sets_is_no_setting_of_an_experiment(key: str) -> None:
    for given in ({key: None}, {"vary": {"seed": [0], key: [None]}}, {"chain": [{key: None}, {"epochs": 1}]}):
        with pytest.raises(InputError, match=f"^{key}: no setting of an experiment; "):
            load({**SWEEP, **given}, [], SCHEMA)


def test_no_number_is_without_bounds() -> None:
    """So that what is computed from it is finite, and an editor knows."""

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            if node.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & node.keys(), path
                assert {"maximum", "exclusiveMaximum"} & node.keys(), path
            for key, each in node.items():
                walk(each, f"{path}.{key}")
        elif isinstance(node, list):
            for each in node:
                walk(each, path)

    walk(json_schema(Schema(methods.registry(), tasks.registry())), "")
    walk(json_schema(Schema(runners.registry(), {})), "")


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
