"""What `result.json` holds, written and read again."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import InputError
from rankwise.runs.answers import Answers
from rankwise.runs.result import Benchmark, Cost, Parameters, Result, Split, Splits, read
from rankwise.runs.search import Search
from runs import config, one_answer, result

FOUND = Result(
    run="0123456789ab",
    task="cola",
    method="lora",
    options={"rank": 4, "targets": None},
    model="minilm-l6",
    seed=3,
    learning_rate=1e-3,
    score="accuracy",
    benchmark=Benchmark("GLUE", 0.75, 0.5),
    metrics={"accuracy": 0.75},
    splits=Splits(Split("train", 9, True), [Split("validation", 4, False, "a tenth \udc80", "your own data")]),
    parameters=Parameters(12, 10, 12, 2),
    search=Search(5, 9, None, "ω"),
    notes=["one"],
    answers=[Answers("validation", 4, "yes", 4, tied=["no"])],
    weights="ab",
    cost=Cost(1.5, 10, 20.0, 30, processes=2, micro_batch=4),
)


def read_back(folder: Path, content: Any) -> Result:
    (folder / "result.json").write_text(json.dumps(content))
    return read(folder)


def made_up(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return result(tmp_path / "x-0123456789ab", config(), 0.5, **more)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_back(tmp_path, FOUND.as_json()) == FOUND
    assert FOUND.as_json()["options"] == {"rank": 4, "targets": None}
    assert FOUND.as_json()["splits"]["evaluation"][0]["own"] == "your own data"


def test_empty_parts_are_not_in_the_file(tmp_path: Path) -> None:
    bare = replace(FOUND, benchmark=None, search=None, weights="", notes=[], cost=Cost(1.5, 10, 20.0, 30))
    content = bare.as_json()
    assert not {"search", "weights"} & content.keys() and content["benchmark"] == {} and content["notes"] == []
    assert [*content["cost"]] == ["seconds", "peak_memory_bytes", "examples_per_second", "adapter_bytes"]
    assert "own" not in content["splits"]["train"]
    assert read_back(tmp_path, content) == bare


def test_an_older_result_lacks_what_came_later_and_a_newer_one_holds_more(tmp_path: Path) -> None:
    older = read_back(tmp_path, made_up(tmp_path))
    assert (older.search, older.benchmark, older.notes, older.answers, older.weights) == (None, None, [], [], "")
    assert older.cost.processes is older.cost.micro_batch is None
    assert read_back(tmp_path, made_up(tmp_path, search=None)) == older
    more = made_up(tmp_path, search={**asdict(Search(5, 9)), "of another version": 1}, later=True)
    assert read_back(tmp_path, more) == replace(older, search=Search(5, 9))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"seed": "0"}, "seed"),
        ({"seed": True}, "seed"),
        ({"metrics": {"accuracy": "high"}}, "metrics.accuracy"),
        ({"search": {"changed": -1, "sites": 9}}, "search.changed"),
        ({"benchmark": {"name": "GLUE"}}, "benchmark.score"),
        ({"splits": {"train": FOUND.as_json()["splits"]["train"], "evaluation": []}}, "splits.evaluation"),
        ({"cost": None}, "cost"),
    ],
)
def test_a_damaged_result_is_one_line_that_says_where(change: dict[str, Any], where: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_back(tmp_path, made_up(tmp_path, **change))
    assert str(error.value) == f"{tmp_path}/result.json: is damaged at {where}"


def test_a_result_counts_without_its_answers_where_these_are_damaged(tmp_path: Path) -> None:
    assert read_back(tmp_path, made_up(tmp_path, answers=[one_answer()])).answers[0].commonest == "yes"
    assert read_back(tmp_path, made_up(tmp_path, answers=[{}])).answers == []
