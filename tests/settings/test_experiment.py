from typing import Any

import pytest

from rankwise.errors import InputError
from rankwise.runs.grid import expand
from rankwise.settings import Contest, Experiment, Span, load
from rankwise.settings.experiment import MOST_RUNS
from small_schema import SCHEMA, SWEEP, sweep


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


CHAIN: dict[str, Any] = {**SWEEP, "chain": [{"method.rank": 4, "epochs": 5.0}, {"method.rank": 2}, {"method.rank": 1}]}
CHAIN["vary"] = {"seed": [0, 1]}


def test_each_combination_becomes_a_chain_whose_runs_name_the_one_before() -> None:
    found = load(CHAIN, [], SCHEMA)
    assert isinstance(found, Experiment)
    configs = list(found.configs)
    assert [(c.seed, c.method["rank"], c.epochs) for c in configs] == [
        *((0, 4, 5.0), (0, 2, 3.0), (0, 1, 3.0)),
        *((1, 4, 5.0), (1, 2, 3.0), (1, 1, 3.0)),
    ]
    for chain in (configs[:3], configs[3:]):
        assert [c.after for c in chain] == [None, chain[0].id, chain[1].id]
        assert [c.followed for c in chain] == [True, True, False]
    assert len({c.id for c in configs}) == 6


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


TUNED: dict[str, Any] = {
    "task": "cola",
    "tune": {"learning_rate": [1e-3, 3e-4], "seeds": [7, 8], "share": 0.2},
    "vary": {"seed": [0, 1], "method": [{"name": "lora"}, {"name": "head", "learning_rate": 0.1}]},
}


def contests(*overrides: str, **settings: Any) -> list[Contest]:
    experiment = load({**TUNED, **settings}, overrides, SCHEMA)
    assert isinstance(experiment, Experiment)
    return list(experiment.contests)


def test_a_contest_tries_its_rates_at_the_tuning_seeds_and_reports_the_others() -> None:
    lora, head = contests()
    assert (lora.rates, head.rates) == ((3e-4, 1e-3), (0.1,))
    tried, reported = lora.tried(3e-4), lora.reported(3e-4)
    assert [(run.seed, run.tuning, run.eval_every) for run in tried] == [(7, 0.2, None), (8, 0.2, None)]
    assert [(run.seed, run.tuning, run.eval_every) for run in reported] == [(0, None, 0), (1, None, 0)]
    assert {run.learning_rate for run in (*tried, *reported)} == {3e-4}
    assert {run.method["name"] for run in reported} == {"lora"}


def test_a_number_of_rows_to_choose_by_is_noted_as_such_and_small_in_a_smoke_test() -> None:
    rows = {"tune": {"learning_rate": [1e-3, 3e-4], "rows": 500}, "train_rows": 100}
    for scale, expected in (("full", 500), ("smoke", 64)):
        lora, _ = contests(**rows, scale=scale)
        assert [run.tuning for run in lora.tried(1e-3)] == [expected]
        assert isinstance(lora.tried(1e-3)[0].tuning, int)
        assert lora.reported(1e-3)[0].tuning is None
    for overrides, part in (
        (["tune.rows=null"], 0.1),
        (["tune.rows=null", "tune.share=0.3"], 0.3),
        (["tune.rows=20"], 20),
        (["tune={learning_rate: [1e-3], share: 0.3}", "tune.rows=7", "tune.share=null"], 7),
        (["tune.rows=7", "tune={learning_rate: [1e-3], share: 0.3}"], 0.3),
    ):
        lora, _ = contests(*overrides, **rows)
        assert lora.tried(1e-3)[0].tuning == part
    lora, _ = contests("tune.rows=7", "tune.share=null")  # of a file with a share
    assert lora.tried(1e-3)[0].tuning == 7


def test_the_runs_of_a_tuned_experiment_are_those_reported_each_once() -> None:
    experiment = load(TUNED, [], SCHEMA)
    assert isinstance(experiment, Experiment)
    assert [(run.method["name"], run.seed, run.tuning) for run in experiment.configs] == [
        *(("lora", 0, None), ("lora", 1, None)),
        *(("head", 0, None), ("head", 1, None)),
    ]


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
        ({"learning_rate": [1e-3], "rows": 0}, "tune.rows = 0: expected greater than or equal to 1"),
        ({"learning_rate": [1e-3], "rows": 0.2}, "tune.rows = 0.2: expected"),
        ({"learning_rate": [1e-3], "rows": 9, "share": 0.2}, "tune.share and tune.rows: .* or set it to null"),
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
    """The default rate would be a poor one for most methods."""
    plain = {**TUNED, "vary": {"seed": [0], "method": [{"name": "lora"}, {"name": "head"}]}}
    with pytest.raises(InputError, match="tune = null: give a rate instead, learning_rate=1e-3 or vary"):
        load(plain, ["tune=null"], SCHEMA)
    for rates in (["learning_rate=0.01"], ["vary.learning_rate=[0.01]"]):
        rated = load(plain, ["tune=null", *rates], SCHEMA)
        assert isinstance(rated, Experiment) and {run.learning_rate for run in rated.configs} == {0.01}
    untuned = {key: value for key, value in plain.items() if key != "tune"}
    assert load(untuned, ["tune=null"], SCHEMA) == load(untuned, [], SCHEMA)
    own = {**plain, "vary": {"method": [{"name": "lora", "learning_rate": 0.02}]}}
    rated = load(own, ["tune=null"], SCHEMA)
    assert isinstance(rated, Experiment) and {run.learning_rate for run in rated.configs} == {0.02}


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


def test_the_command_line_sets_parts_of_the_tuning() -> None:
    lora, head = contests("tune.learning_rate={low: 1e-5, high: 1e-2}", "tune.trials=4", "seed=5")
    assert lora.rates == Span(low=1e-5, high=1e-2)
    assert (head.rates, head.seeds, head.tune.trials) == ((0.1,), (5,), 4)


def test_the_command_line_does_not_change_what_a_chain_sets() -> None:
    settings = {**SWEEP, "chain": [{"epochs": 2.0}, {"method.rank": 2}]}
    for override in ("epochs=7", "method.rank=3"):
        with pytest.raises(InputError, match="the stages of the chain set it; change the file, or give chain="):
            load(settings, [override], SCHEMA)
    changed = load(settings, ["chain=[{epochs: 3}, {epochs: 4}]", "max_length=16"], SCHEMA)
    assert isinstance(changed, Experiment)
    assert {config.epochs for config in changed.configs} == {3.0, 4.0}
