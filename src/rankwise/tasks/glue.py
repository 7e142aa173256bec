"""The GLUE benchmark (Wang et al. 2019, arXiv 1804.07461), from a folder of parquet files or from the Hugging Face hub.

`RANKWISE_DATA/glue/<task>/<split>.parquet` when the variable is set, `nyu-mll/glue` on the hub otherwise. Columns and
label numbers are those of `nyu-mll/glue`. A file `<split>_subset.parquet` replaces a missing split and is marked as not
official, as is any file whose number of rows is not the published one.
"""

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from rankwise.errors import InputError, need
from rankwise.tasks.base import Split
from rankwise.tasks.classification import Classification
from rankwise.tasks.source import Origin, Rows, checked

if TYPE_CHECKING:
    import pyarrow as pa

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class GLUE(Classification):
    """A GLUE task: its columns, labels and metrics, and the number of rows of its splits on the hub.

    Attributes:
        protocol: `official` scores all validation rows. `halves` splits them at random and scores the second half; the
            first is for choosing a learning rate, as `tune:` does (Ding et al. 2023, SoRA, since GLUE's test labels are
            not public).
        submission: also predict the unlabelled test rows, into files for the GLUE website.
    """

    main: ClassVar[str] = "accuracy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    counted: ClassVar[tuple[str, ...]] = ()
    """The metrics that count in GLUE's average, if not all do."""
    benchmark = "GLUE"
    rows: ClassVar[dict[str, int]]
    """Rows of each official split: the training split first, then those for evaluation."""
    tests: ClassVar[dict[str, tuple[str, int]]]
    """For each unlabelled split its file in a submission and its number of rows."""
    words: ClassVar[bool] = False
    """Whether a submission has the names of the labels instead of their numbers."""

    protocol: Literal["official", "halves"] = "official"
    submission: bool = False

    @property
    def averaged(self) -> tuple[str, ...]:  # type: ignore[override]
        """The metrics of all evaluation splits."""
        if not self.benchmark:
            return ()
        return tuple(name + suffix for suffix in self._suffixes() for name in self.counted or self.metrics)

    def train(self) -> Split:
        return self._split(next(iter(self.rows)))

    def evaluation(self) -> list[Split]:
        splits = self._validation()
        if self.protocol == "halves":
            splits = [_half(split, second=True) for split in splits]
        return [*splits, *(self._test(name) for name in self.tests if self.submission)]

    def apart(self) -> Split | None:
        """The first half of the validation rows, with `protocol: halves`."""
        return _half(self._validation()[0], second=False) if self.protocol == "halves" else None

    def _validation(self) -> list[Split]:
        names = list(self.rows)[1:]
        return [self._split(name, suffix) for name, suffix in zip(names, self._suffixes(), strict=True)]

    def files(self, split: Split, predicted: np.ndarray) -> dict[str, str | bytes]:
        """The file of a submission, if `split` is a complete test split: a line per row, with number and prediction."""
        file, count = self.tests.get(split.name, ("", 0))
        if not file or len(predicted) != count:
            return {}
        predictions = predicted.tolist()
        if not self.labels:
            texts = [f"{min(max(value, 0.0), 5.0):.3f}" for value in predictions]
        else:
            texts = [self.labels[value] if self.words else str(value) for value in predictions]
        lines = [f"{number}\t{text}" for number, text in enumerate(texts)]
        return {file: "\n".join(["index\tprediction", *lines, ""])}

    def _suffixes(self) -> tuple[str, ...]:
        return ("",)

    def _test(self, name: str) -> Split:
        datasets = need("datasets", "bench")
        pa = need("pyarrow", "bench")
        rows = self._origin().read(name)
        unlabelled = pa.array([-1] * rows.table.num_rows)  # MRPC's test rows have labels, which must not be used
        inputs = rows.table.drop_columns(["label"]) if "label" in rows.table.column_names else rows.table
        table = _checked(replace(rows, table=inputs.append_column("label", unlabelled)), self.text, self.labels, False)
        note = rows.note(name, self.tests[name][1])
        return Split(rows.split, datasets.Dataset(table), not note, note, "_submission")

    def _origin(self) -> Origin:
        return Origin("GLUE", f"glue/{self.name}", HUB, self.name)

    def _split(self, name: str, suffix: str = "", labelled: bool = True) -> Split:
        datasets = need("datasets", "bench")
        rows = self._origin().read(name)
        table = _checked(rows, self.text, self.labels, labelled)
        note = rows.note(name, self.rows[name])
        return Split(rows.split, datasets.Dataset(table), not note, note, suffix)


def _half(split: Split, second: bool) -> Split:
    """One half of the rows, in their order, the same for all seeds."""
    order = list(range(len(split.data)))
    random.Random(0).shuffle(order)
    middle = len(order) // 2
    which, half = ("second", order[middle:]) if second else ("first", order[:middle])
    part = split.part(half, f"the {which} half of {split.name}, drawn with seed 0")
    return replace(part, name=f"{split.name}_{which}")


def _checked(rows: Rows, text: tuple[str, ...], labels: tuple[str, ...], labelled: bool) -> "pa.Table":
    """The columns text, label and idx of `rows`, in the hub's types; InputError for bad rows."""
    pa = need("pyarrow", "bench")
    compute = need("pyarrow.compute", "bench")
    if "idx" not in rows.table.column_names:
        rows = replace(rows, table=rows.table.append_column("idx", pa.array(range(rows.table.num_rows), pa.int64())))
    label = pa.int64() if labels else pa.float32()
    table = checked(rows, dict.fromkeys(text, pa.string()) | {"label": label, "idx": pa.int64()})
    low, high = (0, len(labels) - 1) if labels else (0.0, 5.0)
    values = table["label"]
    if labelled:
        inside = compute.and_(compute.greater_equal(values, low), compute.less_equal(values, high))
    else:
        low = high = -1
        inside = compute.equal(values, -1)
    row = compute.index(inside, False).as_py()
    if row != -1:
        allowed = f"{low} to {high}" if low != high else f"{low}"
        raise InputError(f"{rows.where}: label {values[row].as_py()} in {rows.at(row)} is not {allowed}: {rows.remedy}")
    return table


class CoLA(GLUE, name="cola"):
    """Is the sentence grammatical? Matthews correlation."""

    text = ("sentence",)
    labels = ("unacceptable", "acceptable")
    main = "matthews"
    metrics = ("matthews", "accuracy")
    counted = ("matthews",)
    rows = {"train": 8_551, "validation": 1_043}
    tests = {"test": ("CoLA.tsv", 1_063)}


class SST2(GLUE, name="sst2"):
    """Is the phrase of a film review positive? Accuracy."""

    text = ("sentence",)
    labels = ("negative", "positive")
    rows = {"train": 67_349, "validation": 872}
    tests = {"test": ("SST-2.tsv", 1_821)}


class MRPC(GLUE, name="mrpc"):
    """Do two sentences from the news say the same? Accuracy and F1."""

    text = ("sentence1", "sentence2")
    labels = ("not_equivalent", "equivalent")
    metrics = ("accuracy", "f1")
    rows = {"train": 3_668, "validation": 408}
    tests = {"test": ("MRPC.tsv", 1_725)}


class QQP(GLUE, name="qqp"):
    """Do two questions from Quora ask the same? Accuracy and F1."""

    text = ("question1", "question2")
    labels = ("not_duplicate", "duplicate")
    metrics = ("accuracy", "f1")
    rows = {"train": 363_846, "validation": 40_430}
    tests = {"test": ("QQP.tsv", 390_965)}


class STSB(GLUE, name="stsb"):
    """How alike are two sentences, 0 to 5? A regression: Pearson and Spearman correlation."""

    text = ("sentence1", "sentence2")
    labels = ()
    main = "pearson"
    metrics = ("pearson", "spearman")
    rows = {"train": 5_749, "validation": 1_500}
    tests = {"test": ("STS-B.tsv", 1_379)}


class MNLI(GLUE, name="mnli"):
    """Does the premise entail the hypothesis? Accuracy on genres seen in training (matched) and not (mismatched)."""

    text = ("premise", "hypothesis")
    labels = ("entailment", "neutral", "contradiction")
    rows = {"train": 392_702, "validation_matched": 9_815, "validation_mismatched": 9_832}
    tests = {"test_matched": ("MNLI-m.tsv", 9_796), "test_mismatched": ("MNLI-mm.tsv", 9_847)}
    words = True

    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_mismatched")


class QNLI(GLUE, name="qnli"):
    """Does the sentence answer the question? Accuracy."""

    text = ("question", "sentence")
    labels = ("entailment", "not_entailment")
    rows = {"train": 104_743, "validation": 5_463}
    tests = {"test": ("QNLI.tsv", 5_463)}
    words = True


class RTE(GLUE, name="rte"):
    """Does the first sentence entail the second? Accuracy on a small set."""

    text = ("sentence1", "sentence2")
    labels = ("entailment", "not_entailment")
    rows = {"train": 2_490, "validation": 277}
    tests = {"test": ("RTE.tsv", 3_000)}
    words = True


class WNLI(GLUE, name="wnli"):
    """Does the sentence hold with the pronoun filled in? Accuracy; left out of GLUE averages."""

    text = ("sentence1", "sentence2")
    labels = ("not_entailment", "entailment")
    benchmark = ""
    rows = {"train": 635, "validation": 71}
    tests = {"test": ("WNLI.tsv", 146)}


@dataclass(frozen=True)
class AX(GLUE, name="ax"):
    """GLUE's diagnostic set: trained on MNLI; its labels are not public, so there are predictions but no metrics."""

    text = MNLI.text
    labels = MNLI.labels
    main = ""
    metrics = ()
    benchmark = ""
    rows = {"test": 1_104}
    tests = {"test": ("AX.tsv", 1_104)}
    words = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol != "official" or self.submission:
            raise InputError("ax has no labelled rows, and always writes a submission: leave its options out")

    def train(self) -> Split:
        return MNLI().train()

    def evaluation(self) -> list[Split]:
        return [self._split("test", labelled=False)]
