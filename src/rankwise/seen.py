"""What a model sees of the rows of a task, without its weights: how many tokens, which are learnt, what is cut away."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rankwise.errors import need
from rankwise.runs.data import Lengths, Seen, SeenRow, SeenSplit
from rankwise.tasks.base import Evaluation, Split, Task
from rankwise.tasks.generation import IGNORE, Generation, joined
from rankwise.tasks.language import Language
from rankwise.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from datasets import Dataset

WHOLE = 10**7
"""Tokens to which nothing is cut."""
FEW = (3, 200)
"""Rows that a run keeps, and tokens of each."""


@dataclass(frozen=True)
class Reader:
    """How a model reads.

    Attributes:
        processor: its tokenizer; None for segmentation.
        encodes: whether it is an encoder-decoder.
        max_length: tokens at most of one input.
    """

    processor: Any
    encodes: bool
    max_length: int

    @classmethod
    def of(cls, model: Any, processor: Any, max_length: int) -> "Reader":
        """How `model` reads, with or without weights and a method."""
        return cls(processor, bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)), max_length)

    @property
    def end(self) -> int | None:
        """The token between a source and its target in one row; None where they are apart."""
        return None if self.encodes else self.processor.eos_token_id


def few(task: Task, model: str, splits: Sequence[Evaluation], reader: Reader) -> Seen:
    """What is seen of all splits, and the beginnings of a few training rows."""
    return Seen(
        task.label, model, reader.max_length, of_splits(task, splits, reader), drawn(task, splits[0], reader, *FEW)
    )


def of_splits(task: Task, splits: Sequence[Evaluation], reader: Reader) -> list[SeenSplit]:
    """What `reader` sees of each split, which it has encoded, the training rows first."""
    known: set[int] = set()
    found = []
    for place, each in enumerate(splits):
        inputs = [*_inputs(task, each.split)]
        seen = SeenSplit(
            split=each.split.name,
            rows=len(each.examples),
            given=len(inputs),
            dropped=len(inputs) - len(task.kept(each.split, each.examples).data),
            repeated=len(inputs) - len(set(inputs)),
            shared=sum(key in known for key in inputs) if place else 0,
            contradicted=_contradicted(task, each.split, inputs),
        )
        known = known or set(inputs)
        if isinstance(task, Segmentation):
            sizes, pixels = task.seen(each.split)
            found.append(replace(seen, sizes=sizes, classes=pixels))
        else:
            found.append(_with_tokens(seen, task, each, reader))
    return found


def _in_blocks(task: Task) -> bool:
    """Whether an example is a block of several rows."""
    return isinstance(task, Language) and not task.answers


def _inputs(task: Task, split: Split) -> Iterator[int]:
    """A number for each row, the same for rows with equal inputs."""
    for block in split.data.select_columns([*task.text]).iter(1_000):
        for values in zip(*(block[column] for column in task.text), strict=True):
            yield hash(repr(values))


def _contradicted(task: Task, split: Split, inputs: Sequence[int]) -> int:
    if not task.labels or isinstance(task, Segmentation) or not split.labelled:
        return 0
    labels: dict[int, set[int]] = {}
    for key, label in zip(inputs, split.data["label"][:], strict=True):
        labels.setdefault(key, set()).add(label)
    return sum(len(labels[key]) > 1 for key in inputs)


def _with_tokens(seen: SeenSplit, task: Task, each: Evaluation, reader: Reader) -> SeenSplit:
    counts = _counted(task, each.examples, reader)
    missing = _missing(task, each, np.flatnonzero(counts.full).tolist(), reader.processor)
    labels = Counter(each.split.data["label"][:]) if task.labels and each.split.labelled else {}
    low, middle, most, high = np.percentile(counts.tokens, (0, 50, 95, 100), method="higher").tolist()
    return replace(
        seen,
        lengths=Lengths(low, middle, most, high),
        tokens=int(counts.tokens.sum()),
        learnt=int(counts.learnt.sum()),
        nothing=int((counts.learnt == 0).sum()) if counts.learnt.any() else 0,
        cut=sum(number > 0 for number in missing),
        lost=sum(missing),
        classes={name: labels[number] for number, name in enumerate(task.labels)} if labels else {},
    )


class _Counts(NamedTuple):
    """Of each encoded row (n,): its tokens, how many of them are learnt, and whether it may have been cut."""

    tokens: np.ndarray
    learnt: np.ndarray
    full: np.ndarray


def _counted(task: Task, examples: "Dataset", reader: Reader) -> _Counts:
    compute, types = need("pyarrow.compute", "bench"), need("pyarrow", "bench").types
    table = examples.with_format("arrow")[:]
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    read = compute.list_value_length(columns["input_ids"]).to_numpy()
    full = read >= reader.max_length
    if isinstance(task, Generation):
        targets = columns["targets"]
        longest = np.zeros(len(read), dtype=np.int64)
        lengths = compute.list_value_length(targets.flatten()).to_numpy()
        np.maximum.at(longest, compute.list_parent_indices(targets).to_numpy(), lengths)
        written = compute.list_value_length(compute.list_element(targets, 0)).to_numpy()
        return _Counts(read + written + (reader.end is not None), written, full | (longest >= task.target_length))
    if "cut" in columns:
        full = np.array([bool(words) for words in columns["cut"].to_pylist()])
    learnt = np.zeros(len(read), dtype=np.int64)
    if "labels" in columns and types.is_list(columns["labels"].type):
        labels = columns["labels"]
        np.add.at(learnt, compute.list_parent_indices(labels).to_numpy(), labels.flatten().to_numpy() != IGNORE)
    return _Counts(read, learnt, full)


def _missing(task: Task, each: Evaluation, places: list[int], processor: Any) -> list[int]:
    """How many tokens of each of these examples were cut away."""
    if not places:
        return []
    whole = replace(task, target_length=WHOLE) if isinstance(task, Generation) else task
    sources = _sources(each)
    data = each.split.data.select([sources[place] for place in places], keep_in_memory=True)
    uncut = whole.encode(replace(each.split, data=data), processor, WHOLE)
    kept = each.examples.select(places, keep_in_memory=True)
    return [_count(long) - _count(short) for long, short in zip(uncut, kept, strict=True)]


def _count(row: dict[str, Any]) -> int:
    return len(row["input_ids"]) + sum(map(len, row.get("targets", ())))


def _sources(each: Evaluation) -> Sequence[int]:
    """The place in the split of the row that each example is, or begins in: `encode` may leave rows out."""
    names = each.examples.column_names
    return each.examples["idx"][:] if "idx" in names and "length" in names else range(len(each.examples))


def tokens(row: dict[str, Any], end: int | None) -> tuple[list[int], list[bool]]:
    """The tokens of an encoded row, and whether the loss is computed on each of them.

    It is on none of a row of a classifier. Of several references the first one is taken. A source and its target
    stand one after the other, with the token `end` between them if there is one.
    """
    ids, labels = row["input_ids"], row.get("labels")
    if "targets" in row:
        source, target = ids, row["targets"][0]
        if end is None:
            ids, labels = source + target, [IGNORE] * len(source) + target
        else:
            ids, labels = joined(source, target, end)
    if not isinstance(labels, list):
        return ids, [False] * len(ids)
    return ids, [label != IGNORE for label in labels]


def drawn(task: Task, each: Evaluation, reader: Reader, count: int, most: int = WHOLE) -> list[SeenRow]:
    """`count` examples at random, the same ones each time, with `most` tokens of each."""
    places = sorted(random.Random(0).sample(range(len(each.examples)), min(count, len(each.examples))))
    return [row(task, each, place, reader, most) for place in places]


def numbered(task: Task, each: Evaluation, number: int, reader: Reader) -> list[SeenRow]:
    """The examples that are made of the row with this number."""
    places = [place for place, own in enumerate(numbers(each)) if own == number]
    return [row(task, each, place, reader) for place in places]


def row(task: Task, each: Evaluation, place: int, reader: Reader, most: int = WHOLE) -> SeenRow:
    """The example at `place`, with `most` of its tokens."""
    ids, learnt = tokens(each.examples[place], reader.end)
    number = numbers(each)[place]
    return SeenRow(
        split=each.split.name,
        number=number,
        place=f"{each.split.unit} {number}{' on' if _in_blocks(task) else ''}",
        label=_label(task, each.split.data[_sources(each)[place]]),
        ids=ids[:most],
        words=words(ids[:most], reader.processor),
        learnt=learnt[:most],
        more=max(0, len(ids) - most),
    )


def numbers(each: Evaluation) -> list[int]:
    """The number of the row that each example is of, by which messages and tables name it."""
    data = each.split.data
    own = data["number" if "number" in data.column_names else "idx"][:]
    return [own[place] for place in _sources(each)]


def _label(task: Task, row: dict[str, Any]) -> str:
    if task.family != "classification" or "label" not in row:
        return ""
    if task.labels:
        return task.labels[row["label"]] if row["label"] >= 0 else ""
    return f"{row['label']:g}" if math.isfinite(row["label"]) else ""


def words(ids: list[int], processor: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds to those before it; together they are the text of all.

    Of several tokens that are the bytes of one character, the last one adds it.
    """

    def decoded(start: int, stop: int) -> str:
        return str(processor.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    found: list[str] = []
    start, done = 0, 0  # whole characters end at `done`; the tokens from `start` on are read again with the next
    for stop in range(1, len(ids) + 1):
        before, now = decoded(start, done), decoded(start, stop)
        if stop < len(ids) and now.endswith("\N{REPLACEMENT CHARACTER}"):
            found.append("")
            continue
        found.append(now[len(before) :])
        start, done = done, stop
    return found
