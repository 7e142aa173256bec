from typing import Any

import pytest

import rankwise
from rankwise.runs.grid import expand
from rankwise.settings import Experiment, RunConfig


def test_all_of_one_seed_come_before_the_next_and_nothing_comes_twice() -> None:
    vary: dict[str, list[Any]] = {"method": ["lora", "head", "lora"], "seed": [1, 0]}
    runs = expand(Experiment(name="x", base={"task": "cola"}, vary=vary, runs="r"))
    assert [(run.seed, run.method["name"]) for run in runs] == [(0, "lora"), (0, "head"), (1, "lora"), (1, "head")]


def test_the_id_is_of_what_is_asked_and_not_of_where_or_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(task="cola")
    name = config.id
    assert len(name) == 12
    assert int(name, 16) >= 0
    different = [
        RunConfig(task="mrpc").id,
        RunConfig(task="cola", seed=1).id,
        RunConfig(task="cola", method={"name": "lora", "rank": 4}).id,
    ]
    assert len({name, *different}) == 4
    monkeypatch.setattr(rankwise, "__version__", "999")
    assert RunConfig(task="cola", runs="elsewhere").id == name


def test_the_stages_of_a_chain_begin_with_the_fitted_stage_before() -> None:
    vary: dict[str, list[Any]] = {"seed": [0, 1], "budget": [10, 20]}
    chain: list[dict[str, Any]] = [{"epochs": 1.0}, {"epochs": 2.0}, {"epochs": 3.0}]
    experiment = Experiment(name="x", base={"task": "cola"}, vary=vary, chain=chain, runs="r")
    runs = expand(experiment, lambda config: config.model_copy(update={"budget": None}))
    assert [(run.seed, run.epochs) for run in runs] == [(seed, epochs) for seed in (0, 1) for epochs in (1.0, 2.0, 3.0)]
    assert [run.after for run in runs] == [None, runs[0].id, runs[1].id, None, runs[3].id, runs[4].id]
