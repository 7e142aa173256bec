import csv
import io
from pathlib import Path

import pytest

from rankwise.report import text
from rankwise.runs.store import Store
from rankwise.runs.tables import Row, best, summarise


@pytest.fixture
def rows(runs: Path) -> list[Row]:
    return best(summarise(Store(runs).results()))


def test_markdown_has_a_line_per_row_and_the_note(rows: list[Row]) -> None:
    lines = text.markdown(rows).splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[0].startswith("| method | accuracy (mean ± sd) | 95 % interval | learning rate | seeds |")
    assert lines[4].startswith("| simplex-lora rank=4 | 0.7")
    assert "\\* stdlib-module, validation: split by rankwise from docstrings" in lines
    assert "\\* stdlib-module, train: 4,800 of 5,000 rows" in lines


def test_csv_can_be_read_back_in_full_precision(rows: list[Row]) -> None:
    found = list(csv.DictReader(io.StringIO(text.csv(rows))))
    assert [float(line["mean"]) for line in found] == [row["mean"] for row in rows]
    assert [float(line["f1_sd"]) for line in found] == [row["metrics"]["f1"]["sd"] for row in rows]
    assert found[1]["trainable"] == "331776" and found[1]["official"] == "False"
    assert found[1]["train_note"] == "4,800 of 5,000 rows"
    assert float(found[0]["interval_low"]) < float(found[0]["mean"]) < float(found[0]["interval_high"])


def test_latex_escapes_and_closes(rows: list[Row]) -> None:
    rows[0]["method"] = "a_b & 50%"
    lines = text.latex(rows).splitlines()
    assert lines[0].startswith("\\begin{tabular}{lr") and "\\end{tabular}" in lines
    assert lines[4].startswith("a\\_b \\& 50\\% & 0.") and "$\\pm$" in lines[4] and lines[4].endswith("\\\\")
    assert lines[-1].startswith("% * stdlib-module")


def test_one_seed_has_neither_spread_nor_interval(rows: list[Row]) -> None:
    row = {**rows[0], "sd": None, "interval": None, "n": 1}
    cells = {column.heading: column.cell(row) for column in text.columns([row])}
    assert "±" not in cells["accuracy"] and cells["95 % interval"] == ""


def test_tasks_of_different_metrics_share_one_table(rows: list[Row]) -> None:
    other = {**rows[0], "task": "cola", "score": "matthews", "metrics": {"matthews": {"mean": 0.5, "sd": None}}}
    found = [column.heading for column in text.columns([*rows, other])]
    assert found[:4] == ["task", "method", "metric", "score"]
    assert text.markdown([other]).splitlines()[0].count("accuracy") == 0
