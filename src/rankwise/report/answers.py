"""Confusion between classes, and the wrong answers with the greatest probability."""

from dataclasses import dataclass
from pathlib import Path

from rankwise.runs.answers import details

MATRIX = 26
"""Classes of a matrix at most; with more, the most frequent mistakes are listed."""
MISTAKES = 10
"""How many of those, and of the rows in the section of one run, are shown."""
NAME, TEXT = 24, 240
"""Characters of a class's name above a column, and of a text."""


@dataclass(frozen=True)
class Wrong:
    """A row for which a wrong class was predicted."""

    row: int
    texts: list[str]
    true: str
    given: str
    confidence: str


@dataclass(frozen=True)
class Answered:
    """The answers to one split.

    Attributes:
        words: how many are wrong.
        classes: the heads of the matrix's columns; empty if there are too many classes for a matrix.
        matrix: for each true class its name and, for each class given, how often, and a shade from 0 to 8.
        mistakes: without a matrix, "given for true: how often", the most frequent first.
        wrong: the wrong answers, the most probable first.
    """

    words: str
    classes: list[str]
    matrix: list[tuple[str, list[tuple[str, int]]]]
    mistakes: list[str]
    wrong: list[Wrong]


def answered(folder: Path, split: str, most: int = MISTAKES) -> Answered | None:
    """The answers of a run to `split`, with `most` wrong rows; None if there are none or the file is damaged."""
    detail = next((each for each in details(folder) if each.split == split), None)
    if detail is None:
        return None
    names = detail.classes
    numbers = [
        *((true, given) for true, given, _ in detail.confusion),
        *((each.true, each.given) for each in detail.wrong),
    ]
    if not all(0 <= number < len(names) for pair in numbers for number in pair):
        return None
    cells = {(true, given): count for true, given, count in detail.confusion}
    wrong = {pair: count for pair, count in cells.items() if pair[0] != pair[1]}
    matrix, mistakes = [], []
    if len(names) <= MATRIX:
        for true, name in enumerate(names):
            counts = [cells.get((true, given), 0) for given in range(len(names))]
            total = sum(counts) or 1
            matrix.append((name, [(f"{count:,}" if count else "", round(8 * count / total)) for count in counts]))
    else:
        order = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:MISTAKES]
        mistakes = [f"{names[given]} for {names[true]}: {count:,}" for (true, given), count in order]
    return Answered(
        f"{sum(wrong.values()):,} of {sum(cells.values()):,} rows answered wrong",
        [_cut(name, NAME) for name in names] if matrix else [],
        matrix,
        mistakes,
        [
            Wrong(
                each.idx,
                [_cut(text, TEXT) for text in each.texts],
                names[each.true],
                names[each.given],
                f"{each.confidence:.3f}",
            )
            for each in detail.wrong[:most]
        ],
    )


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"
