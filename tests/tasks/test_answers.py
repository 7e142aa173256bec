"""How the answers are spread, and what is said where all of them are the same."""

import json
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from rankwise import tasks
from rankwise.runs.answers import LONGEST, WRONG, Answers, undamaged
from rankwise.tasks.base import Split
from rankwise.tasks.classification import Classification
from rankwise.tasks.custom import Custom
from rankwise.tasks.generation import Generation, _answers
from rankwise.tasks.segmentation import Segmentation


def split(task: Any, labels: list[Any]) -> Split:
    texts = {column: [f"{column} {row}" for row in range(len(labels))] for column in task.text}
    return Split("validation", Dataset.from_dict({**texts, "label": labels, "idx": list(range(len(labels)))}), True)


def spread(name: str, outputs: Any, labels: list[Any]) -> Answers:
    task, outputs = tasks.build(name), np.asarray(outputs, dtype=np.float32)
    found = task.answers(split(task, labels), outputs, task.decode(outputs))
    kept = json.loads(json.dumps([found.in_result()]))
    assert [each.in_result() for each in undamaged(kept)] == kept
    return undamaged(kept)[0]


CLASSIFIERS = sorted(
    name
    for name, kind in tasks.registry().items()
    if issubclass(kind, Classification)
    and not issubclass(kind, Custom)
    and name not in ("stdlib-docs", "stdlib-module")
)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_one_answer_to_all_rows_is_said_whatever_the_task(name: str) -> None:
    """Equal by definition to the score of always answering the most common class."""
    task = tasks.build(name)
    labels = [0.0, 1.0, 5.0, 1.0] if not task.labels else [-1] * 4 if not task.main else [0, 1, 1, 1]
    outputs = [[0.3]] * 4 if not task.labels else [[0.0] + [1.0] + [0.0] * (len(task.labels) - 2)] * 4
    found = spread(name, outputs, labels)
    assert (found.total, found.count, found.share) == (4, 4, 1.0)
    if not task.labels:
        assert found.nothing_learnt == "all 4 answers are '0.3': nothing was learnt"
        assert set(found.metrics.values()) == {0.0} and found.majority == ""
    elif not task.main:
        assert found.nothing_learnt == f"all 4 answers are {task.labels[1]!r}: nothing was learnt"
    else:
        assert found.nothing_learnt == f"all 4 answers are {task.labels[1]!r}, the commonest class: nothing was learnt"
        assert found.majority == task.labels[1] and found.metrics[task.main] == (0 if name == "cola" else 0.75)
    assert set(task.averaged) <= {name + suffix for name in found.metrics for suffix in ("", "_mismatched")}


def test_other_answers_are_not_said_to_be_the_same() -> None:
    outputs = [[0, 1.0], [0, 1], [0, 1], [1, 0]]
    found = spread("rte", outputs, [0, 1, 1, 1])
    assert found.nothing_learnt == "" and (found.commonest, found.share) == ("not_entailment", 0.75)
    # the other class, rows that cannot show it, and one row alone
    assert spread("rte", [[1.0, 0]] * 4, [0, 1, 1, 1]).nothing_learnt == (
        "all 4 answers are 'entailment', and the commonest class is 'not_entailment': nothing was learnt"
    )
    assert spread("rte", [[0, 1.0]] * 4, [1] * 4).nothing_learnt.endswith(
        "and all labels are the same: these rows show nothing"
    )
    assert spread("rte", [[0, 1.0]], [1]).nothing_learnt == ""
    assert spread("stsb", [[0.1], [0.2]], [1.0, 2.0]).nothing_learnt == ""
    assert spread("stsb", [[0.1], [0.1000001]], [1.0, 2.0]).nothing_learnt.startswith("all 2 answers are '0.1'")


def test_classes_taken_for_others_are_counted_and_the_surest_mistakes_kept() -> None:
    task = tasks.build("mnli")
    labels = [0, 0, 1, 2, -1]
    outputs = np.log(np.array([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.3, 0.4, 0.3], [0.9, 0.05, 0.05], [1, 1, 1]]))
    found = task.answers(split(task, labels), outputs, task.decode(outputs)).in_detail()
    assert found["confusion"] == [(0, 0, 1), (0, 1, 1), (1, 1, 1), (2, 0, 1)]
    assert [(w["idx"], w["true"], w["given"], w["confidence"]) for w in found["wrong"]] == [
        (3, 2, 0, 0.9),
        (1, 0, 1, 0.8),
    ]
    assert found["wrong"][0]["texts"] == ["premise 3", "hypothesis 3"]


def test_what_is_kept_of_mistakes_is_small() -> None:
    task = tasks.build("sst2")
    rows = Split(
        "validation", Dataset.from_dict({"sentence": ["x" * 9_999] * 99, "label": [0] * 99, "idx": range(99)}), True
    )
    outputs = np.array([[0.0, 1.0]] * 99)
    wrong = task.answers(rows, outputs, task.decode(outputs)).wrong
    assert [each.idx for each in wrong] == list(range(WRONG)) and {len(each.texts[0]) for each in wrong} == {LONGEST}


def test_one_text_for_all_inputs_is_said() -> None:
    def written(texts: list[str], targets: list[Any]) -> str:
        column = "target" if isinstance(targets[0], str) else "references"
        return _answers(Split("test", Dataset.from_dict({column: targets}), True), texts).nothing_learnt

    assert issubclass(tasks.registry()["e2e"], Generation)
    assert written(["a", "a"], ["x", "y"]) == "all 2 answers are 'a': nothing was learnt"
    assert written(["", ""], [["x"], ["y", "z"]]) == "all 2 answers are '': nothing was learnt"
    assert written(["a", "b"], ["x", "y"]) == "" and "all labels are the same" in written(["a", "a"], ["x", "x"])


def test_one_class_for_all_pixels_is_said() -> None:
    task = tasks.build({"name": "segmentation", "dataset": "x"})
    assert isinstance(task, Segmentation)
    rows = Split("validation", Dataset.from_dict({}), True)
    found = task._answers(rows, np.array([[90, 0], [80, 10]]))
    assert found.nothing_learnt == "all 90 pixels are 'background', the commonest class: nothing was learnt"
    assert task._answers(rows, np.array([[89, 1], [80, 10]])).nothing_learnt == ""


@pytest.mark.parametrize("damaged", [None, 3, [3], [{}], [{"split": "x", "total": "y"}]])
def test_damaged_answers_say_nothing(damaged: Any) -> None:
    assert undamaged(damaged) == []
