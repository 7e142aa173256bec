from typing import Any

import pytest

import rankwise
from rankwise.config import Experiment, RunConfig
from rankwise.runs.grid import expand, run_id


def test_all_of_one_seed_come_before_the_next_and_nothing_comes_twice() -> None:
    vary: dict[str, list[Any]] = {"method": ["lora", "head", "lora"], "seed": [1, 0]}
    runs = expand(Experiment(name="x", base={"task": "cola"}, vary=vary, runs="r"))
    assert [(run.seed, run.method["name"]) for run in runs] == [(0, "lora"), (0, "head"), (1, "lora"), (1, "head")]


def test_the_id_is_of_what_is_run_and_not_of_where(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(task="cola")
    name = run_id(config, "revision")
    assert len(name) == 12
    assert int(name, 16) >= 0
    assert run_id(RunConfig(task="cola", runs="elsewhere"), "revision") == name
    different = [
        run_id(config, "another revision"),
        run_id(RunConfig(task="mrpc"), "revision"),
        run_id(RunConfig(task="cola", seed=1), "revision"),
        run_id(RunConfig(task="cola", method={"name": "lora", "rank": 4}), "revision"),
    ]
    monkeypatch.setattr(rankwise, "__version__", "999")
    different.append(run_id(config, "revision"))
    assert len({name, *different}) == 6
