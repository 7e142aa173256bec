"""E2E NLG: one row per reference to train on, one per meaning representation to score, and what is official."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bootstrap
from asserts import refused
from rankwise import tasks
from rankwise.metrics.e2e import bleu, bleu_of
from rankwise.results.summary import Summary
from rankwise.runs.store import Store
from rankwise.tasks import Split
from rankwise.train.run import run
from runs import make

REAL = os.environ.get("RANKWISE_DATA", "")
real = pytest.mark.skipif(
    not (REAL and Path(REAL, "e2e").is_dir()), reason="RANKWISE_DATA names no folder that holds e2e"
)

ROWS = [
    ("name[Aromi], eatType[pub]", "Aromi is a pub."),
    ("name[Zizzi]", "There is Zizzi."),
    ("name[Aromi], eatType[pub]", "A pub is Aromi."),
    ("name[Zizzi]", "Zizzi is a place to eat, near the river."),
    ("name[Zizzi]", "Zizzi it is."),
]


def write(folder: Path, split: str, rows) -> Path:
    file = folder / "e2e" / f"{split}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    sources, references = zip(*rows, strict=True)
    pq.write_table(pa.table({"meaning_representation": sources, "human_reference": references}), file)
    return file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for split in ("train", "validation", "test"):
        write(tmp_path, split, ROWS)
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path))
    return tmp_path


def test_training_rows_are_references_and_scored_rows_are_groups(folder):
    task = tasks.build("e2e")
    train = task.train().data
    assert list(zip(train["source"], train["target"], strict=True)) == ROWS
    assert train["idx"][:] == list(range(5))
    (split,) = task.evaluation()
    assert split.name == "validation"
    assert split.data["source"][:] == ["name[Aromi], eatType[pub]", "name[Zizzi]"]
    assert split.data["references"][:] == [[t for s, t in ROWS if s == mr] for mr in split.data["source"]]
    (split,) = tasks.build({"name": "e2e", "split": "test"}).evaluation()
    assert split.name == "test"


def test_the_defaults_are_the_papers(folder):
    task = tasks.build("e2e")
    assert (task.beams, task.length_penalty, task.no_repeat) == (10, 0.9, 4)
    assert task.label == "e2e"


def test_the_revision_changes_with_any_reference(folder):
    before = tasks.build("e2e").revision()
    write(folder, "validation", [*ROWS[:-1], (ROWS[-1][0], "Another end.")])
    assert tasks.build("e2e").revision() != before
    write(folder, "validation", ROWS)
    assert tasks.build("e2e").revision() == before


def test_official_are_rows_and_groups_in_the_published_numbers(folder):
    rows = [(f"name[{place % 630}]", f"Place {place}.") for place in range(4_693)]
    write(folder, "test", rows)
    (split,) = tasks.build({"name": "e2e", "split": "test"}).evaluation()
    assert (split.official, split.note, len(split.data)) == (True, "", 630)
    write(folder, "test", [(f"name[{place % 629}]", f"Place {place}.") for place in range(4_693)])
    (split,) = tasks.build({"name": "e2e", "split": "test"}).evaluation()
    assert not split.official
    assert split.note == "test: 629 meaning representations, not the official 630 of test"
    write(folder, "test", rows[:-1])
    (split,) = tasks.build({"name": "e2e", "split": "test"}).evaluation()
    assert split.note == "test: 4,692 rows, not the official 4,693 of test"


def test_the_published_scores_are_not_of_the_validation_rows(folder):
    write(folder, "validation", [(f"name[{place % 547}]", f"Place {place}.") for place in range(4_672)])
    (split,) = tasks.build("e2e").evaluation()
    assert (split.official, split.note) == (False, "published scores are on the test rows")


def perfect(split: Split) -> list[str]:
    return [group[-1] for group in split.data["references"]]


def test_without_java_three_metrics_are_missing_and_said_to_be(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    task = tasks.build("e2e")
    (split,) = task.evaluation()
    judged = task.score_texts(perfect(split), split)
    assert set(judged.metrics) == {"bleu", "nist"}
    assert judged.metrics["bleu"] == pytest.approx(100)
    assert judged.scores is None  # BLEU is no mean over texts
    assert judged.statistics is not None and len(judged.statistics) == 2
    (note,) = judged.notes
    assert "Java" in note


@pytest.mark.large
@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java, which METEOR and the tokenizer need")
def test_with_java_all_five_are_there(folder):
    task = tasks.build("e2e")
    (split,) = task.evaluation()
    judged = task.score_texts(perfect(split), split)
    assert tuple(judged.metrics) == task.metrics
    assert judged.metrics["meteor"] == judged.metrics["rouge_l"] == pytest.approx(1)
    assert judged.notes == ()


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([("a", "b"), ("c", " ")], "has an empty human_reference in row 1"),
        ([("a", "b"), ("", "d")], "has an empty meaning_representation in row 1"),
        ([("a", None)], "has no human_reference in row 0"),
    ],
)
def test_bad_rows(folder, rows, wanted):
    for split, call in (("train", tasks.build("e2e").train), ("validation", tasks.build("e2e").evaluation)):
        file = write(folder, split, rows)
        message = refused(call)
        assert wanted in message
        assert str(file) in message


def test_another_set_is_not_this_one(folder):
    file = folder / "e2e/train.parquet"
    pq.write_table(pa.table({"meaning_representation": ["a"], "target": ["b"]}), file)
    message = refused(tasks.build("e2e").train)
    assert f"{file} has no column 'human_reference'" in message


FETCH = """
import dataclasses, json, sys
from rankwise import tasks
from rankwise.tasks import e2e
e2e.ORIGIN = dataclasses.replace(e2e.ORIGIN, hub=sys.argv[1])
task = tasks.build("e2e")
print(json.dumps([task.revision(), task.evaluation()[0].data["references"][:]]))
"""


@pytest.mark.large
def test_a_dataset_laid_out_as_on_the_hub_gives_the_same_rows(folder, tmp_path):
    revision = tasks.build("e2e").revision()
    hub = tmp_path / "hub"
    for split in ("train", "validation", "test"):
        (hub / "default" / split).mkdir(parents=True)
        shutil.copy(folder / "e2e" / f"{split}.parquet", hub / "default" / split / "0000.parquet")
    environment = {key: value for key, value in os.environ.items() if key != "RANKWISE_DATA"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FETCH, str(hub)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found, references = json.loads(done.stdout)
    assert found == revision
    assert references == [[t for s, t in ROWS if s == mr] for mr in dict(ROWS)]


@real
def test_the_real_files():
    task = tasks.build({"name": "e2e", "split": "test"})
    train, (test,) = task.train(), task.evaluation()
    (validation,) = tasks.build("e2e").evaluation()
    assert [len(split.data) for split in (train, validation, test)] == [42_061, 547, 630]
    assert test.official
    assert (train.official, "rebuilt from a tokenised copy" in train.note) == (False, True)
    assert sum(map(len, test.data["references"])) == 4_693
    assert sum(map(len, validation.data["references"])) == 4_672
    assert not set(train.data["source"]) & set(test.data["source"])


@real
@pytest.mark.parametrize(
    ("method", "model"),
    [
        pytest.param("lora", "random-gpt2", marks=pytest.mark.large),
        ("simplex-lora", "random-llama"),
        pytest.param("sora", "random-gpt2", marks=pytest.mark.large),
    ],
)
def test_a_run_on_real_rows(tmp_path, monkeypatch, method, model):
    if method != "lora":
        monkeypatch.setenv("PATH", str(tmp_path))  # no Java, which takes long
    settings = {
        "task": {"name": "e2e", "beams": 2, "target_length": 12, "split": "test"},
        "method": {"name": method, "rank": 2},
        "model": model,
        "train_rows": 16,
        "eval_rows": 3,
        "max_steps": 3,
        "batch_size": 8,
        "max_length": 64,
        "checkpoint_every": 3,
    }
    result = run(make(tmp_path / "run", **settings))
    assert set(result["metrics"]) >= {"bleu", "nist"}
    assert bool(result["notes"]) != ("meteor" in result["metrics"])
    (split,) = result["splits"]["evaluation"]
    assert (split["rows"], split["official"]) == (3, False)
    assert "rebuilt" in result["splits"]["train"]["note"]
    table = pq.read_table(tmp_path / "run/predictions.parquet").to_pydict()
    assert len(table["prediction"]) == 3
    assert set(table["label"]) == {-1}
    assert "score" not in table
    assert float(bleu_of(np.array(table["statistics"]).sum(axis=0))) == result["metrics"]["bleu"]


@pytest.mark.large
def test_a_summary_has_an_interval_over_the_texts(folder, tmp_path, monkeypatch):
    """It is that of a bootstrap by hand, which scores the texts that were drawn."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java, which takes long
    ends = ["near the river", "in the city centre with cheap food", "for the whole family"]
    rows = [(f"name[{name}]", f"{name} is a pub {ends[place % 3]}.") for place, name in enumerate("ABCDEFGH")]
    for split in ("train", "validation"):
        write(folder, split, [*rows, *((source, f"There is {text}") for source, text in rows[:3])])
    settings = {"model": "random-gpt2", "max_steps": 40, "batch_size": 8, "learning_rate": 0.003}
    settings |= {"task": {"name": "e2e", "beams": 1, "target_length": 12}, "train_rows": None, "eval_rows": None}
    for method in ({"name": "full"}, {"name": "lora", "rank": 2}):
        run(make(tmp_path / "runs" / method["name"], method=method, **settings))
    results = Store(tmp_path / "runs").results()
    tables = [pq.read_table(result.folder / "predictions.parquet").to_pydict() for result in results]
    for table, result in zip(tables, results, strict=True):
        assert float(bleu_of(np.array(table["statistics"]).sum(axis=0))) == result.metrics["bleu"]
    texts = [np.array(table["prediction"]) for table in tables]

    def score(drawn, rows):
        return bleu(drawn.tolist(), [tables[0]["references"][row] for row in rows])

    with bootstrap.few():
        by_hand = bootstrap.by_hand(score, texts[:1], texts[1:], np.arange(8))
        (contrast,) = Summary(results).contrasts
    assert contrast.ours.method == "full" and contrast.gap.examples == pytest.approx(by_hand)
    assert by_hand[0] < by_hand[1]


def test_what_is_held_out_has_all_references_of_its_sources(folder):
    task = tasks.build("e2e")
    rest, held = task.tuning(task.train(), 0.3)
    references = dict(zip(held.data["source"], held.data["references"], strict=True))
    assert len(held.data) == len(references) == 1
    for source, found in references.items():
        assert found == [reference for each, reference in ROWS if each == source]
    assert set(rest.data["source"]) == {source for source, _ in ROWS} - set(references)
    assert held.data["idx"][:] == [0]
    rest, held = task.tuning(task.train(), 1, 1)
    (source,) = held.data["source"]
    assert source not in rest.data["source"] and len(rest.data) == 1
    assert held.data["references"][:] == [[reference for each, reference in ROWS if each == source]]


def test_with_the_test_rows_to_report_the_validation_rows_choose(folder):
    task = tasks.build({"name": "e2e", "split": "test"})
    train, held = task.tuning(task.train(), 0.3)
    assert train.data[:] == task.train().data[:]
    assert held.name == "validation" and held.data[:] == tasks.build("e2e").evaluation()[0].data[:]
    assert len(task.tuning(task.train(), 1)[1].data) == 1
