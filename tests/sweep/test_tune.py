"""Rates tried on some rows, the chosen ones run for real; killed between and played through again."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

import warm
from rankwise.errors import InputError
from rankwise.results.rows import best, summarise
from rankwise.results.stats import mean
from rankwise.runs.store import Store
from rankwise.settings import Contest, Span, Tune
from rankwise.sweep.clean import unneeded
from rankwise.sweep.tune import RateSearch, Rounds, rounds
from sweep_runs import tuned
from waiting import PATIENCE, wait_for


def settings(runs: Path, tune: dict[str, Any], *methods: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": "tuned",
        "base": {"task": {"name": "cola"}, "max_steps": 5, **more},
        "vary": {"seed": [0, 1], "method": [{"name": "lora"}, *methods]},
        "tune": tune,
        "runs": str(runs),
    }


def carry_out(what: Mapping[str, Any], jobs: int = 2) -> tuple[list[str], list[str], list[str], str]:
    """Names of the runs that are done, that failed, and of all, and the log."""
    process = tuned(what, "local", f"jobs={jobs}")
    out, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, log
    return *json.loads(out), log


def rates(runs: Path) -> dict[bool, set[tuple[str, float, int]]]:
    """Method, rate and seed of the runs in a folder, those that try a rate under True."""
    store = Store(runs)
    found: dict[bool, set[tuple[str, float, int]]] = {True: set(), False: set()}
    for config in map(store.config, store.folders()):
        found[config.tuning is not None].add((config.method["name"], config.learning_rate, config.seed))
    return found


@pytest.mark.large
def test_each_method_is_reported_at_its_own_best_rate(tmp_path: Path) -> None:
    head = {"name": "head", "learning_rate": [1e-2, 3e-2]}
    done, failed, shown, log = carry_out(settings(tmp_path, {"learning_rate": [1e-4, 1e-3, 5.0], "seeds": [7]}, head))
    assert rates(tmp_path) == {
        True: {("lora", 1e-4, 7), ("lora", 1e-3, 7), ("lora", 5.0, 7), ("head", 1e-2, 7), ("head", 3e-2, 7)},
        False: {("lora", 1e-3, 0), ("lora", 1e-3, 1), ("head", 1e-2, 0), ("head", 1e-2, 1)},
    }
    assert (len(done), failed, len(shown)) == (8, [], 9)  # what diverged is out of the contest and no failure
    assert "cola lora: learning rate 0.001 of 2 tried, accuracy 0.500 on 50 rows" in log
    found = {row.name: row.tuned.learning_rate for row in best(summarise(Store(tmp_path).results()))}
    assert found == {"lora": 1e-3, "head": 1e-2}

    again, failed, _, log = carry_out(settings(tmp_path, {"learning_rate": [1e-4, 1e-3, 5.0], "seeds": [7]}, head))
    assert (sorted(again), failed) == (sorted(done), []) and "trying" not in log
    assert all(len((folder / "started").read_text().splitlines()) == 1 for folder in Store(tmp_path).folders())


@pytest.mark.large
def test_a_method_that_diverges_at_every_rate_fails_alone(tmp_path: Path) -> None:
    head = {"name": "head", "learning_rate": [2.0, 5.0]}
    done, failed, _, log = carry_out(settings(tmp_path, {"learning_rate": [1e-3]}, head))
    assert (len(done), len(failed)) == (2, 2)
    assert "cola head: no rate trained to its end; try lower ones" in log


def test_a_single_rate_is_not_tried_but_reported_at_once(tmp_path: Path) -> None:
    done, failed, _, log = carry_out(settings(tmp_path, {"learning_rate": [1e-3]}, {"name": "head"}, train_rows=9))
    assert rates(tmp_path) == {True: set(), False: {(n, 1e-3, seed) for n in ("lora", "head") for seed in (0, 1)}}
    assert (len(done), failed) == (4, []) and "trying" not in log
    assert "cola lora: learning rate 0.001, the only one given" in log
    assert [row.tuned for row in best(summarise(Store(tmp_path).results()))] == [None, None]


def test_a_rate_counts_only_if_it_trains_to_its_end_at_every_seed(tmp_path: Path) -> None:
    """What fails in another way than by diverging leaves its method untuned, and the next call tries it again."""
    done, failed, _, log = carry_out(settings(tmp_path, {"learning_rate": [1e-3, 1e-2]}, train_rows=2))
    assert (done, len(failed)) == ([], 2)
    assert "cola lora: not tuned yet" in log
    assert not rates(tmp_path)[False]


def contest(tune: Tune) -> Contest:
    return Contest({"task": {"name": "cola"}, "method": {"name": "lora"}}, tune.rates(), tune, (0,))


def asked(tune: Tune, worth: Callable[[float], float | None]) -> list[list[float]]:
    """The rates of every round, for a world in which a rate is worth this; None for one that diverges."""
    found, search = [], rounds(contest(tune))
    now = next(search)
    while True:
        found.append(now)
        try:
            now = search.send({rate: score for rate in now if (score := worth(rate)) is not None})
        except StopIteration:
            return found


def low_is_good(rate: float) -> float:
    return -rate


@pytest.mark.parametrize("trials", [1, 2, 5, 12])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_range_is_tried_within_its_ends_as_often_as_asked(trials: int, at_once: int) -> None:
    tune = Tune(learning_rate={"low": 1e-5, "high": 1e-2}, trials=trials, at_once=at_once)
    found = asked(tune, low_is_good)
    assert len(found) == math.ceil(trials / at_once)
    # a rate that comes twice in one round, to three digits, is tried once
    assert all(1 <= len(each) <= at_once for each in found)
    assert sum(map(len, found[: math.ceil(trials / 2 / at_once)])) >= trials // 2
    assert all(1e-5 <= rate <= 1e-2 and rate == float(f"{rate:.3g}") for each in found for rate in each)


def test_rates_follow_from_the_seed_and_from_what_the_ones_before_were_worth() -> None:
    tune = Tune(learning_rate={"low": 1e-5, "high": 1e-2}, trials=12)
    first = asked(tune, low_is_good)
    assert asked(tune, low_is_good) == first
    assert asked(Tune(learning_rate=tune.learning_rate, trials=12, seeds=[1]), low_is_good)[0] != first[0]
    other = asked(tune, lambda rate: rate)
    assert other[:3] == first[:3] and other[3:] != first[3:]  # half are drawn, the rest follow the scores
    low, high = (mean([math.log(rate) for each in found[3:] for rate in each]) for found in (first, other))
    assert low < high


def test_a_search_goes_on_where_rates_diverge() -> None:
    tune = Tune(learning_rate={"low": 1e-5, "high": 1e-1}, trials=10)
    found = asked(tune, lambda rate: None if rate > 1e-3 else rate)
    assert sum(map(len, found)) == 10
    assert sum(map(len, asked(tune, lambda _: None))) == 10


@pytest.mark.large
def test_a_search_over_a_range_does_not_depend_on_the_number_of_jobs(tmp_path: Path) -> None:
    tune = {"learning_rate": {"low": 1e-5, "high": 1e-1}, "trials": 5, "at_once": 2, "seeds": [7]}
    for jobs in (1, 3):
        assert len(carry_out(settings(tmp_path / str(jobs), tune), jobs)[0]) == 7
    assert rates(tmp_path / "1") == rates(tmp_path / "3")
    assert len(rates(tmp_path / "1")[True]) == 5


@pytest.mark.large
def test_a_search_that_is_killed_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    tune = {"learning_rate": {"low": 1e-5, "high": 1e-1}, "trials": 5, "at_once": 2, "seeds": [7]}
    carry_out(settings(tmp_path / "whole", tune))
    cut = settings(tmp_path / "cut", tune)
    for least in (1, 3, 6):  # in the first round, in the second, among the runs that are reported
        process = tuned(cut, "local", "jobs=2")
        wait_for(lambda least=least: len(list((tmp_path / "cut").glob("*/result.json"))) >= least)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*/result.json")}
    done, failed, _, _ = carry_out(cut)
    assert (len(done), failed) == (7, [])
    assert rates(tmp_path / "cut") == rates(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == then for path, then in finished.items())


def test_a_search_can_be_looked_at_without_a_folder_being_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    tune = Tune(learning_rate=[1e-4, 1e-3], seeds=[7, 8])
    search = RateSearch(store, contest(tune), lambda config: store.place(config))
    assert len(search.left()) == len(search.configs) == 4
    assert search.chosen is None
    assert not store.folder.exists()


def test_a_range_needs_optuna_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    made: Rounds = rounds(Contest({}, Span(low=1e-4, high=1e-3), Tune(trials=1), (0,)))
    with pytest.raises(InputError, match=r"optuna is not installed: pip install .*\[tune\]"):
        next(made)


@pytest.mark.large
def test_a_real_comparison_that_is_killed_ends_tuned_and_within_its_budget(tmp_path: Path) -> None:
    runs, file = tmp_path / "runs", tmp_path / "fair.yaml"
    experiment = {
        **{"task": "stdlib-kind", "train_rows": 48, "eval_rows": 24, "max_length": 12, "batch_size": 16},
        **{"max_steps": 4, "checkpoint_every": 1, "eval_every": 1, "budget": 50_000, "runs": str(runs)},
        "tune": {"learning_rate": [1e-3, 1e-2], "rows": 30},  # more than eval_rows, which does not cut them
        "vary": {"seed": [3], "method": [{"name": "lora"}]},
    }
    file.write_text(yaml.safe_dump(experiment))
    command = [sys.executable, "-m", "rankwise", "compare", str(file), "--jobs", "1"]

    def compare(*more: str) -> subprocess.Popen[str]:
        return warm.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = compare()
    wait_for(lambda: len(list(runs.glob("*/result.json"))) == 1 and len(list(runs.glob("*/checkpoint-*"))) >= 1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (done,) = (path.read_bytes() for path in runs.glob("*/result.json"))

    second = compare("--json")
    out, log = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, log
    content = json.loads(out)
    assert len(content["done"]) == 3 and done in [path.read_bytes() for path in runs.glob("*/result.json")]
    (row,) = content["best"]
    how = row["tuned"]
    assert (row["seeds"], row["options"]["rank"], row["asked"]) == ([3], 1, 50_000)
    assert 0.8 < row["used"] <= 1
    assert (how["split"], how["rows"], how["seeds"]) == ("train_held_out", 30, [0])
    assert row["learning_rate"] == how["learning_rate"]
    assert unneeded(Store(runs)) == []  # trials that were done before the second command are part of it
    assert how["learning_rate"] == max(how["rates"], key=lambda each: each["mean"])["learning_rate"]

    store = Store(runs)
    for folder in store.folders():
        config = store.config(folder)
        assert config.method["rank"] == 1 and config.budget == 50_000
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        looked = [line["step"] for line in lines if "eval" in line]
        splits = set(pyarrow.parquet.read_table(folder / "predictions.parquet")["split"].to_pylist())
        if config.tuning is None:  # what is reported was looked at once, when all was over
            assert (looked, splits) == ([4], {"validation"})
        else:
            assert (looked, splits) == ([1, 2, 3, 4], {"train_held_out"})

    third = compare("--dry-run")
    out, log = third.communicate(timeout=PATIENCE)
    assert out.count(" done") == 3 and "3 runs in" in log and "0 to carry out" in log
