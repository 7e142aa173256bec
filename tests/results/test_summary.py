import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, r2_score, recall_score, root_mean_squared_error

import bootstrap
from rankwise.metrics.metric import Interval
from rankwise.results.contrasts import verdict
from rankwise.results.formats import duration, plus_minus, size
from rankwise.results.rows import Always
from rankwise.results.stats import Difference, corrected
from rankwise.results.summary import Summary
from rankwise.runs.search import Search
from rankwise.runs.store import Store
from runs import config, finish, one_answer, predict

HEAD = {"name": "head"}
SIMPLEX = {"name": "simplex-lora", "rank": 4, "every": 10}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def summary(store: Store, **reference: Any) -> Summary:
    return Summary(store.results(), {"report": {"reference": reference}})


def three_methods(store: Store) -> None:
    for seed, noise in enumerate((0.0, 0.01, -0.02)):
        finish(store, config(seed=seed), 0.80 + noise)
        finish(store, config(seed=seed, method=SIMPLEX), 0.81 - noise)
        finish(store, config(seed=seed, method=HEAD), 0.60 + noise + seed * 0.001)


def test_findings_say_how_far_the_head_is_behind_and_whether_methods_differ(store: Store) -> None:
    three_methods(store)
    head, simplex = summary(store).verdicts
    assert head.startswith("cola, accuracy: training the head only is 0.199 behind lora rank=4 (95 % intervals: -0.20")
    assert head.endswith(
        "over 3 seeds, none over the examples): a difference at n = 3, also after Holm's correction over 2 comparisons."
    )
    assert simplex.startswith("cola, accuracy: simplex-lora rank=4 against lora rank=4: +0.017")
    assert simplex.endswith(": 3 seeds cannot tell these two apart; that does not mean they are equal.")


def test_the_model_as_it_comes_is_measured_against_the_best_reference(store: Store) -> None:
    for seed in range(3):
        for rank, score in ((2, 0.7), (4, 0.8)):
            finish(store, config(seed=seed, method={"name": "lora", "rank": rank}), score + seed / 100)
        nothing = {"trainable": 0, "final": 0, "budget": 0, "head": 0}
        finish(store, config(seed=seed, method={"name": "none"}), 0.3, parameters=nothing)
    [floor] = [each for each in summary(store).verdicts if "as it comes" in each]
    assert floor.startswith("cola, accuracy: the model as it comes is 0.510 behind lora rank=4 (95 % intervals: -0.53")
    row = next(line for line in summary(store).text().splitlines() if line.startswith("none"))
    assert row.split()[:2] == ["none", "3"]  # no learning rate


APART = [("model", "random-bert", "random-gpt2"), ("epochs", 1.0, 9.0), ("train_rows", 10, 99), ("warmup", 0.0, 9.0)]
APART += [("task", {"name": "cola", "max": 1}, {"name": "cola", "max": 2})]  # whose labels are the same


@pytest.mark.parametrize(("key", "one", "other"), APART)
def test_what_is_compared_differs_in_its_method_alone(key: str, one: Any, other: Any, store: Store) -> None:
    """LoRA is as large under both settings, and far apart, which is no method's merit."""
    for seed in range(3):
        for value, score in ((one, 0.5), (other, 0.9)):
            finish(store, config(seed=seed, **{key: value}), score + seed / 100)
            finish(store, config(seed=seed, method=SIMPLEX, **{key: value}), score + seed / 90)
    contrasts = summary(store).contrasts
    assert [each.gap.mean for each in contrasts] == pytest.approx([(1 / 90 - 1 / 100)] * 2)
    assert all("cannot tell these two apart" in each.sentence() for each in contrasts)


def test_what_differs_in_more_than_its_method_is_not_compared(store: Store) -> None:
    for seed in range(3):
        finish(store, config(seed=seed, epochs=1.0), 0.5)
        finish(store, config(seed=seed, epochs=9.0, method=SIMPLEX), 0.9)
    assert not summary(store).contrasts


def test_a_warm_up_of_its_own_does_not_keep_a_method_from_being_compared(store: Store) -> None:
    finish(store, config(warmup=3.0), 0.5)
    finish(store, config(warmup=5.0, method=SIMPLEX), 0.9)
    assert len(summary(store).contrasts) == 1


def test_a_verdict_says_what_may_be_claimed_and_no_more() -> None:
    apart, same = Difference(3, 0.1, (0.08, 0.12), p=0.03), Difference(2, 0.1, (-0.1, 0.3), p=0.2)
    equal = Difference(2, 0.1, (0.1, 0.1), p=0.5)
    assert [verdict(each) for each in corrected([apart])] == ["a difference at n = 3"]
    assert [verdict(each) for each in corrected([apart, same, equal])] == [
        "with 3 seeds this gap would count if it were the only comparison; there are 3, so it is not certain: "
        "add seeds",
        "2 seeds cannot tell these two apart; that does not mean they are equal",
        "2 seeds cannot tell these two apart; that does not mean they are equal: a gap that is the same at so few "
        "seeds has no spread to judge by",
    ]


def test_the_users_own_rows_are_named_once_and_not_as_a_warning(store: Store) -> None:
    file = "your file that were "
    train = {"name": "train", "rows": 549, "official": False, "note": "", "own": f"{file}not held out"}
    held = {"name": "validation", "rows": 61, "official": False, "note": "", "own": f"{file}held out of training"}
    finish(store, config(), 0.5, splits={"train": train, "evaluation": [held]})
    found = summary(store)
    assert found.text().startswith("cola: accuracy, scored on 61 rows of your file that were held out of training\n")
    assert not found.notes
    train["note"], held["note"] = "100 of 549 rows", "40 of 61 rows"
    finish(store, config(), 0.5, splits={"train": train, "evaluation": [held]})
    found = summary(store)
    assert "held out of training (40 of 61 rows)\n" in found.text()
    assert found.notes == ["cola: trained on rows of your file that were not held out (100 of 549 rows)."]


def test_one_seed_shows_nothing(store: Store) -> None:
    finish(store, config(), 0.9)
    finish(store, config(method=HEAD), 0.1)
    (sentence,) = summary(store).verdicts
    assert sentence.endswith("0.800 behind lora rank=4. One seed shows nothing; use at least three.")


def test_the_bootstrap_joins_in_where_predictions_of_the_same_rows_are_there(store: Store) -> None:
    three_methods(store)
    labels = [0, 1] * 20
    for result in store.results():
        right = {"lora": 32, "simplex-lora": 32, "head": 24}[result.method]
        predict(result.folder, labels[:right] + [1 - label for label in labels[right:]], labels)
    first = summary(store)
    assert all("over the examples" in sentence for sentence in first.verdicts)
    assert first.verdicts == summary(store).verdicts
    predict(store.results()[0].folder, [1], [1])
    assert any("none over the examples" in sentence for sentence in summary(store).verdicts)


def test_the_bootstrap_draws_scores_of_examples_where_there_are_such(store: Store) -> None:
    three_methods(store)
    for result in store.results():
        worth = {"lora": 0.5, "simplex-lora": 0.5, "head": 0.25}[result.method]
        predict(result.folder, [0] * 40, [-1] * 40, scores=[worth] * 40)
    examples = {each.ours.name: each.gap.examples for each in summary(store).contrasts}
    assert examples == {"simplex-lora": (0.0, 0.0), "head": (-0.25, -0.25)}


RIGHT = {"lora": [6, 2, 7], "simplex-lora": [6, 2, 7], "head": [1, 2, 4]}
"""Pixels of each of three images that a method finds, of 8."""


def test_the_bootstrap_of_a_whole_sets_score_draws_the_statistics_of_its_examples(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        for method in (config().method, SIMPLEX, HEAD):
            of = config(seed=seed, method=method)
            folder = finish(store, of, 0, score="dice", metrics={"dice": sum(RIGHT[method["name"]]) / 24 + seed / 100})
            found = [[right, 0, 0, 8 - right] for right in RIGHT[method["name"]]]
            predict(folder, [0] * 3, [-1] * 3, statistics=found)

    def examples() -> dict[str, Interval | None]:
        return {each.ours.name: each.gap.examples for each in Summary(store.results()).contrasts}

    before = examples()
    assert before["simplex-lora"] == (0.0, 0.0)
    head, lora = (np.array(RIGHT[name]) for name in ("head", "lora"))
    by_hand = bootstrap.by_hand(lambda right, _: 2 * right.sum() / (right.sum() + 24), [head], [lora], np.arange(3))
    assert before["head"] == pytest.approx(by_hand)
    with monkeypatch.context() as without:
        without.setattr("rankwise.metrics.bootstrap.METRICS", {})
        assert examples() == {"simplex-lora": None, "head": None}
    folder = next(result.folder for result in store.results() if result.method == "head")
    for columns in ({"idx": [1, 0, 2]}, {"statistics": [[0] * 8] * 3}, {"score": [0.5] * 3}):
        predict(folder, [0] * 3, [-1] * 3, **{"statistics": [[8, 0, 0, 0]] * 3, **columns})
        assert examples() == {**before, "head": None}
    predict(folder, [0] * 3, [-1] * 3)  # as runs of before were written
    assert examples() == {**before, "head": None}


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("f1_macro", lambda given, true: f1_score(true, given, average="macro", zero_division=0)),
        ("recall_weighted", lambda given, true: recall_score(true, given, average="weighted", zero_division=0)),
        ("root_mean_squared_error", lambda given, true: root_mean_squared_error(true, given)),
        ("r2", lambda given, true: r2_score(true, given)),
    ],
)
def test_the_bootstrap_is_of_the_metric_that_the_runs_are_compared_by(name: str, score: Any, store: Store) -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(30) % 5 % 4
    answers: dict[str, list[np.ndarray]] = {"head": [], "lora": []}
    for seed in range(2):
        for method, right in ((HEAD, 0.5), (config().method, 0.8)):
            given = np.where(draw.random(30) < right, labels, draw.integers(0, 5, 30))
            answers[method["name"]].append(given)
            folder = finish(
                store, config(seed=seed, method=method), 0, score=name, metrics={name: score(given, labels)}
            )
            predict(folder, given.tolist(), labels.tolist())
    with bootstrap.few():
        (contrast,) = Summary(store.results()).contrasts
        by_hand = bootstrap.by_hand(score, answers["head"], answers["lora"], labels)
    assert contrast.gap.examples == pytest.approx(by_hand, abs=1e-12)


def test_another_method_may_be_the_one_to_measure_against(store: Store) -> None:
    starts = {"kaiming": 0.5, "svd": 0.6}
    for init, score in starts.items():
        for rank in (4, 16):
            finish(store, config(method={"name": "lora-fa", "init": init, "rank": rank}), score)
    assert not summary(store).contrasts
    assert any(
        "nothing is compared, because no lora ran with the same settings" in note for note in summary(store).notes
    )
    contrasts = summary(store, name="lora-fa", init="kaiming").contrasts
    pairs = {(each.ours.method, each.theirs.method) for each in contrasts}
    assert pairs == {(f"lora-fa init=svd rank={rank}", f"lora-fa init=kaiming rank={rank}") for rank in (4, 16)}
    note = summary(store, name="lora-fa", init="none").notes[-1]
    assert "no lora-fa init=none ran with the same settings" in note


def test_a_single_method_has_nothing_to_be_compared_with_and_nothing_is_said(store: Store) -> None:
    finish(store, config(method=SIMPLEX), 0.5)
    assert not any("nothing is compared" in note for note in summary(store).notes)


def test_a_method_is_measured_against_lora_at_the_nearest_budget(store: Store) -> None:
    for rank, score in ((2, 0.5), (4, 0.6), (16, 0.7)):
        finish(store, config(method={"name": "lora", "rank": rank}), score)
    finish(store, config(method=SIMPLEX), 0.6)
    finish(store, config(method=HEAD), 0.4)
    against = {each.ours.name: each.theirs.method for each in summary(store).contrasts}
    assert against == {"simplex-lora": "lora rank=4", "head": "lora rank=16"}


def test_a_method_without_ranks_is_measured_against_lora_at_the_nearest_size(store: Store) -> None:
    for rank in (1, 4, 16):
        finish(store, config(method={"name": "lora", "rank": rank}), 0.8)
    parameters = {"trainable": 4_200, "final": 4_200, "budget": 0, "head": 770}
    finish(store, config(method={"name": "adapter-h", "size": 4}), 0.7, parameters=parameters)
    [contrast] = summary(store).contrasts
    assert contrast.theirs.method == "lora rank=4"
    assert contrast.ours.budget == 4_200  # it may spend what it trains


def test_the_text_holds_all_that_a_row_has_to_carry(store: Store) -> None:
    three_methods(store)
    finish(store, config(learning_rate=0.5), 0.1)
    text = summary(store).text()
    assert "cola: accuracy on 50 rows of validation" in text
    line = next(line for line in text.splitlines() if line.startswith("lora rank=4"))
    assert line.split() == [
        *("lora", "rank=4", "0.001", "3", "0.797", "±", "0.015", "0.759", "…", "0.835"),
        *("0.398", "±", "0.008", "4,000", "4,036", "3,992", "770"),
    ]
    costs = [line for line in text.splitlines() if line.startswith("lora rank=4")][1]
    assert costs.split() == ["lora", "rank=4", "1.5", "GiB", "1", "min", "31", "s", "40.0", "2.0", "KiB"]
    assert "Rates were chosen on the rows reported, so scores are slightly too high; use `tune:` to avoid this." in text


def test_a_split_that_is_not_official_is_marked_and_explained(store: Store) -> None:
    whole = {"name": "train", "rows": 100, "official": True, "note": ""}
    splits = {"train": whole, "evaluation": [{"name": "part", "rows": 9, "official": False, "note": "9 of 10 rows"}]}
    finish(store, config(), 0.5, splits=splits)
    text = summary(store).text()
    assert "cola *: accuracy on 9 rows of part" in text
    assert "cola *: part is not the official split: 9 of 10 rows." in text
    assert "train is not" not in text


def test_training_on_some_rows_only_is_marked_although_the_split_scored_is_official(store: Store) -> None:
    some = {"name": "train", "rows": 9, "official": False, "note": "9 of 100 rows, drawn with seed 0"}
    whole = {"name": "validation", "rows": 50, "official": True, "note": ""}
    finish(store, config(train_rows=9), 0.5, splits={"train": some, "evaluation": [whole]})
    text = summary(store).text()
    assert "cola *: accuracy on 50 rows of validation" in text
    assert "cola *: train is not the official split: 9 of 100 rows, drawn with seed 0." in text


def test_the_json_is_plain_and_holds_no_path(store: Store) -> None:
    three_methods(store)
    text = json.dumps(summary(store).as_json(), allow_nan=False)
    assert str(store.folder) not in text
    content = json.loads(text)
    assert [row["method"] for row in content["best"]] == ["head", "lora rank=4", "simplex-lora rank=4"]
    assert {each["method"]: each["shown"] for each in content["differences"]} == {
        "head": True,
        "simplex-lora rank=4": False,
    }


def test_nothing_finished_makes_an_empty_text() -> None:
    assert Summary([]).text() == ""


def test_sizes_and_times_for_people() -> None:
    assert [size(count) for count in (0, 1023, 2048, 700 * 1024, 1.25 * 1024**2, 3 * 1024**3)] == [
        *("0 B", "1023 B", "2.0 KiB", "700 KiB", "1.2 MiB", "3.0 GiB")
    ]
    assert [duration(seconds) for seconds in (0.4, 59.6, 3599, 7500)] == [
        "0 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 5 min",
    ]
    assert (plus_minus(0.5, 0.01), plus_minus(0.5, None), plus_minus(None, None)) == ("0.500 ± 0.010", "0.500", "")


def test_a_note_says_what_the_searches_of_a_method_have_come_to(store: Store) -> None:
    for seed, changed in enumerate((9, 0)):
        search = Search(changed, 36, changed / 5, "ω", "ranks", "" if changed else "raise T")
        finish(store, config(seed=seed, method=SIMPLEX), 0.8, search=asdict(search))
        finish(store, config(seed=seed), 0.8)
    found = summary(store)
    [note] = [note for note in found.notes if "sites" in note]
    assert note == (
        "cola, simplex-lora rank=4: ranks changed at 9, 0 of 36 sites (seeds 0, 1), and ω moved by up to 1.80, 0.00 "
        "ranks: the result is that of plain LoRA at seed 1; raise T."
    )
    assert note in found.text()
    [row] = [row for row in found.as_json()["best"] if row["name"] == "simplex-lora"]
    assert [each["changed"] for each in row["searches"].values()] == [9, 0]
    json.dumps(found.as_json())


def test_one_answer_to_all_rows_is_said_with_its_runs_and_beside_what_it_always_scores(store: Store) -> None:
    more = one_answer(count=30, share=0.6)
    for seed in (0, 1, 2):
        finish(store, config(seed=seed), 0.5, answers=[one_answer() if seed else more, one_answer("no", split="other")])
    finish(store, config(method={"name": "head"}), 0.5)  # of before
    found = Summary(store.results())
    notes = [note for note in found.notes if "nothing was learnt" in note]
    assert notes == [
        f"cola: lora rank=4, {where}: nothing was learnt."
        for where in (
            "seeds 0, 1, 2, on other: all 50 answers are 'no', and the commonest class is 'yes'",
            "seeds 1, 2, on validation: all 50 answers are 'yes', the commonest class",
        )
    ]
    (lora,) = (row for row in found.best if row.name == "lora")
    assert lora.always == Always("yes", 0.5) and lora.share == pytest.approx((0.6 + 1 + 1) / 3)
    assert "cola: accuracy on 50 rows of validation; always answering 'yes' scores 0.500" in found.text()
    assert json.dumps(found.as_json())


def test_classes_that_are_equally_common_are_named_together(store: Store) -> None:
    finish(
        store,
        config(),
        0.5,
        answers=[one_answer(tied=["no", "maybe", "?"]), one_answer("x", split="other", tied=["no"])],
    )
    found = summary(store)
    assert "always answering one of the most frequent classes ('yes', 'no' and 2 more) scores 0.500" in found.text()
    assert found.as_json()["rows"][0]["always"] == {"class": "yes", "score": 0.5, "tied": ["no", "maybe", "?"]}
    notes = " ".join(found.notes)
    assert "all 50 answers are 'yes', one of the commonest classes, 'yes', 'no' and 2 more: nothing was learnt" in notes
    assert "all 50 answers are 'x', and the commonest classes are 'yes' and 'no': nothing was learnt" in notes


def test_an_average_says_what_the_commonest_classes_would_score(store: Store) -> None:
    for task, score in (("cola", 0.0), ("rte", 0.52)):
        benchmark = {"name": "GLUE", "score": 0.6, "majority": score}
        finish(store, config(task=task), 0.6, benchmark=benchmark)
    text = Summary(store.results()).text()
    assert "average over 2 tasks (cola, rte); always answering the most frequent class of each scores 0.260" in text
