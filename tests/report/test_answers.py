"""Which class was taken for which, as the page shows it."""

import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.report import html
from rankwise.report.answers import MATRIX, MISTAKES, answered
from rankwise.runs.answers import FILE
from rankwise.runs.store import Store
from runs import config, finish, one_answer, predict

WRONG = {"texts": ["a <b>long</b> text", "x" * 900], "true": 0, "given": 1, "confidence": 0.98765}


def details(classes: int = 3, **more: Any) -> list[dict[str, Any]]:
    names = [f"class {number}" for number in range(classes)]
    confusion = [[0, 0, 5], [0, 1, 3], [1, 1, 1_200], [2, 0, 8]]
    wrong = [{**WRONG, "idx": row} for row in range(20)]
    return [
        {"split": "validation", "classes": names, "confusion": confusion, "wrong": wrong, **more},
        {"split": "mismatched", "classes": names, "confusion": [], "wrong": []},
    ]


def write(folder: Path, content: Any) -> None:
    (folder / FILE).write_text(json.dumps(content))


def test_a_matrix_has_a_line_for_each_true_class(tmp_path: Path) -> None:
    write(tmp_path, details())
    found = answered(tmp_path, "validation", 2)
    assert found is not None and found.words == "11 of 1,216 rows answered wrong"
    assert [name for name, _ in found.matrix] == found.classes == ["class 0", "class 1", "class 2"]
    assert [cells for _, cells in found.matrix] == [
        [("5", 5), ("3", 3), ("", 0)],
        [("", 0), ("1,200", 8), ("", 0)],
        [("8", 8), ("", 0), ("", 0)],
    ]
    assert [(each.row, each.true, each.given, each.confidence) for each in found.wrong] == [
        (row, "class 0", "class 1", "0.988") for row in (0, 1)
    ]
    assert len(found.wrong[0].texts[1]) < 300
    assert answered(tmp_path, "mismatched").words == "0 of 0 rows answered wrong"


def test_of_many_classes_the_commonest_mistakes_are_listed(tmp_path: Path) -> None:
    pairs = [[true, true + 1, 50 - true] for true in range(MATRIX)]
    write(tmp_path, details(MATRIX + 1, confusion=pairs))
    found = answered(tmp_path, "validation")
    assert found is not None and found.matrix == found.classes == [] and len(found.mistakes) == MISTAKES
    assert found.mistakes[0] == "class 1 for class 0: 50"


@pytest.mark.parametrize(
    "content",
    [None, 3, [], [3], {}, details(confusion=[[0, 0]]), details(confusion="x"), details(2), details(wrong=[{}])],
)
def test_what_is_damaged_is_left_out(tmp_path: Path, content: Any) -> None:
    write(tmp_path, content)
    assert answered(tmp_path, "validation") is None
    assert answered(tmp_path / "gone", "validation") is None


def test_the_page_shows_mistakes_and_says_where_nothing_was_learnt(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = finish(store, config(seed=0), 0.5)
    predict(old, [0, 1], [1, 1])  # of before: no file, no spread, and its predictions are still read
    folder = finish(store, config(seed=1, method={"name": "head"}), 0.5, answers=[one_answer()])
    write(folder, details())
    page = html.write(tmp_path).read_text()
    assert "1 of 2 rows answered wrong; the first, as row (answer for label): 0 (0 for 1)." in page
    assert "11 of 1,216 rows answered wrong" in page and "a &lt;b&gt;long&lt;/b&gt; text" in page
    said = "all 50 answers are &#39;yes&#39;, the commonest class: nothing was learnt"
    assert f"cola: head, seed 1, on validation: {said}" in page and f"validation: {said}" in page
    assert "accuracy on 50 rows of validation" in page
