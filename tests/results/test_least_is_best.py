"""With a metric of which less is better the lower score wins, as the higher one does with its negative."""

from pathlib import Path
from typing import Any

import pytest

from rankwise.api import report
from rankwise.results.columns import best_of, scores
from rankwise.results.contrasts import contrasts
from rankwise.results.rows import best, summarise
from rankwise.results.summary import LORA, Summary
from rankwise.runs.store import Store
from rankwise.settings import Contest, RunConfig, Tune
from rankwise.sweep.tune import RateSearch
from runs import config, finish

METHODS: dict[str, dict[str, Any]] = {
    "head": {"name": "head"},
    "lora rank=4": {"name": "lora", "rank": 4, "alpha": 16.0},
    "sora rank=4": {"name": "sora", "rank": 4, "alpha": 16.0},
}
ERRORS = {("head", 1e-3): 3.0, ("lora rank=4", 1e-4): 1.0, ("lora rank=4", 1e-3): 2.0, ("sora rank=4", 1e-3): 0.5}
SCORES = ["mean_absolute_error", "r2"]


def scored(score: str, error: float) -> dict[str, Any]:
    """The part of a result with an error as its score, or with 1 - error, of which more is better."""
    return {"score": score, "metrics": {score: error if score == "mean_absolute_error" else 1 - error}}


@pytest.fixture(params=SCORES)
def score(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def store(tmp_path: Path, score: str) -> Store:
    store = Store(tmp_path)
    for seed in range(3):
        for (method, rate), error in ERRORS.items():
            of = config(method=METHODS[method], seed=seed, learning_rate=rate)
            finish(store, of, 0.0, **scored(score, error + seed / 100))
    return store


def test_the_best_rate_has_the_least_error(store: Store) -> None:
    found = {row.method: row.learning_rate for row in best(summarise(store.results()))}
    assert found == {"head": 1e-3, "lora rank=4": 1e-4, "sora rank=4": 1e-3}


def test_the_least_error_is_in_bold(store: Store) -> None:
    rows = best(summarise(store.results()))
    main = next(column for column in scores(rows) if column.metric)
    assert [row.method for row in best_of(main, rows)] == ["sora rank=4"]
    text = report(store.folder).table("md", bold=True)
    (line,) = [line for line in text.splitlines() if "**" in line]
    assert "sora" in line


def test_the_head_is_behind_where_its_error_is_larger(store: Store, score: str) -> None:
    head, sora = (each.sentence() for each in contrasts(best(summarise(store.results())), LORA))
    direction = " (lower is better)" if score == "mean_absolute_error" else ""
    assert head.startswith(f"cola, {score}{direction}: training the head only is 2.000 behind lora rank=4 (")
    sign = "-" if direction else "+"
    assert sora.startswith(f"cola, {score}{direction}: sora rank=4 against lora rank=4: {sign}0.500 (")


def test_the_head_is_measured_against_the_lora_of_the_least_error(tmp_path: Path, score: str) -> None:
    store = Store(tmp_path / "sizes")
    for rank, error in ((2, 0.4), (4, 0.2), (8, 0.3)):
        for seed in range(2):
            method = {"name": "lora", "rank": rank, "alpha": 16.0}
            finish(store, config(method=method, seed=seed), 0.0, **scored(score, error))
            finish(store, config(method=METHODS["head"], seed=seed), 0.0, **scored(score, 0.9))
    found = contrasts(best(summarise(store.results())), LORA)
    assert [each.theirs.method for each in found if each.ours.method == "head"] == ["lora rank=4"]


@pytest.mark.parametrize("rates", [[1e-4, 1e-3, 1e-2], {"low": 1e-5, "high": 1e-1}])
def test_tuning_chooses_the_rate_of_the_least_error(tmp_path: Path, score: str, rates: Any) -> None:
    """A range is searched by the same rates whichever sign the score has."""
    tried: dict[str, list[float]] = {}
    chosen = {}
    for each in SCORES:
        store = Store(tmp_path / each)
        tune = Tune(learning_rate=rates, trials=None if isinstance(rates, list) else 12)
        contest = Contest({"task": {"name": "cola"}, "method": METHODS["lora rank=4"]}, tune.rates(), tune, (0,))
        search = RateSearch(store, contest, store.place)
        while left := search.left():
            for folder in left:
                of: RunConfig = search.configs[folder]
                finish(store, of, 0.0, **scored(each, abs(of.learning_rate - 9e-4)))
            search.go_on()
        tried[each] = [of.learning_rate for of in search.configs.values()]
        chosen[each] = search.rate
    assert len(set(map(tuple, tried.values()))) == 1 and len({*chosen.values()}) == 1
    assert chosen[score] == min(tried[score], key=lambda rate: abs(rate - 9e-4))


def test_the_text_says_that_lower_is_better(store: Store, score: str) -> None:
    text = Summary.of_store(store).text()
    head = "mean_absolute_error (lower is better)" if score == "mean_absolute_error" else "r2"
    assert f"cola: {head} on 50 rows of validation" in text
    assert ("(lower is better)" in text) == (score == "mean_absolute_error")
    page = report(store.folder).write_page().read_text()
    assert ("mean_absolute_error (lower is better)" in page) == (score == "mean_absolute_error")


def test_chosen_on_the_rows_reported_an_error_is_too_low(store: Store, score: str) -> None:
    way = "low" if score == "mean_absolute_error" else "high"
    assert f"scores are slightly too {way}; use `tune:` to avoid this" in "\n".join(report(store.folder).notes)
