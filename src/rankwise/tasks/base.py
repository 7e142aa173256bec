"""What a task is: named text columns, labels, official metrics, and splits that say whether they are official."""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rankwise.config import InputError, need

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Split:
    """Rows of one task. `data` has the task's text columns, `idx`, and `label` (all -1, or absent: unlabelled).

    `official` is True only for the rows that published numbers are computed on; `note` says why it is not.
    `suffix` is put behind the metric names, so that two evaluation splits can stand in one table.
    """

    name: str
    data: "Dataset"
    official: bool
    note: str = ""
    suffix: str = ""

    @property
    def labelled(self) -> bool:
        """Whether the rows can be trained or scored on."""
        return "label" in self.data.column_names and any(label != -1 for label in self.data["label"])


class Task(ABC):
    """One task. A subclass names itself: `class CoLA(Task, name="cola")`; its docstring's first line is the summary."""

    known: ClassVar[dict[str, type["Task"]]] = {}
    name: ClassVar[str] = ""
    text: tuple[str, ...] = ()
    """One or two text columns."""
    main: str = ""
    """Name of the metric that runs are compared by; empty where the labels are not public."""
    metrics: tuple[str, ...] = ()

    def __init_subclass__(cls, name: str = "", aliases: Sequence[str] = (), **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if not name:
            return
        cls.name = name
        for word in (name, *aliases):
            if word in Task.known:
                raise TypeError(
                    f"two tasks are called {word!r}: {Task.known[word].__qualname__} and {cls.__qualname__}"
                )
            Task.known[word] = cls

    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; empty for a regression."""

    @abstractmethod
    def train(self) -> Split:
        """The training rows. InputError for data that is missing or damaged."""

    @abstractmethod
    def evaluation(self) -> list[Split]:
        """The rows to evaluate on, the main split first. InputError for data that is missing or damaged."""

    def revision(self) -> str:
        """12 hex digits that change with any text, label or order of the data; the same wherever the data is stored."""
        return self._revision

    @cached_property
    def _revision(self) -> str:
        digest = hashlib.sha256(json.dumps([self.text, self.labels]).encode())
        for split in (self.train(), *self.evaluation()):
            digest.update(f"\n{split.name}".encode())
            for column in (*self.text, "label"):
                if column in split.data.column_names:
                    digest.update(json.dumps(split.data[column][:]).encode())
        return digest.hexdigest()[:12]

    def decode(self, logits: np.ndarray) -> np.ndarray:
        """Logits (n, classes) to class numbers (n,); (n, 1) or (n,) to values (n,) for a regression.

        ValueError for a logit that is not finite: argmax would turn it into a class without a word.
        """
        from rankwise.metrics.classification import finite

        logits = finite(np.asarray(logits, dtype=np.float64).reshape(len(logits), -1))
        return logits.argmax(axis=1) if self.labels else logits[:, 0]

    def score(self, split: Split, predictions: np.ndarray, labels: np.ndarray | None = None) -> dict[str, float]:
        """The task's metrics of `predictions` (n,), class numbers or values; {} for a split without labels.

        `labels` (n,) are the split's own unless given. ValueError for a prediction that is not finite.
        """
        from rankwise.metrics.classification import METRICS, finite

        predictions = finite(predictions)
        if not split.labelled:
            return {}
        if labels is None:
            labels = np.asarray(split.data["label"][:])
        return {name + split.suffix: METRICS[name](predictions, labels) for name in self.metrics}


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


def encode(split: Split, task: Task, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> "Dataset":
    """`split` as token numbers: what the tokenizer's model takes, `length` in tokens and, when labelled, `labels`.

    Cut to `max_length` tokens (of a pair the longer text first), not padded, in the order of the split, in memory only.
    """
    datasets = need("datasets", "bench")
    pa = need("pyarrow", "bench")
    if max_length <= tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2):
        raise InputError(f"max_length={max_length} leaves no room for text: the tokenizer's own marks take it all")
    kinds = {
        "labels": pa.int64() if task.labels else pa.float32(),
        "length": pa.int32(),
        "attention_mask": pa.list_(pa.int8()),
    }
    labelled = split.labelled
    tables = []
    # In blocks: Python lists of token numbers take ten times the room of the arrow table that they end up in.
    for block in split.data.iter(batch_size=10_000):
        columns = dict(tokenizer(*(block[column] for column in task.text), truncation=True, max_length=max_length))
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        if labelled:
            columns["labels"] = block["label"]
        tables.append(
            pa.table(
                {name: pa.array(values, kinds.get(name, pa.list_(pa.int32()))) for name, values in columns.items()}
            )
        )
    if not tables:
        raise InputError(f"split {split.name!r} of task {task.name!r} has no rows")
    return datasets.Dataset(pa.concat_tables(tables))
