"""SAMSum, titles of papers, titles of articles: what a row is, which are left out, and the runs on them."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asserts import refused
from rankwise import tasks
from rankwise.train.run import run
from runs import make, start
from waiting import reached, wait_for

REAL = os.environ.get("RANKWISE_DATA", "")


def real(folder: str):
    there = REAL and Path(REAL, folder).is_dir()
    return pytest.mark.skipif(not there, reason=f"RANKWISE_DATA names no folder that holds {folder}")


PLACES = {
    "samsum": ("samsum", "dialogue", "summary"),
    "titles": ("summarization/scitldr", "article", "title"),
    "medium-titles": ("medium-articles", "text", "title"),
}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "no", "dog", "had", "been", "there", "before"]


def rows(count: int) -> list[tuple[str, str]]:
    return [
        (" ".join(WORDS[i % 7 : i % 7 + 6]) + f" number {i}", " ".join(WORDS[i % 9 : i % 9 + 3])) for i in range(count)
    ]


def write(folder: Path, name: str, split: str, pairs) -> Path:
    place, source, target = PLACES[name]
    file = folder / place / f"{split}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    sources, targets = zip(*pairs, strict=True)
    pq.write_table(pa.table({target: targets, "id": ["x"] * len(sources), source: sources}), file)
    return file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("samsum", "titles"):
        for split in ("train", "validation", "test"):
            write(tmp_path, name, split, rows(12))
    write(tmp_path, "medium-titles", "train", rows(400))
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["samsum", "titles"])
def test_sources_and_targets_are_the_columns(folder, name):
    task = tasks.build({"name": name, "split": "test"})
    for split in (task.train(), *task.evaluation()):
        assert list(zip(split.data["source"], split.data["target"], strict=True)) == rows(12)
        assert split.data["idx"][:] == list(range(12))
        assert not split.official
        assert "12 rows, not the official" in split.note


def test_the_prefix_is_the_reports():
    assert tasks.build("titles").prefix == tasks.build("medium-titles").prefix == "summarize: "
    assert tasks.build("titles").target_length == 64


def test_a_chat_without_a_word_is_left_out_and_said_to_be(folder):
    write(folder, "samsum", "train", [*rows(2), (None, "Nothing."), (" ", "Nothing."), *rows(1)])
    train = tasks.build("samsum").train()
    assert train.data["source"][:] == [source for source, _ in [*rows(2), *rows(1)]]
    assert train.data["idx"][:] == [0, 1, 2]
    assert train.note.endswith("2 rows without dialogue left out")


def test_official_is_the_published_number_of_rows(folder):
    write(folder, "samsum", "validation", rows(818))
    (split,) = tasks.build("samsum").evaluation()
    assert (split.official, split.note) == (True, "")
    write(folder, "titles", "validation", rows(619))
    (split,) = tasks.build("titles").evaluation()
    assert (split.official, split.note) == (False, "there are no published scores of these titles")


def test_articles_are_split_by_their_text_each_once(folder):
    pairs = rows(400)
    write(folder, "medium-titles", "train", [*pairs, *pairs[:50], (None, "a"), ("b", ""), ("c", None)])
    parts = {}
    for split in ("validation", "test"):
        task = tasks.build({"name": "medium-titles", "split": split})
        (found,) = task.evaluation()
        assert found.name == split
        parts[split] = found
    parts["train"] = task.train()
    assert [len(part.data) > 0 for part in parts.values()] == [True] * 3
    assert len(parts["train"].data) > 350
    together = [source for part in parts.values() for source in part.data["source"]]
    assert sorted(together) == sorted(source for source, _ in pairs)
    for part in parts.values():
        assert part.note == "split by rankwise; 3 rows without text or title left out"
        assert all((s, t) in pairs for s, t in zip(part.data["source"], part.data["target"], strict=True))
    # what side a text is on depends on nothing but itself
    write(folder, "medium-titles", "train", pairs[::-1])
    (again,) = tasks.build({"name": "medium-titles", "split": "validation"}).evaluation()
    assert sorted(again.data["source"]) == sorted(parts["validation"].data["source"])


def test_scores_are_rouge_and_their_mean_is_the_metric(folder):
    task = tasks.build("samsum")
    (split,) = task.evaluation()
    texts = split.data["target"][:]
    judged = task.score_texts(texts, split)
    assert judged.metrics == dict.fromkeys(task.metrics, pytest.approx(1.0))
    judged = task.score_texts([" ".join(text.split()[::-1]) for text in texts], split)
    assert judged.metrics["rouge_1"] == pytest.approx(1.0)
    assert judged.metrics["rouge_l"] < 1
    assert sum(judged.scores) / len(texts) == pytest.approx(judged.metrics["rouge_l"])


@pytest.mark.parametrize("name", ["samsum", "titles"])
@pytest.mark.parametrize("bad", ["", " \n", None])
def test_an_empty_target_is_named(folder, name, bad):
    file = write(folder, name, "train", [*rows(3), ("a source", bad)])
    message = refused(tasks.build(name).train)
    wanted = "has no {} in row 3" if bad is None else "has an empty {} in row 3"
    assert wanted.format(PLACES[name][2]) in message
    assert str(file) in message


def test_a_row_after_those_left_out_keeps_its_place(folder):
    write(folder, "samsum", "train", [("", "a"), ("b", "c"), ("d", "")])
    assert "has an empty summary in row 2" in refused(tasks.build("samsum").train)


def test_an_empty_article_of_a_paper_is_an_error(folder):
    write(folder, "titles", "train", [*rows(1), ("", "A title")])
    assert "has an empty article in row 1" in refused(tasks.build("titles").train)


def test_other_columns_are_named(folder):
    pq.write_table(pa.table({"dialog": ["a"], "summary": ["b"]}), folder / "samsum/train.parquet")
    message = refused(tasks.build("samsum").train)
    assert "has no column 'dialogue', only dialog, summary (did you mean \"dialog\"?)" in message


@pytest.mark.parametrize("name", PLACES)
def test_a_damaged_file_is_named(folder, name):
    file = folder / PLACES[name][0] / "train.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    assert f"{file} cannot be read as parquet" in refused(tasks.build(name).train)


FETCH = """
import dataclasses, json, sys
from rankwise import tasks
from rankwise.tasks import summarisation
folder = sys.argv[1]
files = {name: f"{folder}/{name}.jsonl" for name in ("train", "validation", "test")}
summarisation.SCITLDR = dataclasses.replace(summarisation.SCITLDR, files=files)
summarisation.MEDIUM = dataclasses.replace(summarisation.MEDIUM, hub=folder)
found = []
for name in ("titles", "medium-titles"):
    task = tasks.build(name)
    found += [list(zip(s.data["source"], s.data["target"])) for s in (task.train(), *task.evaluation())]
print(json.dumps(found))
"""


@pytest.mark.large
def test_files_as_their_authors_have_them_give_the_same_rows(folder, tmp_path):
    expected = []
    for name in ("titles", "medium-titles"):
        task = tasks.build(name)
        expected += [
            list(map(list, zip(split.data["source"], split.data["target"], strict=True)))
            for split in (task.train(), *task.evaluation())
        ]
    there = tmp_path / "there"
    there.mkdir()
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"source": [s[:9] + " ", s[9:]], "target": ["x"], "title": t}) for s, t in rows(12)]
        (there / f"{split}.jsonl").write_text("\n".join(lines))
    with (there / "medium_articles.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("title", "text", "url"), *((t, s, "x") for s, t in rows(400))])
    with (there / "medium_articles_no_text.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("title", "url"), ("a", "x")])
    expected[:2] = [[[f"{s[:9].strip()} {s[9:].strip()}", t] for s, t in rows(12)]] * 2
    environment = {key: value for key, value in os.environ.items() if key != "RANKWISE_DATA"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FETCH, str(there)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


SETTINGS = {
    "method": {"name": "simplex-lora", "rank": 2, "every": 2, "times": 2, "omega_rate": 2000.0},
    "task": {"name": "samsum", "beams": 2, "target_length": 8},
    "model": "random-t5",
    "max_steps": 6,
    "batch_size": 4,
    "train_rows": 10,
    "eval_rows": 5,
    "max_length": 16,
    "checkpoint_every": 2,
    "eval_every": 3,
}


def outcome(folder: Path):
    result = json.loads((folder / "result.json").read_text())
    del result["cost"]
    lines = (folder / "metrics.jsonl").read_text(), (folder / "ranks.jsonl").read_text()
    return result, pq.read_table(folder / "predictions.parquet").to_pydict(), lines


@pytest.mark.parametrize("model", ["random-t5", pytest.param("random-gpt2", marks=pytest.mark.large)])
def test_a_killed_run_ends_as_one_that_never_was(folder, tmp_path, model):
    whole = make(tmp_path / "whole", **SETTINGS | {"model": model})
    run(whole)
    cut = make(tmp_path / "cut", **SETTINGS | {"model": model})
    process = start(cut)
    try:
        wait_for(lambda: reached(cut, 3) or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (cut / "result.json").exists()
    run(cut)
    assert outcome(cut) == outcome(whole)
    assert len(outcome(cut)[1]["prediction"]) == 5
    assert '"eval": {"loss":' in outcome(cut)[2][0]


@pytest.mark.parametrize(
    ("name", "place", "counts"),
    [
        pytest.param("samsum", "samsum", [14_731, 818, 819], marks=real("samsum")),
        pytest.param(
            "titles", "summarization/scitldr", [1_992, 619, 618], marks=real("summarization/scitldr")
        ),
    ],
)  # fmt: skip
def test_the_real_files(name, place, counts):
    task = tasks.build({"name": name, "split": "test"})
    splits = [task.train(), *tasks.build(name).evaluation(), *task.evaluation()]
    assert [len(split.data) for split in splits] == counts
    assert [split.official for split in splits] == ([False, True, True] if name == "samsum" else [False] * 3)


@pytest.mark.parametrize(
    "name", [pytest.param("samsum", marks=real("samsum")), pytest.param("titles", marks=real("summarization/scitldr"))]
)
@pytest.mark.parametrize(
    "method", ["simplex-lora", *(pytest.param(name, marks=pytest.mark.large) for name in ("lora", "sora"))]
)
def test_a_run_on_real_rows(tmp_path, name, method):
    task = {"name": name, "beams": 2, "target_length": 8}
    settings = SETTINGS | {"task": task, "method": {"name": method, "rank": 2}, "max_steps": 3, "max_length": 48}
    result = run(make(tmp_path / "run", **settings))
    assert set(result["metrics"]) == {"rouge_l", "rouge_1", "rouge_2"}
    table = pq.read_table(tmp_path / "run/predictions.parquet").to_pydict()
    assert list(table) == ["split", "idx", "label", "source", "prediction", "references", "score"]
    assert sum(table["score"]) / 5 == pytest.approx(result["metrics"]["rouge_l"])
    assert [len(group) for group in table["references"]] == [1] * 5
