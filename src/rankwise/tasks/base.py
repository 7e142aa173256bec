"""What a task is: rows, official or not, and how they become batches and scores.

Each family of tasks is one file: `classification`, `generation`, `segmentation`. A family handles a model's inputs and
outputs; a task says where its rows are and what their columns mean.
"""

import functools
import hashlib
import json
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise.errors import InputError, nearest, need
from rankwise.named import Named
from rankwise.runs.answers import Answers

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Family = Literal["classification", "generation", "segmentation"]
Batch = dict[str, Tensor]

REFERENCES = "references"
"""The column of all right answers, in splits with several for a row."""


@dataclass(frozen=True)
class Split:
    """Rows of one task, in the columns of its family; `idx` numbers them.

    Rows of a user's file also have a column `number`, by which messages name them; `unit` is what it counts.
    `official` is True only for the rows that published numbers are computed on; else `note` says why not. `own` is the
    name in messages of a user's own rows, without published numbers, such as "your own data". `suffix` is appended to
    the names of metrics, so that one table can have two evaluation splits.
    """

    name: str
    data: "Dataset"
    official: bool
    note: str = ""
    suffix: str = ""
    own: str = ""
    unit: str = "row"

    @property
    def labelled(self) -> bool:
        """Whether the rows can be trained or scored on: they have labels that are not all -1."""
        return "label" in self.data.column_names and any(label != -1 for label in self.data["label"])

    def part(self, places: Iterable[int], note: str) -> "Split":
        """The rows at `places` alone, in their order, which are not the official ones; `note` is added to the note."""
        data = self.data.select(sorted(places), keep_in_memory=True)
        return replace(self, data=data, official=False, note=f"{self.note}; {note}" if self.note else note)


@dataclass(frozen=True)
class Evaluation:
    """A split to be scored: its rows, and the same rows encoded for the model, in the same order.

    Unless the encoded rows have a column `idx` with the place in the split of the row that each is (the beginning) of.
    """

    split: Split
    examples: "Dataset"


@dataclass(frozen=True)
class Scored:
    """The result of an evaluation: loss and metrics by name, and a table with the prediction for each example.

    The table has the columns `split`, `idx`, `label` and `prediction`, more from the family, and one of these: `score`,
    a value for each example, if the main metric is its mean; or `statistics`, k numbers for each example, if the main
    metric is the `value` (in `rankwise.metrics.METRICS`) of their sums over the examples. `notes` are for readers of
    the metrics, such as why one is missing.
    """

    metrics: dict[str, float]
    rows: "pa.Table"
    notes: tuple[str, ...] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Other files to write with the predictions, by name: submissions to a leaderboard, pictures."""
    answers: Answers | None = None
    """How often each answer was given, at the end of a run; None without answers."""


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
    grouped: ClassVar[tuple[str, ...]] = ()
    """The columns by which rows stay together when some are held out; empty for those that the model reads."""
    labels: ClassVar[tuple[str, ...]] = ()
    """Names of the classes by number; empty without classes."""
    main: ClassVar[str] = ""
    """Name of the metric that runs are compared by; empty if the labels are not public."""
    metrics: ClassVar[tuple[str, ...]] = ()
    benchmark: ClassVar[str] = ""
    """Name of the benchmark that the task is part of."""
    averaged: ClassVar[tuple[str, ...]] = ()
    """The metrics, with suffixes, whose mean counts in the benchmark's average."""
    decoder_only: ClassVar[bool] = False
    """Whether an encoder-decoder is refused."""

    form: ClassVar[str] = ""
    """What an answer to a row is, see `runs.use.Use`; "" where a model has none to give."""

    @classmethod
    def prepare(cls) -> None:
        """Read what is the same for every run, before processes are forked for several: without a thread."""

    @property
    def asked(self) -> dict[str, str]:
        """The roles that a row must have to be answered, each with its column."""
        return {role: role for role in self.text} if self.form else {}

    @property
    def added(self) -> tuple[str, ...]:
        """The columns that an answer has."""
        probabilities = (f"probability_{label}" for label in self.labels) if self.form == "class" else ()
        return ("prediction", *probabilities)

    def question(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """What `row`, a row of a user's by its columns, asks, as a row of the family; `where` names it in messages.

        InputError for a column of `asked` that is missing or holds no text.
        """
        return {role: text_of(row, column, where) for role, column in self.asked.items()}

    def answer(
        self, model: nn.Module, questions: Sequence[Mapping[str, Any]], processor: Any, max_length: int, batch_size: int
    ) -> list[dict[str, Any]]:
        """The columns `added` for each of `questions`, which `question` has made; no random number is drawn."""
        raise InputError(f"task: {self.name} has no answers to give to rows of yours; `rankwise evaluate` scores it")

    def own_rows(self, file: str) -> Split:
        """All rows of a user's file, labelled, to be scored. InputError where the task cannot read such rows."""
        raise InputError(f"task: {self.name} cannot be scored on a file of yours, only on its own rows")

    def dressed(self, processor: Any) -> Any:
        """The tokenizer as it is saved for whoever asks the model: with the template of its prompts."""
        return processor

    @property
    def label(self) -> str:
        """The task's name in tables, with the options that are not the default."""
        return " ".join([self.name, *self.changed_options()])

    def changed_options(self, omit: Sequence[str] = ()) -> list[str]:
        """The options that are not the default, such as `beams=4`, without those in `omit`."""
        changed = []
        for option in fields(self):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            value = getattr(self, option.name)
            if value != default and option.name not in omit:
                changed.append(f"{option.name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return changed

    @abstractmethod
    def train(self) -> Split:
        """The training rows. InputError for data that is missing or damaged."""

    @abstractmethod
    def evaluation(self) -> list[Split]:
        """The rows to evaluate on, the main split first. InputError for data that is missing or damaged."""

    def apart(self) -> Split | None:
        """The task's own rows to choose a learning rate by, neither for training nor for evaluation; None without."""
        return None

    def tuning(self, whole: Split, part: float, train_rows: int | None = None) -> tuple[Split, Split]:
        """Rows to train on and rows to choose a learning rate by, none of them for evaluation.

        `part` below 1 is the share of the training rows, `train_rows` of `whole`, that is held out. From 1 on it is a
        number of different inputs among the rows of `whole` that are not trained on. Either way they are the same for
        every seed and method, and rows with equal inputs are on one side. A task with rows for this (`apart`) returns
        all training rows and those, or `part` of their inputs. InputError for too few rows, and for a task without a
        score.
        """
        if not self.main:
            raise InputError(
                f"{self.name} has no score to choose a learning rate by: leave it out of an experiment with tune"
            )
        train = subset(whole, train_rows)
        if (rows := self.apart()) is not None:
            return train, self._drawn(rows, self._by_input(rows), int(part)) if part >= 1 else rows
        if part >= 1:
            known = self._by_input(train)
            left = {inputs: places for inputs, places in self._by_input(whole).items() if inputs not in known}
            held = self._drawn(whole, left, int(part), "none of them trained on")
            return train, replace(held, name=f"{whole.name}_held_out")
        groups = self._by_input(train)
        if len(groups) < 2:
            raise InputError(
                f"{train.name} has too few rows to hold some out for tuning: at least two different ones are needed"
            )
        order = list(groups.values())
        random.Random(0).shuffle(order)
        total = len(train.data)
        held_out: list[int] = []
        for group in order[:-1]:  # at least one group stays
            if len(held_out) >= max(1, round(part * total)):
                break
            held_out += group
        rest = {*range(total)}.difference(held_out)
        held = train.part(held_out, f"{len(held_out):,} of {total:,} rows, held out")
        return (
            train.part(rest, f"{len(rest):,} of {total:,} rows, without those held out"),
            replace(held, name=f"{train.name}_held_out"),
        )

    def _drawn(
        self, split: Split, groups: Mapping[bytes, list[int]], count: int, what: str = "drawn at random"
    ) -> Split:
        """The rows of `count` of the inputs in `groups`, as `_by_input` has them; larger draws contain smaller ones."""
        if not groups:
            raise InputError(
                f"tune.rows = {count:,}: all rows of {split.name}, or others with the same input, are trained on; set "
                f"train_rows to fewer than these {len(split.data):,}, or give tune.share in place of tune.rows"
            )
        if len(groups) < count:
            raise InputError(
                f"tune.rows = {count:,}: {split.name} has {len(groups):,} different inputs that are not trained on; "
                "ask for no more than that, lower train_rows, or give tune.share in place of tune.rows"
            )
        order = list(groups.values())
        random.Random(0).shuffle(order)
        chosen = [place for places in order[:count] for place in places]
        inputs = f", with {count:,} different inputs" if len(chosen) > count else ""
        return split.part(chosen, f"{len(chosen):,} of {len(split.data):,} rows{inputs}, {what}")

    def _by_input(self, split: Split) -> dict[bytes, list[int]]:
        """The places of the rows with each input, in the order of their first; of an input only a digest is kept."""
        groups: dict[bytes, list[int]] = {}
        columns, place = list(self.grouped or self.text), 0
        for batch in split.data.select_columns(columns).iter(1_000):
            for inputs in zip(*(batch[column] for column in columns), strict=True):
                groups.setdefault(hashlib.sha256(repr(inputs).encode()).digest(), []).append(place)
                place += 1
        return groups

    @abstractmethod
    def encode(self, split: Split, processor: Any, max_length: int) -> "Dataset":
        """The rows of `split`, in their order, encoded for `collate` and `evaluate`, with `length` to group them by.

        A family whose rows may be too long to learn from may leave some out; a column `idx` then has their places.

        `processor` is the tokenizer of a text model, None for segmentation.
        """

    def kept(self, split: Split, examples: "Dataset") -> Split:
        """`split` without the rows that `encode` left out of `examples`, with a note of what became of long ones."""
        return split

    def written(self) -> dict[str, int]:
        """What a decoder reads in training after `max_length` tokens, by name, in tokens."""
        return {}

    def check(self, model: nn.Module, processor: Any, examples: "Dataset", name: str) -> None:  # noqa: B027
        """InputError if `model` cannot take a row of the encoded `examples` of the split `name`."""

    @abstractmethod
    def collate(self, model: nn.Module, processor: Any, seed: int) -> Callable[[list[dict[str, Any]]], Batch]:
        """A function from encoded training rows to the batch from which `model` computes its loss.

        Anything random in a batch depends only on `seed` and its rows, so that it can be repeated. InputError for a
        model, processor and task that do not fit together.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, evaluation: Evaluation, processor: Any, batch_size: int, final: bool
    ) -> Scored:
        """Loss and metrics on one split; during training (`final` False) slow metrics may be left out.

        It uses no random numbers, and does not change the model's mode. ValueError for outputs that are not finite.
        """

    def revision(self, splits: Sequence[Split] | None = None, tuning: bool = False) -> str:
        """12 hex digits that change with any text, label or order of the data, but not with where it is stored.

        `splits` are the whole training and evaluation splits, if they were read already. With `tuning` the rows for
        choosing a learning rate count too.
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


@functools.cache
def tell(text: str) -> None:
    """Print a warning, once."""
    print(f"warning: {text}", file=sys.stderr)


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column of a user's row. InputError if there is none."""
    if column not in row:
        names = ", ".join(row) + nearest(column, row)
        raise InputError(
            f"{where} has no column {column!r}, only {names}: rename one of these, or, where the task is data of your "
            "own, name it by task.columns.text=NAME"
        )
    value = row[column]
    # numbers in JSON are read as `checked` reads them for training
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    elif isinstance(value, float):
        pa = need("pyarrow", "bench")
        value = pa.array([value]).cast(pa.string())[0].as_py()
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {column!r} holds {type(value).__name__}, not text")
    if not (value or "").strip():
        raise InputError(f"{where} has an empty {column}: fill it in or leave the row out")
    return str(value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context for forward passes in evaluation mode, without gradients; afterwards the model is in its mode again."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def subset(split: Split, rows: int | None, seed: int = 0) -> Split:
    """`rows` random rows of `split` in their order, the same for one seed; larger subsets contain smaller ones.

    The whole split if `rows` is None or at least their number. InputError for fewer than one row.
    """
    if rows is not None and rows < 1:
        raise InputError(f"a subset of {rows} rows of {split.name!r} is empty: ask for 1 row or more")
    total = len(split.data)
    if rows is None or rows >= total:
        return split
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return split.part(order[:rows], f"{rows:,} of {total:,} rows, drawn with seed {seed}")
