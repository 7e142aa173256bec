"""The GLUE benchmark (Wang et al. 2019, arXiv 1804.07461), from a folder of parquet files or from the Hugging Face hub.

`RANKWISE_DATA/glue/<task>/<split>.parquet` when the variable is set, `nyu-mll/glue` on the hub otherwise. Columns and
label numbers are those of `nyu-mll/glue`. A file `<split>_subset.parquet` stands in for a split that is not there, and
is marked as not official, as is any file whose number of rows is not the published one.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rankwise.config import InputError, need
from rankwise.tasks.base import Split, Task

if TYPE_CHECKING:
    import pyarrow as pa

HUB = "nyu-mll/glue"


class GLUE(Task):
    """A GLUE task: its columns, labels and metrics, and the rows that each of its splits has on the hub."""

    main = "accuracy"
    metrics: tuple[str, ...] = ("accuracy",)
    rows: ClassVar[dict[str, int]]
    """Rows of each official split in use: the training split first, then those to evaluate on."""

    def train(self) -> Split:
        return self._split(next(iter(self.rows)))

    def evaluation(self) -> list[Split]:
        return [self._split(name) for name in list(self.rows)[1:]]

    def _split(self, name: str, suffix: str = "", labelled: bool = True) -> Split:
        datasets = need("datasets", "bench")
        table, found, where = _local(self.name, name) if os.environ.get("RANKWISE_DATA") else _hub(self.name, name)
        table = _checked(table, where, self.text, self.labels, labelled)
        wanted = self.rows[name]
        official = found == name and table.num_rows == wanted
        note = "" if official else f"{found}: {table.num_rows:,} rows, not the official {wanted:,} of {name}"
        return Split(found, datasets.Dataset(table), official, note, suffix)


def _local(task: str, split: str) -> tuple["pa.Table", str, str]:
    """The table of RANKWISE_DATA's file for a split, the name of the split that was found, and the file's name."""
    pa = need("pyarrow", "bench")
    parquet = need("pyarrow.parquet", "bench")
    root = os.environ["RANKWISE_DATA"]
    if not Path(root).is_dir():
        raise InputError(
            f"RANKWISE_DATA={root!r} is not a folder: point it at one that holds glue/{task}/{split}.parquet, "
            "or unset it to take GLUE from the hub"
        )
    folder = Path(root, "glue", task)
    for name in (split, f"{split}_subset"):
        file = folder / f"{name}.parquet"
        if file.is_file():
            break
    else:
        raise InputError(
            f"{folder / split}.parquet does not exist: put it there, or unset RANKWISE_DATA to use the hub"
        )
    try:
        # one file, read whole: a dataset's reader would take folder names for columns
        table = parquet.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as parquet ({_line(error)}): fetch or write the file again") from error
    return table, name, str(file)


def _hub(task: str, split: str) -> tuple["pa.Table", str, str]:
    """The table of the hub's split, the name of the split, and what to call it in a message."""
    datasets = need("datasets", "bench")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(HUB, task, split=split)
    except Exception as error:  # the hub's client raises a dozen unrelated types, which all mean: no data
        raise InputError(
            f"{HUB} ({task}, {split}) cannot be fetched from the hub ({_line(error)}): go online, or "
            f"point RANKWISE_DATA at a folder that holds glue/{task}/{split}.parquet"
        ) from error
    return data.data.table, split, f"{HUB} ({task}, {split})"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _checked(
    table: "pa.Table", where: str, text: tuple[str, ...], labels: tuple[str, ...], labelled: bool
) -> "pa.Table":
    """`table` cut down to text, label and idx, in the types of the hub; InputError naming `where` for bad rows."""
    pa = need("pyarrow", "bench")
    compute = need("pyarrow.compute", "bench")
    missing = [column for column in (*text, "label") if column not in table.column_names]
    if missing:
        raise InputError(
            f"{where} has no column {missing[0]!r}, only {', '.join(table.column_names)}: fetch the file again"
        )
    if table.num_rows == 0:
        raise InputError(f"{where} has no rows: fetch the file again")
    kind = pa.int64() if labels else pa.float32()
    types = dict.fromkeys(text, pa.string()) | {"label": kind, "idx": pa.int64()}
    if "idx" not in table.column_names:
        table = table.append_column("idx", pa.array(range(table.num_rows), pa.int64()))
    columns = {}
    for column, wanted in types.items():
        if table[column].null_count:
            row = compute.index(table[column].is_null(), True).as_py()
            raise InputError(f"{where} has no {column} in row {row}: fetch the file again")
        try:
            columns[column] = table[column].cast(wanted)
        except pa.ArrowException as error:
            raise InputError(f"{where}: column {column!r} does not hold {wanted} ({_line(error)})") from error
    low, high = (0, len(labels) - 1) if labels else (0.0, 5.0)
    values = columns["label"]
    if labelled:
        inside = compute.and_(compute.greater_equal(values, low), compute.less_equal(values, high))
    else:
        low = high = -1
        inside = compute.equal(values, -1)
    row = compute.index(inside, False).as_py()
    if row != -1:
        allowed = f"{low} to {high}" if low != high else f"{low}"
        raise InputError(f"{where}: label {values[row].as_py()} in row {row} is not {allowed}: fetch the file again")
    return pa.table(columns)


class CoLA(GLUE, name="cola"):
    """Is the sentence grammatical? Matthews correlation."""

    text = ("sentence",)
    labels = ("unacceptable", "acceptable")
    main = "matthews"
    metrics = ("matthews", "accuracy")
    rows = {"train": 8_551, "validation": 1_043}


class SST2(GLUE, name="sst2"):
    """Is the phrase of a film review positive? Accuracy."""

    text = ("sentence",)
    labels = ("negative", "positive")
    rows = {"train": 67_349, "validation": 872}


class MRPC(GLUE, name="mrpc"):
    """Do two sentences from the news say the same? Accuracy and F1."""

    text = ("sentence1", "sentence2")
    labels = ("not_equivalent", "equivalent")
    metrics = ("accuracy", "f1")
    rows = {"train": 3_668, "validation": 408}


class QQP(GLUE, name="qqp"):
    """Do two questions from Quora ask the same? Accuracy and F1."""

    text = ("question1", "question2")
    labels = ("not_duplicate", "duplicate")
    metrics = ("accuracy", "f1")
    rows = {"train": 363_846, "validation": 40_430}


class STSB(GLUE, name="stsb"):
    """How alike are two sentences, 0 to 5? A regression: Pearson and Spearman correlation."""

    text = ("sentence1", "sentence2")
    labels = ()
    main = "pearson"
    metrics = ("pearson", "spearman")
    rows = {"train": 5_749, "validation": 1_500}


class MNLI(GLUE, name="mnli"):
    """Does the premise entail the hypothesis? Accuracy on genres seen in training (matched) and not (mismatched)."""

    text = ("premise", "hypothesis")
    labels = ("entailment", "neutral", "contradiction")
    rows = {"train": 392_702, "validation_matched": 9_815, "validation_mismatched": 9_832}

    def evaluation(self) -> list[Split]:
        return [self._split("validation_matched"), self._split("validation_mismatched", suffix="_mismatched")]


class QNLI(GLUE, name="qnli"):
    """Does the sentence answer the question? Accuracy."""

    text = ("question", "sentence")
    labels = ("entailment", "not_entailment")
    rows = {"train": 104_743, "validation": 5_463}


class RTE(GLUE, name="rte"):
    """Does the first sentence entail the second? Accuracy on a small set."""

    text = ("sentence1", "sentence2")
    labels = ("entailment", "not_entailment")
    rows = {"train": 2_490, "validation": 277}


class WNLI(GLUE, name="wnli"):
    """Does the sentence hold with the pronoun filled in? Accuracy; left out of GLUE averages."""

    text = ("sentence1", "sentence2")
    labels = ("not_entailment", "entailment")
    rows = {"train": 635, "validation": 71}


class AX(GLUE, name="ax"):
    """GLUE's diagnostic set: trained on MNLI; its labels are not public, so it gives predictions and no metric."""

    text = MNLI.text
    labels = MNLI.labels
    main = ""
    metrics = ()
    rows = {"test": 1_104}

    def train(self) -> Split:
        return MNLI().train()

    def evaluation(self) -> list[Split]:
        return [self._split("test", labelled=False)]
