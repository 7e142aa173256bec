"""Anyone's data, without code: `task: {type: …, dataset: …, columns: …}`.

    type             columns                    label or target
    classification   text, label                a name or a whole number; the classes are those of the training rows
    pair             text, text_pair, label     the same
    regression       text[, text_pair], label   a number
    seq2seq          text, target               a text, written by an encoder-decoder or a decoder
    causal           text, target               a text, written by a decoder
    segmentation     image, mask                an image whose pixels are class numbers

`metrics` names what the first three are scored by; runs are compared, and learning rates chosen, by the first of them.
`columns` names the column of each role; a role without one is the column of that name. No column has two roles, and
none that is read may hold the answer of every row. Labels that look alike are refused; labels that differ in case alone
give a warning. The dataset is a folder with a file for each split (`train.csv`, `validation.csv`; or .jsonl,
.json or .parquet), one such file, or a name on the hub. A tenth of a single file, chosen by the content of its rows, is
held out.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from rankwise.errors import InputError, nearest, need
from rankwise.metrics import Metric, classification, regression
from rankwise.metrics.names import chosen, spellings
from rankwise.runs.answers import listed
from rankwise.tasks.base import Scored, Split, Task, tell
from rankwise.tasks.classification import Classification
from rankwise.tasks.segmentation import Segmentation
from rankwise.tasks.source import Rows, checked, folded, own_split, read
from rankwise.tasks.summarisation import Summarisation

if TYPE_CHECKING:
    import pyarrow as pa

HELD_OUT = 10
"""One row in so many of a single file is scored and not trained on."""


@dataclass(frozen=True)
class Custom(Task):
    """Rows that a user names.

    Attributes:
        dataset: a folder with a file for each split, a file, or a name on the hub.
        columns: from role to column: text, text_pair, label, target.
        split: the rows to score: a file's name without its ending, or a split on the hub.
    """

    roles: ClassVar[tuple[str, ...]] = ()

    dataset: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "validation"

    def __post_init__(self) -> None:
        if not self.dataset:
            raise InputError(
                f"task {self.name} needs a dataset: a folder with train.csv (or .jsonl, .json, .parquet), or a name"
            )
        for role in self.columns:
            if role not in self.roles:
                known = ", ".join(self.roles)
                raise InputError(
                    f"columns: {self.name} has no role {role!r}{nearest(role, self.roles)}; it has {known}"
                )
        by_column: dict[str, str] = {}
        for role in self.used:
            column = self.columns.get(role, role)
            if (other := by_column.setdefault(column, role)) != role:
                raise InputError(
                    f"columns: {column!r} has two roles, {other} and {role}; each needs a column of its own"
                )
        super().__post_init__()

    @property
    def used(self) -> tuple[str, ...]:
        """The roles that a column is read for."""
        return self.roles

    @property
    def asked(self) -> dict[str, str]:
        # a text to answer is called `source` in its family
        named = {"source": self.columns.get("text", "text"), **self.columns}
        return {role: named.get(role, role) for role in self.text if self.form}

    @property
    def label(self) -> str:
        # no path: a result says nothing about where on the disk its data lies
        kind = self.name if self.main == type(self).main else f"{self.name}, {self.main}"
        options = self.changed_options(omit=("dataset", "columns", "metrics"))
        return " ".join([f"{Path(self.dataset).stem} ({kind})", *options])

    def train(self) -> Split:
        return self._split("train")

    def evaluation(self) -> list[Split]:
        return [self._split(self.split)]

    @abstractmethod
    def table(self, rows: Rows) -> "pa.Table":
        """The columns of `rows` under the names of their roles, checked."""

    def same(self, read: Any, answer: Any) -> bool:
        """Whether what a row gives to read is its answer, both as `table` has them."""
        return bool(read == answer)

    def warning(self, table: "pa.Table") -> str:
        """What is odd about the training rows, and then stands in every table; "" for nothing."""
        return ""

    @cached_property
    def _train(self) -> tuple[Rows, "pa.Table"]:
        """The training rows as they are in the file, and as `table` has them."""
        rows = self.fetch("train")
        table = self.table(rows)
        self._check_told(rows, table)
        return rows, table

    @cached_property
    def _trained_on(self) -> set[int]:
        return set(map(hash, _reads(self._train[1])))

    def _split(self, name: str) -> Split:
        pa = need("pyarrow", "bench")
        file = Path(self.dataset).expanduser()
        rows, table = self._train
        if name == "train":
            warning = self.warning(table)
        else:
            rows = self.fetch(name)
            table = self.table(rows)
            known = 0 if file.is_file() else sum(hash(each) in self._trained_on for each in _reads(table))
            warning = f"{known:,} of {table.num_rows:,} rows are read in training too" if known else ""
        own = "your own data"
        table = table.append_column("number", pa.array(rows.counted, pa.int64()))
        if warning:
            tell(f"{rows.where}: {warning}")
        if file.is_file():
            grouped = self.grouped or [role for role in table.column_names if role in _READ]
            held = [_drawn([row[role] for role in grouped]) for row in table.to_pylist()]
            table = table.filter(pa.array([each == (name != "train") for each in held]))
            own = "your file that were " + ("held out of training" if name != "train" else "not held out")
            if table.num_rows == 0:
                raise InputError(f"{rows.where} has too few rows to hold some out: give a folder with a file per split")
        table = table.append_column("idx", pa.array(range(table.num_rows), pa.int64()))
        return Split(name, need("datasets", "bench").Dataset(table), False, warning, own=own, unit=rows.unit)

    def fetch(self, name: str, dataset: str = "") -> Rows:
        """The rows of the split `name`, as they are in the file; of another dataset than the task's if it is given."""
        return read(dataset or self.dataset, name)

    def own_rows(self, file: str) -> Split:
        rows = self.fetch("", file)
        return own_split(rows, self.table(rows))

    def _check_told(self, rows: Rows, table: "pa.Table") -> None:
        """InputError where a column that is read has the answer of every row."""
        for role in set(table.column_names) & _READ:
            pairs = zip(table[role], table[self.target], strict=True)
            if all(self.same(read.as_py(), answer.as_py()) for read, answer in pairs):
                column = self.columns.get(role, role)
                raise InputError(
                    f"{rows.where}: the column {column!r} has the answer of every row: name another one as {role}"
                )

    def _named(self, rows: Rows, types: dict[str, Any], filled: tuple[str, ...] = ()) -> "pa.Table":
        """`checked`, with the user's column names in messages and the roles' names in the table."""
        given = {role: self.columns.get(role, role) for role in types}
        table = checked(rows, {given[role]: kind for role, kind in types.items()}, [given[role] for role in filled])
        return table.rename_columns(list(types))


_READ = frozenset({"text", "text_pair", "source", "image"})
"""Columns of `Custom.table` that a model reads."""


def _reads(table: "pa.Table") -> Iterator[tuple[Any, ...]]:
    """What is read in each row."""
    columns = [table[role] for role in table.column_names if role in _READ]
    return (tuple(each.as_py() for each in row) for row in zip(*columns, strict=True))


def _drawn(content: list[Any]) -> bool:
    """Whether a row is held out: by what is read alone, so that equal texts stay together whatever their order."""
    return int(hashlib.sha256(repr(content).encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def _names(known: Mapping[str, Metric]) -> Any:
    return Field(json_schema_extra=lambda schema: schema.update(enum=[*spellings(known)]))  # those of plugins too


OfClasses = Annotated[str, _names(classification.METRICS)]
OfNumbers = Annotated[str, _names(regression.METRICS)]


@dataclass(frozen=True)
class Measured(Custom, Classification):
    """Rows whose metrics a user names.

    Attributes:
        metrics: names of scikit-learn's scorers; runs are compared, and learning rates chosen, by the first one.
    """

    possible: ClassVar[Mapping[str, Metric]]

    metrics: tuple[str, ...] = field(default=(), kw_only=True)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        metrics = chosen(self.metrics, self.possible, self.name)
        object.__setattr__(self, "metrics", metrics)
        object.__setattr__(self, "main", metrics[0])


@dataclass(frozen=True)
class Labelled(Measured):
    """Rows with a class each."""

    main = "accuracy"
    possible = classification.METRICS
    roles: ClassVar[tuple[str, ...]] = ("text", "label")

    metrics: tuple[OfClasses, ...] = field(default=("accuracy", "matthews"), kw_only=True)  # type: ignore[misc]

    @property
    def text(self) -> tuple[str, ...]:  # type: ignore[override]
        """The roles that are read."""
        return tuple(role for role in self.roles if role.startswith("text"))

    @cached_property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """The classes of the training rows; numbers in their order, names by the alphabet."""
        rows = read(self.dataset, "train")
        found = set(self._classes(rows).to_pylist())
        if len(found) < 2:
            raise InputError(f"{rows.where} has one class only, {min(found)!r}: there is nothing to tell apart")
        by_look: dict[str, str] = {}
        for name in sorted(found, key=_place):
            if (other := by_look.setdefault(folded(name), name)) != name:
                raise InputError(
                    f"{rows.where} has the labels {other!a} and {name!a}, which look alike: write one of them for both"
                )
        if self._of_two and len(found) > 2:
            kinds = ", ".join(f"{self._of_two[0]}_{kind}" for kind in ("macro", "micro", "weighted"))
            raise InputError(
                f"metrics: {self._of_two[0]} is for two classes, and {rows.where} has {len(found)}; take one of {kinds}"
            )
        return tuple(sorted(found, key=_place))

    @property
    def _of_two(self) -> list[str]:
        """The metrics that are computed for the second class alone."""
        return [name for name in self.metrics if name in classification.OF_TWO]

    def evaluate(self, *args: Any, **options: Any) -> Scored:
        scored = super().evaluate(*args, **options)
        notes = [f"{name} is that of the class {self.labels[1]!r}" for name in self._of_two]
        present = set(scored.rows["label"].to_pylist())
        absent = [name for place, name in enumerate(self.labels) if place not in present]
        means = [name for name in self.metrics if name.endswith("_macro") or name == "balanced_accuracy"]
        if absent and means:
            notes.append(
                f"no evaluation row is labelled {listed(absent)}: {means[0]} is a mean over the classes that occur"
            )
        return replace(scored, notes=(*scored.notes, *notes))

    def warning(self, table: "pa.Table") -> str:
        by_word: dict[str, str] = {}
        for name in self.labels:
            if (other := by_word.setdefault(folded(name).casefold(), name)) != name:
                return f"the labels {other!r} and {name!r} differ in case alone, and are two classes"
        return ""

    def same(self, read: Any, answer: Any) -> bool:
        return folded(read) == folded(self.labels[answer])

    def table(self, rows: Rows) -> "pa.Table":
        pa = need("pyarrow", "bench")
        table = self._named(rows, {role: pa.string() for role in self.text}, self.text)
        return table.append_column("label", self._numbers(rows, self._classes(rows)))

    def _classes(self, rows: Rows) -> Any:
        pa = need("pyarrow", "bench")
        column = self.columns.get("label", "label")
        if column in rows.table.column_names and pa.types.is_floating(rows.table[column].type):
            for row, value in enumerate(rows.table[column].to_pylist()):
                if value is not None and not math.isfinite(value):
                    raise InputError(f"{rows.where}: the label {value} in {rows.at(row)} is no class: {rows.remedy}")
        return self._named(rows, {"label": pa.string()}, ("label",))["label"]


def _place(name: str) -> tuple[bool, float, str]:
    """For sorting: whole numbers by their size, then names."""
    number = name.removeprefix("-").isdecimal()
    return not number, float(name) if number else math.inf, name


@dataclass(frozen=True)
class CustomClassification(Labelled, name="classification"):
    """Your own rows of a text and its class. Accuracy and Matthews correlation, or other `metrics`."""


@dataclass(frozen=True)
class CustomPair(Labelled, name="pair"):
    """Your own rows of two texts and their class. Accuracy and Matthews correlation, or other `metrics`."""

    roles = ("text", "text_pair", "label")


@dataclass(frozen=True)
class CustomRegression(Measured, name="regression"):
    """Your own rows of a text, or two, and a number. Pearson and Spearman correlation, or other `metrics`."""

    main = "pearson"
    possible = regression.METRICS
    roles = ("text", "text_pair", "label")

    metrics: tuple[OfNumbers, ...] = field(default=("pearson", "spearman"), kw_only=True)  # type: ignore[misc]

    @property
    def text(self) -> tuple[str, ...]:  # type: ignore[override]
        """The roles that are read: the second text where `columns` names it."""
        return ("text", "text_pair") if "text_pair" in self.columns else ("text",)

    @property
    def used(self) -> tuple[str, ...]:
        return (*self.text, "label")

    def same(self, read: Any, answer: Any) -> bool:
        try:
            return bool(np.float32(read) == answer)
        except ValueError:
            return False

    def table(self, rows: Rows) -> "pa.Table":
        pa = need("pyarrow", "bench")
        table = self._named(rows, {role: pa.string() for role in self.text} | {"label": pa.float32()}, self.text)
        values = table["label"].to_pylist()
        row = next((row for row, value in enumerate(values) if not math.isfinite(value)), None)
        if row is not None:
            raise InputError(f"{rows.where}: the label {values[row]} in {rows.at(row)} is not finite: {rows.remedy}")
        return table


@dataclass(frozen=True)
class Written(Custom, Summarisation):
    """Rows with a text to write each; what is written may also be called their label."""

    roles = ("text", "target", "label")

    def __post_init__(self) -> None:
        super().__post_init__()
        if {"target", "label"} <= self.columns.keys():
            raise InputError("columns: target and label are two words for what is to be written; name one column")

    @property
    def used(self) -> tuple[str, ...]:
        return ("text", "label" if "label" in self.columns else "target")

    def same(self, read: Any, answer: Any) -> bool:
        return False  # a text may be there to be copied, of which `warning` tells

    def warning(self, table: "pa.Table") -> str:
        return "each target is its own text" if table["source"].equals(table["target"]) else ""

    def table(self, rows: Rows) -> "pa.Table":
        pa = need("pyarrow", "bench")
        kinds = dict.fromkeys(self.used, pa.string())
        return self._named(rows, kinds, self.used).rename_columns(["source", "target"])


@dataclass(frozen=True)
class CustomSeq2Seq(Written, name="seq2seq"):
    """Your own rows of a text and the text to write for it, by an encoder-decoder or a decoder. ROUGE-1, 2 and L."""


@dataclass(frozen=True)
class CustomCausal(Written, name="causal"):
    """Your own rows of a prompt and how it goes on, written by a decoder. ROUGE-1, 2 and L."""


@dataclass(frozen=True)
class CustomSegmentation(Custom, Segmentation, name="segmentation"):
    """Your own images and masks, in a folder for each split or in parquet files. Dice and IoU.

    A folder holds `train/images` and `train/masks`, and the same for its other splits, with files of the same names
    (the endings may differ). Parquet files have the columns `image` and `mask`, the bytes of image files.

    Attributes:
        names: the classes in the order of their numbers in the masks; other numbers do not count. Two are a background
            and a foreground, whose masks may also have 255 for the foreground.
    """

    roles = ("image", "mask")
    names: tuple[str, ...] = ("background", "foreground")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.names) < 2:
            raise InputError(f"names must be two classes at least, not {list(self.names)}")

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """The classes."""
        return self.names

    def table(self, rows: Rows) -> "pa.Table":
        pa = need("pyarrow", "bench")
        table = self._named(rows, {"image": pa.binary(), "mask": pa.binary()})
        files = rows.table["where"] if "where" in rows.table.column_names else None
        return table.append_column("where", files or [[f"{rows.where}, {rows.at(row)}" for row in range(len(table))]])

    def numbers(self, mask: np.ndarray) -> np.ndarray:
        if self.classes == 1:
            mask = np.where(mask == 255, 1, mask)
        return super().numbers(mask)

    def fetch(self, name: str, dataset: str = "") -> Rows:
        folder = Path(dataset or self.dataset).expanduser() / name
        return _pictures(folder) if (folder / "images").is_dir() else super().fetch(name, dataset)


def _pictures(folder: Path) -> Rows:
    """The files of `folder/images`, each with that of the same name in `folder/masks`, by name."""
    pa = need("pyarrow", "bench")
    masks = {file.stem: file for file in sorted((folder / "masks").glob("*")) if file.is_file()}
    images = [file for file in sorted((folder / "images").glob("*")) if file.is_file()]
    if lonely := [file for file in images if file.stem not in masks]:
        raise InputError(f"{lonely[0]} has no mask: put one called {lonely[0].stem}.png into {folder / 'masks'}")
    columns = {
        "image": pa.array([file.read_bytes() for file in images], pa.binary()),
        "mask": pa.array([masks[file.stem].read_bytes() for file in images], pa.binary()),
        "where": [str(file) for file in images],
    }
    return Rows(pa.table(columns), folder.name, str(folder / "images"), "put some there")
