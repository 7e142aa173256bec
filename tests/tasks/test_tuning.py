"""Rows to choose a learning rate by: apart from those trained on, and the same for every run."""

from dataclasses import replace

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise import tasks
from rankwise.errors import InputError
from rankwise.tasks import Split, subset
from rankwise.tasks.classification import Classification
from rankwise.tasks.segmentation import Segmentation


class Words(Classification):
    """Rows of two texts; the name of the first is all that tells them apart."""

    name = "words"
    text = ("a", "b")
    labels = ("no", "yes")
    main = "accuracy"

    def train(self) -> Split:
        raise AssertionError("tuning is given its rows")

    def evaluation(self) -> list[Split]:
        raise AssertionError("the rows to evaluate on are not looked at")


def split(texts: list[int]) -> Split:
    columns = {"a": [f"text {n}" for n in texts], "b": ["same"] * len(texts), "label": [0] * len(texts)}
    return Split("train", Dataset.from_dict({**columns, "idx": list(range(len(texts)))}), True)


TEXTS = st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda texts: len(set(texts)) > 1)


@given(TEXTS, st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=60)
def test_the_parts_are_disjoint_and_all_and_share_no_text(texts: list[int], share: float) -> None:
    whole = split(texts)
    rest, held = Words().tuning(whole, share)
    assert sorted(rest.data["idx"][:] + held.data["idx"][:]) == whole.data["idx"][:]
    assert not set(rest.data["a"]) & set(held.data["a"])
    assert len(rest.data) >= 1 and len(held.data) >= 1
    # as many as asked for, and less than one group more; or all groups but one
    largest = max(texts.count(text) for text in texts)
    assert len(held.data) < max(1, round(share * len(texts))) + largest
    assert len(held.data) >= round(share * len(texts)) or len(set(rest.data["a"])) == 1
    again = Words().tuning(whole, share)
    assert [part.data["idx"][:] for part in again] == [rest.data["idx"][:], held.data["idx"][:]]


@given(TEXTS, st.data())
@settings(deadline=None, max_examples=60)
def test_rows_that_training_leaves_have_new_texts_and_all_of_training_stays(
    texts: list[int], data: st.DataObject
) -> None:
    whole = split(texts)
    trained = data.draw(st.integers(1, len(texts)))
    train = subset(whole, trained)
    other = set(whole.data["a"]) - set(train.data["a"])
    count = data.draw(st.integers(1, len(other) + 1))
    if count > len(other):
        told = (
            f"train has {len(other)} different inputs"
            if other
            else "all rows of train, or others with the same input, are trained on"
        )
        with pytest.raises(InputError, match=f"tune.rows = {count}: {told}"):
            Words().tuning(whole, count, trained)
        return
    rest, held = Words().tuning(whole, count, trained)
    assert rest.data["idx"][:] == train.data["idx"][:]
    assert set(held.data["a"]) <= other and len(set(held.data["a"])) == count
    # every row of a text that is held out
    assert len(held.data) == sum(f"text {text}" in set(held.data["a"]) for text in texts)
    assert [part.data["idx"][:] for part in Words().tuning(whole, count, trained)] == [
        rest.data["idx"][:],
        held.data["idx"][:],
    ]


def test_more_rows_to_choose_by_contain_fewer() -> None:
    whole = split(list(range(40)))
    few, many = (set(Words().tuning(whole, count, 10)[1].data["idx"]) for count in (5, 20))
    assert few < many


def test_without_train_rows_nothing_is_left_to_choose_by() -> None:
    with pytest.raises(
        InputError, match="all rows of train, .*, are trained on; set train_rows to fewer than these 20"
    ):
        Words().tuning(split(list(range(20))), 5)
    same = split([1] * 10)  # whichever row is trained on, the others have its text
    with pytest.raises(InputError, match="all rows of train, or others with the same input, are trained on"):
        Words().tuning(same, 1, 1)


def test_a_number_of_rows_of_those_that_a_task_has_for_this() -> None:
    class Apart(Words):
        name = "apart"

        def apart(self) -> Split:
            return replace(split([20, 20, 21, 22]), name="validation")

    whole = split(list(range(20)))
    rest, held = Apart().tuning(whole, 2, 10)
    assert rest.data["idx"][:] == subset(whole, 10).data["idx"][:]
    assert held.name == "validation" and len(set(held.data["a"])) == 2
    with pytest.raises(InputError, match="validation has 3 different inputs that are not trained on"):
        Apart().tuning(whole, 4)


def test_what_is_held_out_says_so_and_is_named_apart() -> None:
    rest, held = Words().tuning(split(list(range(20))), 0.1)
    assert (rest.name, held.name, rest.official, held.official) == ("train", "train_held_out", False, False)
    assert (rest.note, held.note) == ("18 of 20 rows, without those held out", "2 of 20 rows, held out")
    part, _ = Words().tuning(split(list(range(20))), 0.1, 10)
    assert part.note == "10 of 20 rows, drawn with seed 0; 9 of 10 rows, without those held out"
    part, other = Words().tuning(split(list(range(20))), 5, 10)
    assert part.note == "10 of 20 rows, drawn with seed 0"
    assert (other.name, other.official, other.note) == (
        "train_held_out",
        False,
        "5 of 20 rows, none of them trained on",
    )


def test_two_texts_that_differ_in_one_column_are_different() -> None:
    columns = {"a": ["x", "x"], "b": ["one", "other"], "label": [0, 1], "idx": [0, 1]}
    rest, held = Words().tuning(Split("train", Dataset.from_dict(columns), True), 0.5)
    assert len(rest.data) == len(held.data) == 1


def test_equal_images_stay_together() -> None:
    class Pictures(Segmentation):
        name = "pictures"
        labels = ("none", "some")
        train = evaluation = Words.train

    columns = {"image": [b"one", b"two", b"one", b"two"], "mask": [b"a", b"b", b"c", b"d"], "idx": [0, 1, 2, 3]}
    rest, held = Pictures().tuning(Split("train", Dataset.from_dict(columns), True), 0.25)
    assert sorted([sorted(rest.data["idx"]), sorted(held.data["idx"])]) == [[0, 2], [1, 3]]


def test_too_little_to_choose_by_is_refused() -> None:
    with pytest.raises(InputError, match="too few rows to hold some out"):
        Words().tuning(split([1, 1, 1]), 0.5)
    with pytest.raises(InputError, match="ax has no score to choose a learning rate by"):
        tasks.build("ax").tuning(split([1, 2]), 0.5)


def test_a_task_of_docstrings_never_shares_a_line_with_what_is_reported() -> None:
    task = tasks.build("stdlib-kind")
    rest, held = task.tuning(task.train(), 0.1, 400)
    (reported,) = task.evaluation()
    assert not (set(rest.data["line"]) | set(held.data["line"])) & set(reported.data["line"])
    assert len(held.data) == 40
