"""GLUE from a folder: small written files, damaged files, and the real ones where RANKWISE_DATA has them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asserts import refused
from rankwise import tasks
from rankwise.errors import InputError
from rankwise.tasks.glue import GLUE

REAL = os.environ.get("RANKWISE_DATA", "")
NAMES = [name for name, task in tasks.registry().items() if issubclass(task, GLUE)]


def write(file: Path, **columns) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def rows(name: str, n: int = 6, unlabelled: bool = False) -> dict:
    task = tasks.build(name)
    labels = (
        [-1] * n
        if unlabelled
        else [i % len(task.labels) for i in range(n)]
        if task.labels
        else [i % 6 for i in range(n)]
    )
    label = pa.array(labels, pa.int64() if task.labels else pa.float64())
    return {column: [f"{column} {i}" for i in range(n)] for column in task.text} | {
        "label": label,
        "idx": list(range(n)),
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with six rows for every split of every task."""
    for name in NAMES:
        for split in tasks.registry()[name].rows:
            write(tmp_path / "glue" / name / f"{split}.parquet", **rows(name, unlabelled=name == "ax"))
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_task_reads_and_scores(folder, name):
    task = tasks.build(name)
    train, evaluation = task.train(), task.evaluation()
    for split in (train, *evaluation):
        assert split.data.column_names == [*task.text, "label", "idx"]
        assert len(split.data) == 6
    assert train.labelled
    scores = {}
    for split in evaluation:
        scores |= task.score(split, np.asarray(split.data["label"][:]))
    assert set(scores) == {
        "cola": {"matthews", "accuracy"},
        "mrpc": {"accuracy", "f1"},
        "qqp": {"accuracy", "f1"},
        "stsb": {"pearson", "spearman"},
        "mnli": {"accuracy", "accuracy_mismatched"},
        "ax": set(),
    }.get(name, {"accuracy"})
    assert all(score == pytest.approx(1.0) for score in scores.values())
    assert task.main in (*scores, "")


def test_a_file_of_another_size_is_not_official(folder):
    split = tasks.build("rte").train()
    assert not split.official
    assert split.note == "train: 6 rows, not the official 2,490 of train"


def test_a_subset_stands_in_and_is_not_official(folder):
    file = folder / "glue/qnli/train.parquet"
    file.rename(file.with_name("train_subset.parquet"))
    split = tasks.build("qnli").train()
    assert (split.name, split.official) == ("train_subset", False)
    assert split.note == "train_subset: 6 rows, not the official 104,743 of train"


def test_a_subset_of_the_official_size_is_still_not_official(folder):
    columns = rows("wnli", 71)
    (folder / "glue/wnli/validation.parquet").unlink()
    write(folder / "glue/wnli/validation_subset.parquet", **columns)
    assert not tasks.build("wnli").evaluation()[0].official
    write(folder / "glue/wnli/validation.parquet", **columns)
    official = tasks.build("wnli").evaluation()[0]
    assert (official.official, official.note) == (True, "")


def test_ax_trains_on_mnli_and_is_unlabelled(folder):
    task = tasks.build("ax")
    assert task.train().data[:] == tasks.build("mnli").train().data[:]
    (test,) = task.evaluation()
    assert not test.labelled
    assert task.score(test, np.zeros(6)) == {}


def test_idx_is_the_row_where_the_file_has_none(folder):
    columns = rows("rte")
    del columns["idx"]
    write(folder / "glue/rte/train.parquet", **columns)
    assert tasks.build("rte").train().data["idx"][:] == list(range(6))


def test_the_revision_is_of_the_rows_not_of_the_place(folder, tmp_path_factory, monkeypatch):
    revision = tasks.build("cola").revision()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for split in ("train", "validation"):
        # other idx, other order of columns, smaller types, other compression: the same data
        columns = {
            "label": pa.array([0, 1] * 3, pa.int8()),
            "idx": list(range(10, 16)),
            "sentence": rows("cola")["sentence"],
        }
        file = write(elsewhere / "glue/cola" / f"{split}.parquet", **columns)
        pq.write_table(pq.read_table(file), file, compression="zstd")
    monkeypatch.setenv("RANKWISE_DATA", str(elsewhere))
    assert tasks.build("cola").revision() == revision
    write(elsewhere / "glue/cola/validation.parquet", **rows("cola") | {"label": [1, 1] * 3})
    assert tasks.build("cola").revision() != revision


def test_a_folder_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "nowhere"))
    message = refused(tasks.build("cola").train)
    assert "RANKWISE_DATA" in message
    assert "nowhere" in message
    assert "unset" in message


def test_a_file_that_is_not_there(folder):
    (folder / "glue/mnli/validation_mismatched.parquet").unlink()
    assert "validation_mismatched.parquet does not exist" in refused(tasks.build("mnli").evaluation)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file(folder, keep):
    file = folder / "glue/cola/train.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(tasks.build("cola").train)
    assert str(file) in message
    assert "cannot be read as parquet" in message


def test_a_damaged_file(folder):
    file = folder / "glue/cola/train.parquet"
    data = bytearray(file.read_bytes())
    data[4:200] = b"\xff" * 196
    file.write_bytes(bytes(data))
    assert str(file) in refused(tasks.build("cola").train)


def test_a_folder_in_place_of_a_file(folder):
    file = folder / "glue/cola/train.parquet"
    file.unlink()
    file.mkdir()
    assert "does not exist" in refused(tasks.build("cola").train)


BAD = {
    "no column 'sentence'": {"text": ["a"], "label": [0]},
    "no column 'label'": {"sentence": ["a"]},
    "no rows": {"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())},
    "label 2 in row 1 is not 0 to 1": {"sentence": ["a", "b"], "label": [0, 2]},
    "label -1 in row 0 is not 0 to 1": {"sentence": ["a", "b"], "label": [-1, 1]},
    "no sentence in row 1": {"sentence": ["a", None], "label": [0, 1]},
    "no label in row 0": {"sentence": ["a", "b"], "label": [None, 1]},
    "column 'label' does not hold int64": {"sentence": ["a"], "label": ["acceptable"]},
    "'label' does not hold int64": {"sentence": ["a"], "label": [0.5]},
    "column 'sentence' does not hold string": {"sentence": [["a"]], "label": [0]},
}


@pytest.mark.parametrize("wanted", BAD)
def test_bad_rows(folder, wanted):
    file = write(folder / "glue/cola/train.parquet", **BAD[wanted])
    message = refused(tasks.build("cola").train)
    assert wanted in message
    assert str(file) in message


@pytest.mark.parametrize("grade", [-0.1, 5.1, float("nan"), float("inf")])
def test_a_grade_outside_0_to_5(folder, grade):
    write(folder / "glue/stsb/train.parquet", **rows("stsb") | {"label": [1.0, 2.0, grade, 3.0, 4.0, 5.0]})
    assert "in row 2 is not 0.0 to 5.0" in refused(tasks.build("stsb").train)


def test_a_label_where_none_is_public(folder):
    write(folder / "glue/ax/test.parquet", **rows("ax", unlabelled=True) | {"label": [-1, -1, 1, -1, -1, -1]})
    assert "label 1 in row 2 is not -1" in refused(tasks.build("ax").evaluation)


PROGRAM = """
import os
from rankwise import tasks
from rankwise.errors import InputError
for variable in (None, ""):  # set to nothing is not set
    if variable is not None:
        os.environ["RANKWISE_DATA"] = variable
    try:
        tasks.build("rte").train()
    except InputError as error:
        print(error)
"""


@pytest.mark.large
def test_a_hub_that_cannot_be_reached(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "RANKWISE_DATA"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    messages = done.stdout.splitlines()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith("nyu-mll/glue (rte, train) cannot be fetched from the hub")
        assert "RANKWISE_DATA" in message


CARD = """---
configs:
- config_name: rte
  data_files:
  - {split: train, path: rte/train-*}
  - {split: validation, path: rte/validation-*}
---
"""

FETCH = """
import sys
from rankwise import tasks
from rankwise.tasks import glue
glue.HUB = sys.argv[1]
task = tasks.build("rte")
print(task.revision(), len(task.train().data), task.evaluation()[0].name, *task.train().data.features)
"""


@pytest.mark.large
def test_a_dataset_laid_out_as_on_the_hub_gives_the_same_rows(folder, tmp_path):
    revision = tasks.build("rte").revision()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/README.md").write_text(CARD)
    for split in ("train", "validation"):
        write(tmp_path / f"hub/rte/{split}-00000-of-00001.parquet", **rows("rte"))
    environment = {key: value for key, value in os.environ.items() if key != "RANKWISE_DATA"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FETCH, str(tmp_path / "hub")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [revision, "6", "validation", "sentence1", "sentence2", "label", "idx"]
    assert "%" not in done.stderr  # no progress bar where there is no terminal


OFFICIAL = {
    "cola": [("train", 8_551), ("validation", 1_043)],
    "sst2": [("train", 67_349), ("validation", 872)],
    "mrpc": [("train", 3_668), ("validation", 408)],
    "qqp": [("train_subset", 17_214), ("validation_subset", 2_998)],
    "stsb": [("train", 5_749), ("validation", 1_500)],
    "mnli": [("train_subset", 19_971), ("validation_matched", 9_815), ("validation_mismatched_subset", 1_000)],
    "qnli": [("train_subset", 2_000), ("validation", 5_463)],
    "rte": [("train", 2_490), ("validation", 277)],
    "wnli": [("train", 635), ("validation", 71)],
    "ax": [("train_subset", 19_971), ("test", 1_104)],
}


def test_halves_share_the_rows_choose_by_the_first_and_report_the_second(folder):
    for name, count in (("rte", 6), ("mnli", 6)):
        whole = tasks.build(name).evaluation()
        task = tasks.build({"name": name, "protocol": "halves"})
        halves = task.evaluation()
        assert [half.suffix for half in halves] == [split.suffix for split in whole]
        train, first = task.tuning(task.train(), 0.1)
        assert train.data[:] == task.train().data[:]
        assert len(first.data) == len(halves[0].data) == count // 2
        assert sorted(first.data["idx"][:] + halves[0].data["idx"][:]) == whole[0].data["idx"][:]
        assert not first.official and "first half of validation" in first.note
        assert all("second half of validation" in half.note for half in halves)
        assert [half.data[:] for half in task.evaluation()] == [half.data[:] for half in halves]
    assert tasks.build({"name": "rte", "protocol": "halves"}).label == "rte protocol=halves"


def test_the_rows_to_choose_by_count_in_the_revision_of_runs_that_look_at_them(folder):
    task = tasks.build({"name": "rte", "protocol": "halves"})
    reported, tried = task.revision(), task.revision(tuning=True)
    chosen_by = task.apart().data["idx"][:]
    changed = rows("rte")
    changed["sentence1"] = [f"{t} More." if i == chosen_by[0] else t for i, t in enumerate(changed["sentence1"])]
    write(folder / "glue" / "rte" / "validation.parquet", **changed)
    assert task.revision() == reported
    assert task.revision(tuning=True) != tried
    whole = tasks.build("rte")
    assert whole.apart() is None and whole.revision(tuning=True) == whole.revision()


@pytest.mark.parametrize(
    ("name", "averaged"),
    [
        ("cola", ("matthews",)),
        ("mrpc", ("accuracy", "f1")),
        ("mnli", ("accuracy", "accuracy_mismatched")),
        ("stsb", ("pearson", "spearman")),
        ("wnli", ()),
    ],
)
def test_what_counts_in_the_average(name, averaged):
    assert tasks.build(name).averaged == averaged
    assert tasks.build({"name": name, "protocol": "halves"}).averaged == averaged


def test_wnli_and_ax_are_outside_the_average():
    inside = {name for name in NAMES if tasks.build(name).benchmark == "GLUE"}
    assert inside == {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"}
    with pytest.raises(InputError, match="ax has no labelled rows"):
        tasks.build({"name": "ax", "protocol": "halves"})


@pytest.mark.parametrize("name", NAMES)
def test_a_submission_has_a_line_for_each_row_as_the_website_takes_it(folder, monkeypatch, name):
    task = tasks.build(name) if name == "ax" else tasks.build({"name": name, "submission": True})
    for split in task.tests:
        # a test split that comes with labels: they are not to be seen
        write(folder / "glue" / name / f"{split}.parquet", **rows(name, unlabelled=name != "mrpc"))
    monkeypatch.setattr(type(task), "tests", {split: (file, 6) for split, (file, _) in task.tests.items()})
    tests = [split for split in task.evaluation() if split.name in task.tests]
    assert len(tests) == len(task.tests) and not any(split.labelled for split in tests)
    first = 7.25 if not task.labels else len(task.labels) - 1
    files = {}
    for split in tests:
        files |= task.files(split, np.array([first, 0, 0, 0, 0, 0]))
        assert task.files(split, np.zeros(5)) == {}
    assert set(files) == {file for file, _ in task.tests.values()}
    said = {"stsb": "5.000", "mnli": "contradiction", "ax": "contradiction", "rte": "not_entailment"}
    said["qnli"] = "not_entailment"
    for text in files.values():
        lines = text.splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == 7 and text.endswith("\n")
        assert lines[1] == f"0\t{said.get(name, '1')}"


@pytest.mark.parametrize("name", NAMES)
def test_the_real_files(name):
    if not (Path(REAL) / "glue" / name).is_dir() or not REAL:
        pytest.skip(f"RANKWISE_DATA has no glue/{name}")
    task = tasks.build(name)
    splits = [task.train(), *task.evaluation()]
    assert [(split.name, len(split.data)) for split in splits] == OFFICIAL[name]
    for split in splits:
        assert split.official == (not split.name.endswith("_subset"))
        assert bool(split.note) != split.official
        if split.labelled and task.labels:
            assert set(split.data["label"]) == set(range(len(task.labels)))
    if name == "mrpc":  # the published share of paraphrases in the validation rows
        assert sum(splits[1].data["label"]) == 279
    assert len(task.revision()) == 12
