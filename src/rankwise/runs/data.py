"""What a model sees of a task's rows: how long they are, what is cut away, what is learnt, which rows are repeated."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from rankwise.files import read_json
from rankwise.runs.kinds import Count

FILE = "data.json"
"""Of a run: what its model sees."""


@dataclass(frozen=True)
class Lengths:
    """Of the rows of a split, in tokens; 95 % of the rows are not longer than `most`."""

    shortest: Count
    median: Count
    most: Count
    longest: Count


@dataclass(frozen=True)
class SeenSplit:
    """The rows of one split.

    Attributes:
        split: its name.
        rows: how many the model sees: rows, or blocks of several.
        given: rows of the data, of which `dropped` have nothing to learn in what the model reads.
        lengths: None for images.
        tokens, learnt: tokens of all rows, and those of them that the loss is computed on.
        nothing: rows without such a token, where others have some.
        cut, lost: rows that are longer than what the model reads or writes, and their tokens that are cut away.
        repeated: rows with the input of an earlier row of the split.
        shared: rows whose input is among the training rows too; 0 for these themselves.
        contradicted: rows with the input of another row of the split but another class.
        classes: how many rows, or pixels, have each class; {} without classes.
        sizes: how many images have each size, as `480×360`; {} without images.
    """

    split: str
    rows: Count
    given: Count
    dropped: Count = 0
    lengths: Lengths | None = None
    tokens: Count = 0
    learnt: Count = 0
    nothing: Count = 0
    cut: Count = 0
    lost: Count = 0
    repeated: Count = 0
    shared: Count = 0
    contradicted: Count = 0
    classes: Mapping[str, Count] = field(default_factory=dict)
    sizes: Mapping[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class SeenRow:
    """One row as the model sees it.

    Attributes:
        split, number: where it is; rows of a file have the numbers that messages count them by.
        place: the same in words.
        label: its class or value; "" if it has none.
        ids, words: its tokens, and the text that each adds to those before it.
        learnt: whether the loss is computed on each of them.
        more: tokens that follow and are left out here.
    """

    split: str
    number: int
    place: str
    label: str
    ids: Sequence[int]
    words: Sequence[str]
    learnt: Sequence[bool]
    more: Count = 0

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.words) == len(self.learnt):
            raise ValueError("the lists of tokens differ in length")

    @property
    def segments(self) -> list[tuple[str, bool]]:
        """The text, in parts that are learnt or only read."""
        pairs = zip(self.learnt, self.words, strict=True)
        return [
            ("".join(word for _, word in part), learnt)
            for learnt, part in itertools.groupby(pairs, lambda pair: pair[0])
        ]


@dataclass(frozen=True)
class Seen:
    """What the model of a run sees.

    Attributes:
        task, model: their names.
        max_length: tokens at most of one input.
        splits: the training rows first.
        rows: a few of them, drawn at random, the same ones each time.
    """

    task: str
    model: str
    max_length: Count
    splits: Sequence[SeenSplit]
    rows: Sequence[SeenRow]

    def __post_init__(self) -> None:
        if len({each.lengths is None for each in self.splits}) != 1:
            raise ValueError("there must be splits, all of texts or all of images")


_SEEN = TypeAdapter(Seen)


def seen(folder: Path) -> Seen | None:
    """What the model of a run sees; None if that is missing or damaged."""
    try:
        return _SEEN.validate_python(read_json(folder / FILE))
    except (OSError, ValueError):  # InputError and pydantic's error are of this kind
        return None
