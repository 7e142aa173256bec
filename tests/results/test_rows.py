import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.results.formats import plain
from rankwise.results.rows import Row, Score, averages, best, summarise
from rankwise.results.summary import Summary
from rankwise.runs.store import Store
from runs import config, finish, tune

HEAD = {"name": "head"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def rows(store: Store) -> list[Row]:
    return summarise(store.results())


def test_seeds_are_drawn_together_and_rates_kept_apart(store: Store) -> None:
    for seed, score in enumerate((0.7, 0.8, 0.9)):
        finish(store, config(seed=seed, learning_rate=1e-3), score)
    finish(store, config(seed=0, learning_rate=3e-3), 0.5)
    three, one = rows(store)
    assert (three.method, three.learning_rate, three.seeds, three.n) == ("lora rank=4", 1e-3, [0, 1, 2], 3)
    assert (three.mean, three.sd) == (pytest.approx(0.8), pytest.approx(0.1))
    assert three.scores == {0: 0.7, 1: 0.8, 2: 0.9}
    assert three.metrics["f1"] == Score(pytest.approx(0.4), pytest.approx(0.05))
    assert (three.budget, three.trainable, three.final, three.head) == (4000, 4036, 3992, 770)
    assert (three.seconds, three.examples_per_second, three.adapter_bytes) == (91.0, 40.0, 2048)
    assert three.folders[2] == store.place(config(seed=2, learning_rate=1e-3))
    assert (one.n, one.sd, one.interval) == (1, None, None)


@pytest.mark.parametrize(
    ("methods", "settings", "labels"),
    [
        ([HEAD, {"name": "lora", "rank": 4}], [{}], ["head", "lora rank=4"]),
        (
            [{"name": "lora", "rank": 4, "alpha": 8.0}, {"name": "lora", "rank": 4, "alpha": 16.0}],
            [{}],
            ["lora rank=4 alpha=8.0", "lora rank=4 alpha=16.0"],
        ),
        ([HEAD], [{"epochs": 1.0}, {"epochs": 2.0}], ["head epochs=1.0", "head epochs=2.0"]),
        (
            [{"name": "lora", "targets": ["query", "key"]}, {"name": "lora", "targets": "all-linear"}],
            [{}],
            ["lora targets=all-linear", "lora targets=query,key"],
        ),
    ],
)
def test_a_label_tells_a_method_from_its_like(
    methods: list[dict[str, Any]], settings: list[dict[str, Any]], labels: list[str], store: Store
) -> None:
    """Runs whose settings differ are never drawn together, whatever it is that differs."""
    for method in methods:
        for each in settings:
            finish(store, config(method=method, **each), 0.5)
    assert [row.method for row in rows(store)] == labels


@pytest.mark.parametrize("how", [{"micro_batch": 4}, {"packing": True}, {"activation_memory": "lean"}, {"fast": True}])
def test_runs_that_differ_only_in_the_order_of_sums_are_compared(how: dict[str, Any], store: Store) -> None:
    finish(store, config(), 0.5)
    finish(store, config(method=HEAD, **how), 0.5)
    one, other = rows(store)
    assert one.setting == other.setting


def test_the_best_rate_has_the_best_mean_among_those_with_the_most_seeds(store: Store) -> None:
    for rate, scores in ((1e-3, (0.7, 0.7)), (3e-3, (0.6, 0.9)), (1e-2, (0.99,))):
        for seed, score in enumerate(scores):
            finish(store, config(seed=seed, learning_rate=rate), score)
    finish(store, config(method=HEAD), 0.1)
    finish(store, config(task="mrpc", learning_rate=1e-3), 0.2)
    chosen = {(row.task, row.method): row.learning_rate for row in best(rows(store))}
    assert chosen == {("cola", "lora rank=4"): 3e-3, ("cola", "head"): 1e-3, ("mrpc", "lora rank=4"): 1e-3}


def test_a_benchmark_is_averaged_over_its_tasks_for_the_methods_that_have_all_of_them(store: Store) -> None:
    for seed, (cola, mrpc) in enumerate([(0.5, 0.75), (0.25, 0.75)]):
        for task, counted in (("cola", cola), ("mrpc", mrpc)):
            finish(store, config(task=task, seed=seed), 0.9, benchmark={"name": "GLUE", "score": counted})
    finish(store, config(task="cola", method=HEAD), 0.9, benchmark={"name": "GLUE", "score": 1.0})
    finish(store, config(task="wnli"), 0.9, benchmark={})
    (found,) = averages(best(rows(store)))
    assert (found.benchmark, found.tasks, found.method) == ("GLUE", ("cola", "mrpc"), "lora rank=4")
    assert found.scores == {0: 0.625, 1: 0.5}
    assert "GLUE, average over 2 tasks (cola, mrpc)" in Summary(store.results()).text()
    assert Summary(store.results()).as_json()["averages"][0]["scores"] == {0: 0.625, 1: 0.5}


def test_stages_of_chains_never_share_a_row(store: Store) -> None:
    """Two chains with the same last stages, and stages that differ in the rate or in nothing, have their own rows."""
    for epochs in (1.0, 2.0):
        for seed in (0, 1):
            before = None
            for stage in ({"epochs": epochs}, {"epochs": 1.0}, {"epochs": 1.0}, {"epochs": 1.0, "learning_rate": 0.5}):
                last = "learning_rate" in stage
                link = config(seed=seed, after=before and before.id, followed=not last, **stage)
                finish(store, link, epochs / 4 + seed / 8)
                before = link
    found = rows(store)
    assert len(found) == 8 and all(row.seeds == [0, 1] for row in found)
    assert {row.mean for row in found} == {0.3125, 0.5625}
    assert len({row.method for row in found}) == 8
    assert [sum(f"stage={n}" in row.method for row in found) for n in (1, 2, 3, 4)] == [2, 2, 2, 2]
    assert len(best(found)) == 8  # a stage's rate is no rate among which the best is chosen


def test_a_task_without_labels_has_rows_without_scores(store: Store) -> None:
    finish(store, config(task="ax"), 0.0, score="", metrics={})
    (row,) = rows(store)
    assert (row.mean, row.sd, row.interval, row.metrics) == (None, None, None, {})
    assert best([row]) == [row]


def test_rows_are_json_and_say_what_is_not_official(store: Store) -> None:
    part = {"name": "part", "rows": 9, "official": False, "note": "9 of 10 rows"}
    splits = {"train": {"name": "train", "rows": 100, "official": True, "note": ""}, "evaluation": [part]}
    finish(store, config(), 0.5, splits=splits)
    (row,) = rows(store)
    assert (row.evaluated.name, row.evaluated.rows, row.evaluated.official) == ("part", 9, False)
    assert row.evaluated.note == "9 of 10 rows"
    json.dumps(row.as_json(), allow_nan=False)


def test_no_results_make_no_rows() -> None:
    assert summarise([]) == []
    assert best([]) == []


def test_a_plain_table_ranges_numbers_right() -> None:
    assert plain(["name", "n", "text"], [["a", "1", "x"], ["bcdef", "10", "-y"]]).splitlines() == [
        "name    n  text",
        "-----  --  ----",
        "a       1  x",
        "bcdef  10  -y",
    ]


def test_runs_that_try_a_rate_make_no_row_and_say_how_it_was_chosen(store: Store) -> None:
    tune(store, {1e-4: 0.6, 1e-3: 0.8, 1e-2: 0.7}, 1e-3)
    (row,) = rows(store)
    assert (row.n, row.mean, row.method) == (2, 0.55, "lora rank=4")
    found = row.tuned
    assert (found.learning_rate, found.edge, found.split.name, found.split.rows) == (1e-3, "", "train_held_out", 9)
    assert [(rate.learning_rate, rate.mean, rate.n) for rate in found.rates] == [
        *((1e-4, 0.6, 1), (1e-3, 0.8, 1), (1e-2, 0.7, 1)),
    ]
    text = Summary(store.results()).text()
    assert "chosen on 9 rows of train_held_out" in text and "were scored once, at the end" in text
    assert "slightly too high" not in text and "might do better" not in text
    assert any(line.split()[2:] == ["0.001", "1", "0.800", "chosen"] for line in text.splitlines())


@pytest.mark.parametrize(
    ("scores", "chosen", "edge"),
    [({1e-4: 0.9, 1e-3: 0.8}, 1e-4, "lowest"), ({1e-4: 0.7, 1e-3: 0.8}, 1e-3, "highest"), ({1e-3: 0.8}, 1e-3, "")],
)
def test_a_rate_at_the_edge_is_said(scores: dict[float, float], chosen: float, edge: str, store: Store) -> None:
    tune(store, scores, chosen)
    (row,) = rows(store)
    assert row.tuned.edge == edge
    assert ("might do better" in Summary(store.results()).text()) == bool(edge)


def test_equal_rates_give_the_lowest_and_more_seeds_win(store: Store) -> None:
    tune(store, {1e-4: 0.8, 1e-3: 0.8}, 1e-4)
    assert rows(store)[0].tuned.learning_rate == 1e-4
    finish(store, config(learning_rate=1e-3, tuning=0.1, seed=8), 0.1)
    assert rows(store)[0].tuned.learning_rate == 1e-3


def test_the_row_that_tuning_chose_wins_whatever_the_others_score(store: Store) -> None:
    """Tuned anew with another rate in it, the old choice must not win by what it scores on the reported rows."""
    tune(store, {1e-4: 0.8}, 1e-4, seeds=3)
    tune(store, {1e-3: 0.9}, 1e-3, seeds=1)
    assert {row.learning_rate: row.mean for row in rows(store)}[1e-4] > 0.5
    assert [row.learning_rate for row in best(rows(store))] == [1e-3]


def test_tuning_of_another_method_or_by_another_way_is_not_taken_for_it(store: Store) -> None:
    tune(store, {1e-4: 0.8}, 1e-4)
    tune(store, {1e-2: 0.8}, 1e-2, method={"name": "lora", "rank": 8, "alpha": 16.0})
    finish(store, config(seed=3), 0.9)  # of an experiment without tuning
    found = {row.method: row.tuned and row.tuned.learning_rate for row in rows(store)}
    assert sorted(found.values(), key=str) == [0.0001, 0.01, None]


def test_a_budget_is_shown_with_what_of_it_is_used(store: Store) -> None:
    lora = {"name": "lora", "rank": 4, "alpha": 16.0}  # 4,036 parameters at its peak
    for seed in (0, 1):
        finish(store, config(method=lora, budget=4100, seed=seed), 0.8)
        finish(store, config(method={**lora, "alpha": 8.0}, budget=8200, seed=seed), 0.8)
        finish(store, config(method={"name": "head"}, seed=seed), 0.4)
    found = {row.method: (row.asked, row.used) for row in rows(store)}
    assert found == {
        "lora rank=4 alpha=16.0 budget=4100": (4100, 4036 / 4100),
        "lora rank=4 alpha=8.0 budget=8200": (8200, 4036 / 8200),
        "head": (None, None),
    }
    text = Summary(store.results()).text()
    assert "49% of the budget of 8,200 parameters are used" in text and "of the budget of 4,100" not in text
    assert "Outside the budget, because none was set or the method has no size to choose: head." in text
    (line, _) = (line for line in text.splitlines() if line.startswith("head "))
    assert line.split()[-1] == "outside"


def test_what_trains_nothing_is_outside_of_no_budget(store: Store) -> None:
    """The note that lists those outside would end with `: none`."""
    finish(store, config(budget=4100), 0.8)
    nothing = {"trainable": 0, "final": 0, "budget": 0, "head": 0}
    finish(store, config(method={"name": "none"}), 0.4, parameters=nothing)
    text = Summary(store.results()).text()
    scores, costs = (line.split() for line in text.splitlines() if line.startswith("none "))
    assert "outside" not in scores and "Outside the budget" not in text
    assert scores[:3] == ["none", "1", "0.400"] and "40.0" not in costs  # neither a rate nor a speed


def test_where_no_budget_is_set_nothing_is_outside_of_it(store: Store) -> None:
    finish(store, config(), 0.8)
    nothing = {"trainable": 0, "final": 0, "budget": 0, "head": 0}
    finish(store, config(method={"name": "none"}), 0.4, parameters=nothing)
    assert "Outside the budget" not in Summary(store.results()).text()


def test_a_budget_that_was_overspent_is_said(store: Store) -> None:
    finish(store, config(budget=4000), 0.8)
    assert "101% of the budget of 4,000 parameters, because its ranks grew" in Summary(store.results()).text()


def test_equal_seeds_have_no_interval_and_an_interval_stays_within_the_metric(store: Store) -> None:
    for seed, (same, apart) in enumerate([(0.984, 0.93), (0.984, 1.0)]):
        finish(store, config(seed=seed), same)
        finish(store, config(seed=seed, method=HEAD), apart)
    head, lora = rows(store)
    assert head.interval == (pytest.approx(0.52, abs=0.01), 1.0)
    assert lora.interval is None and lora.sd == 0.0
    text = Summary(store.results()).text()
    assert "equal at both seeds" in text and "0.984 … 0.984" not in text


@pytest.mark.parametrize(
    ("scores", "edge", "tied"),
    [
        ({1e-4: 0.9, 1e-3: 0.8}, "lowest", []),
        ({1e-4: 0.8, 1e-3: 0.9}, "highest", []),
        ({1e-4: 0.9, 1e-3: 0.9}, "", [1e-3]),
        ({1e-4: 0.7, 1e-3: 0.9, 1e-2: 0.8}, "", []),
        ({1e-4: 0.7, 1e-3: 0.9, 1e-2: 0.9}, "", [1e-2]),
    ],
)
def test_a_rate_at_the_edge_is_called_so_where_it_alone_is_best(
    scores: dict[float, float], edge: str, tied: list[float], store: Store
) -> None:
    tune(store, scores, max(scores, key=scores.__getitem__))
    (row,) = rows(store)
    assert (row.tuned.edge, row.tuned.tied) == (edge, tied)
    notes = " ".join(Summary(store.results()).notes)
    assert ("one might do better" in notes) == bool(edge) and ("scored the same" in notes) == bool(tied)
