"""WikiSQL in its two layouts: with tables, as on the hub, and as queries without them."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asserts import refused
from rankwise import tasks
from rankwise.metrics.wikisql import parse
from rankwise.train.run import run
from runs import make

REAL = os.environ.get("RANKWISE_DATA", "")
real = pytest.mark.skipif(
    not (REAL and Path(REAL, "wikisql").is_dir()), reason="RANKWISE_DATA names no folder that holds wikisql"
)

QUERIES = [
    {
        "question": "Who wore 3? ",
        "sql_plain": "SELECT player FROM table WHERE no = 3",
        "known_columns": ["no", "player"],
        "sql_complete": True,
    },
    {
        "question": "How many?",
        "sql_plain": "SELECT COUNT player FROM table",
        "known_columns": [],
        "sql_complete": True,
    },
    {
        "question": "What?",
        "sql_plain": "SELECT NO._FIELD FROM table",
        "known_columns": ["no"],
        "sql_complete": False,
    },
]
HEADER = ["No", "Player", "Lap Time"]
TABLE = {"header": HEADER, "types": ["real", "text", "text"], "rows": [["3", "Ann", "1:02"], ["4", "Bo", "1:01"]]}


def with_table(question="Who wore 3?", sel=1, agg=0, conds=((0, 0, "3"),), table=None):
    columns, operators, values = ([cond[i] for cond in conds] for i in range(3))
    conditions = {"column_index": columns, "operator_index": operators, "condition": [str(each) for each in values]}
    sql = {"human_readable": "", "sel": sel, "agg": agg, "conds": conditions}
    return {"phase": 2, "question": question, "table": table or TABLE, "sql": sql}


TABLES = [
    with_table(),
    with_table("How many after 3?", agg=3, conds=((0, 1, 3), (2, 0, "1:01"))),
    with_table("Whose is nothing?", conds=((2, 0, " "),)),
]


def write(folder: Path, split: str, rows) -> Path:
    file = folder / "wikisql" / f"{split}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def queries(folder):
    return [write(folder, split, QUERIES) for split in ("train", "validation", "test")]


@pytest.fixture
def with_tables(folder):
    return [write(folder, split, TABLES) for split in ("train", "validation", "test")]


def test_queries_without_tables(queries):
    task = tasks.build("wikisql")
    (split,) = task.evaluation()
    for found in (task.train(), split):
        assert found.data["source"][:] == ["Who wore 3? | no | player", "How many?"]
        assert found.data["target"][:] == [row["sql_plain"] for row in QUERIES[:2]]
        assert found.data["idx"][:] == [0, 1]
        assert not found.official
    assert split.note == (
        "validation: 2 rows, not the official 8,421 of validation; 1 rows without a complete query left out; "
        "the columns in the input are those that queries name, which is easier than the full header"
    )
    judged = task.score_texts(["select player from table where NO = 3", "SELECT MAX player FROM table"], split)
    assert judged.metrics == {"logical_form": 0.5}
    assert judged.scores == [1.0, 0.0]
    assert judged.notes == ("no execution accuracy: the data has no tables",)


def test_queries_with_tables_are_written_and_run(with_tables):
    task = tasks.build({"name": "wikisql", "split": "test"})
    train, (split,) = task.train(), task.evaluation()
    assert train.data["source"][:] == split.data["source"][:]
    assert split.data["source"][0] == "Who wore 3? | No | Player | Lap Time"
    assert split.data["target"][:] == [
        "SELECT player FROM table WHERE no = 3",
        "SELECT COUNT player FROM table WHERE lap time = 1:01 AND no > 3",
    ]
    assert "cells" not in train.data.column_names  # a model never sees them, and training needs them for nothing
    assert "1 rows whose query has no reading as text left out" in split.note
    other = "SELECT COUNT lap time FROM table WHERE no > 3"  # another query with the same answer
    judged = task.score_texts(["SELECT player FROM table WHERE no = 3", other], split)
    assert judged.metrics == {"logical_form": 0.5, "execution": 1.0}
    assert judged.scores == [1.0, 0.0]
    assert judged.notes == ()


def test_all_rows_and_tables_are_official(folder):
    write(folder, "validation", [with_table() for _ in range(8_421)])
    (split,) = tasks.build("wikisql").evaluation()
    assert (split.official, split.note) == (True, "")


@pytest.mark.parametrize("layout", ["queries", "with_tables"])
def test_the_query_is_no_part_of_the_input(layout, request):
    request.getfixturevalue(layout)
    task = tasks.build("wikisql")
    for split in (task.train(), *task.evaluation()):
        for source, target in zip(split.data["source"], split.data["target"], strict=True):
            assert target not in source
            assert "SELECT" not in source


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"question": " "}, "has an empty question in row 1"),
        ({"sql_plain": ""}, "has an empty sql_plain in row 1"),
        ({"sql_plain": None}, "has no sql_plain in row 1"),
        ({"sql_plain": "FROM table"}, "the query in row 1 cannot be read"),
        ({"known_columns": None}, "has no known_columns in row 1"),
    ],
)
def test_bad_rows_without_tables(queries, change, wanted):
    file = write(queries[0].parents[1], "train", [QUERIES[0], QUERIES[1] | change])
    message = refused(tasks.build("wikisql").train)
    assert wanted in message
    assert str(file) in message


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (with_table(sel=3), "row 1 is not in WikiSQL's format"),
        (with_table(agg=6), "row 1 is not in WikiSQL's format"),
        (with_table(conds=((7, 0, "a"),)), "row 1 is not in WikiSQL's format"),
        (with_table(conds=((0, 3, "a"),)), "row 1 is not in WikiSQL's format"),
        (with_table(question=""), "has an empty question in row 1"),
        (with_table(table=TABLE | {"rows": [["3"]]}), "row 0 of a table has 1 cells"),
        (with_table(table=TABLE | {"types": ["date", "text", "text"]}), "'date' is no type"),
        (with_table(table=TABLE | {"header": None}), "row 1 is not in WikiSQL's format"),
    ],
)
def test_bad_rows_with_tables(with_tables, row, wanted):
    file = write(with_tables[0].parents[1], "validation", [TABLES[0], row])
    message = refused(tasks.build("wikisql").evaluation)
    assert wanted in message
    assert str(file) in message


def test_nothing_but_incomplete_rows(queries):
    write(queries[0].parents[1], "train", QUERIES[2:])
    assert "only rows without a complete query" in refused(tasks.build("wikisql").train)


@real
def test_the_real_files():
    task = tasks.build("wikisql")
    train, (validation,) = task.train(), task.evaluation()
    (test,) = tasks.build({"name": "wikisql", "split": "test"}).evaluation()
    assert [len(split.data) for split in (train, validation, test)] == [52_835, 7_967, 14_942]
    for split in (validation, test):
        assert "without a complete query left out" in split.note
        assert all(parse(row["target"], row["columns"]) for row in split.data)
        judged = task.score_texts(split.data["target"][:], split)
        assert judged.metrics == {"logical_form": 1.0}


@real
@pytest.mark.parametrize(
    "method", ["simplex-lora", *(pytest.param(name, marks=pytest.mark.large) for name in ("lora", "sora"))]
)
def test_a_run_on_real_rows(tmp_path, method):
    settings = {
        "task": {"name": "wikisql", "beams": 1, "target_length": 12},
        "method": {"name": method, "rank": 2},
        "model": "random-t5",
        "train_rows": 16,
        "eval_rows": 3,
        "max_steps": 3,
        "batch_size": 8,
        "max_length": 64,
        "checkpoint_every": 3,
    }
    result = run(make(tmp_path / "run", **settings))
    assert set(result["metrics"]) == {"logical_form"}
    assert result["notes"] == ["no execution accuracy: the data has no tables"]
    table = pq.read_table(tmp_path / "run/predictions.parquet").to_pydict()
    assert len(table["prediction"]) == 3
    assert sum(table["score"]) / 3 == result["metrics"]["logical_form"]
