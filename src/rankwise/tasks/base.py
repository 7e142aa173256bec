"""What a task is: rows with a claim to be official, and the way from rows to batches to scores.

One family of tasks is one file: `classification`, `generation`, `segmentation`. A family knows what its model takes and
gives; a task of it only says where the rows are and what their columns mean.
"""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from rankwise.errors import InputError
from rankwise.named import Named
from rankwise.runs.answers import Answers

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Family = Literal["classification", "generation", "segmentation"]
Batch = dict[str, Tensor]

REFERENCES = "references"
"""The column of all right answers, in splits that have more than one for a row."""


@dataclass(frozen=True)
class Split:
    """Rows of one task, in columns that its family names; `idx` numbers them.

    `official` is True only for the rows that published numbers are computed on; `note` says why it is not. `own` is
    what messages call rows of the user's own, which have no published numbers, such as "your own data".
    `suffix` is appended to the metric names, so that two evaluation splits can stand in one table.
    """

    name: str
    data: "Dataset"
    official: bool
    note: str = ""
    suffix: str = ""
    own: str = ""

    @property
    def labelled(self) -> bool:
        """Whether the rows can be trained or scored on: they have labels that are not all -1."""
        return "label" in self.data.column_names and any(label != -1 for label in self.data["label"])


@dataclass(frozen=True)
class Evaluation:
    """One split on its way to a score: its rows, and the same rows as the model takes them, in the same order."""

    split: Split
    examples: "Dataset"


@dataclass(frozen=True)
class Scored:
    """What an evaluation found: loss and metrics by name, and a table with the prediction for each example.

    The table has the columns `split`, `idx`, `label` and `prediction`, whatever else the family adds, and one of these:
    `score`, the worth of each example, where the main metric is the mean of that; `statistics`, k numbers for each
    example, where their sums over the examples decide the main metric by its `value` in `rankwise.metrics.METRICS`.
    `notes` say what a reader of the metrics has to know, such as why one is missing.
    """

    metrics: dict[str, float]
    rows: "pa.Table"
    notes: tuple[str, ...] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """What to write beside the predictions, by file name: what a leaderboard takes, pictures."""
    answers: Answers | None = None
    """How often each answer was given, at the end of a run; None where there are none."""


@dataclass(frozen=True)
class Task(Named, ABC, kind="task"):
    """One task. A subclass names itself: `class CoLA(Classification, name="cola")`; its fields are the YAML options.

    Its docstring's first line is the summary.
    """

    family: ClassVar[Family]
    text: ClassVar[tuple[str, ...]] = ()
    """The columns that the model reads."""
    target: ClassVar[str] = "label"
    """The column that it learns."""
    labels: ClassVar[tuple[str, ...]] = ()
    """Names of the classes in the order of their numbers; empty where there are none."""
    main: ClassVar[str] = ""
    """Name of the metric that runs are compared by; empty where the labels are not public."""
    metrics: ClassVar[tuple[str, ...]] = ()
    benchmark: ClassVar[str] = ""
    """Name of the benchmark in whose average the task counts."""
    averaged: ClassVar[tuple[str, ...]] = ()
    """The metrics, suffixes included, whose mean counts there."""

    @property
    def label(self) -> str:
        """What tables call the task: its name, and the options that are not the default ones."""
        return " ".join([self.name, *self.given()])

    def given(self, aside: Sequence[str] = ()) -> list[str]:
        """The options that are not the default ones, as `beams=4`, those in `aside` left out."""
        found = []
        for option in fields(self):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            value = getattr(self, option.name)
            if value != default and option.name not in aside:
                found.append(f"{option.name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return found

    @abstractmethod
    def train(self) -> Split:
        """The training rows. InputError for data that is missing or damaged."""

    @abstractmethod
    def evaluation(self) -> list[Split]:
        """The rows to evaluate on, the main split first. InputError for data that is missing or damaged."""

    def apart(self) -> Split | None:
        """Rows to choose a learning rate by that are neither trained nor evaluated on; None where the task has none."""
        return None

    def tuning(self, train: Split, share: float) -> tuple[Split, Split]:
        """Rows to train on and rows to choose a learning rate by, none of which are rows to evaluate on.

        `share` of the rows of `train`, as it was read or a subset of it, are held out: the same whatever the seed and
        method of a run, and rows of which the model reads the same are all on one side. A task that has rows for that
        (`apart`) gives `train` whole and those. InputError for too few rows, and for a task without a score.
        """
        if not self.main:
            raise InputError(
                f"{self.name} has no score to choose a learning rate by: leave it out of an experiment with tune"
            )
        if (rows := self.apart()) is not None:
            return train, rows
        columns = zip(*(train.data[column][:] for column in self.text), strict=True)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, read in enumerate(columns):
            groups.setdefault(read, []).append(place)
        if len(groups) < 2:
            raise InputError(
                f"{train.name} has too few rows to hold some out for tuning: at least two that differ are needed"
            )
        order = list(groups.values())
        random.Random(0).shuffle(order)
        total = len(train.data)
        held: list[int] = []
        for group in order[:-1]:  # one at least stays
            if len(held) >= max(1, round(share * total)):
                break
            held += group
        parts = []
        for name, places in (("train", set(range(total)).difference(held)), ("held out", held)):
            note = f"{len(places):,} of {total:,} rows, {'without those held out' if name == 'train' else name}"
            data = train.data.select(sorted(places), keep_in_memory=True)
            note = f"{train.note}; {note}" if train.note else note
            parts.append(replace(train, data=data, official=False, note=note))
        return parts[0], replace(parts[1], name=f"{train.name}_held_out")

    @abstractmethod
    def encode(self, split: Split, processor: Any, max_length: int) -> "Dataset":
        """The rows of `split` in their order as `collate` and `evaluate` take them, with `length` to group them by.

        `processor` is what came with the model: the tokenizer of a text model.
        """

    def check(self, model: nn.Module, processor: Any, examples: "Dataset", name: str) -> None:  # noqa: B027
        """InputError for a row of encoded `examples`, those of the split `name`, that `model` cannot take."""

    @abstractmethod
    def collate(self, model: nn.Module, processor: Any, seed: int) -> Callable[[list[dict[str, Any]]], Batch]:
        """From encoded training rows to the batch that `model` computes its loss from.

        What is drawn at random for a batch depends on `seed` and on the rows in it alone, so that it can be repeated.
        InputError for a model, a processor and a task that do not fit together.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, evaluation: Evaluation, processor: Any, batch_size: int, final: bool
    ) -> Scored:
        """Loss and metrics on one split; during training (`final` False) what takes long may be left out.

        No random number is drawn, and the model stays in the mode it was in. ValueError for outputs that are not
        finite.
        """

    def revision(self, splits: Sequence[Split] | None = None, tuning: bool = False) -> str:
        """12 hex digits that change with any text, label or order of the data; the same wherever the data is stored.

        `splits` are the whole training and evaluation splits, if they have been read already. With `tuning` the rows
        that a learning rate is chosen by count too.
        """
        chosen_by = self.apart() if tuning else None
        digest = hashlib.sha256(json.dumps([self.text, self.labels]).encode())
        for split in (*(splits or (self.train(), *self.evaluation())), *([chosen_by] if chosen_by else [])):
            digest.update(f"\n{split.name}".encode())
            for column in (*self.text, self.target, REFERENCES):
                if column in split.data.column_names:
                    for batch in split.data.select_columns(column).iter(1_000):  # many rows at once: much faster
                        for value in batch[column]:
                            digest.update(value if isinstance(value, bytes) else json.dumps(value).encode())
        return digest.hexdigest()[:12]


def subset(split: Split, rows: int | None, seed: int = 0) -> Split:
    """`rows` rows of `split` in their old order, the same for one seed; a larger subset holds every smaller one.

    The whole split when `rows` is None or not fewer than there are. InputError for fewer than one row.
    """
    if rows is not None and rows < 1:
        raise InputError(f"a subset of {rows} rows of {split.name!r} holds nothing: ask for 1 row or more")
    total = len(split.data)
    if rows is None or rows >= total:
        return split
    order = list(range(total))
    random.Random(seed).shuffle(order)
    data = split.data.select(sorted(order[:rows]), keep_in_memory=True)
    drawn = f"{rows:,} of {total:,} rows, drawn with seed {seed}"
    return replace(split, data=data, official=False, note=f"{split.note}; {drawn}" if split.note else drawn)
