"""The outputs of all methods for the same few examples: texts side by side, and the pictures that runs left."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import InputError
from rankwise.files import read_bytes
from rankwise.results.contrasts import FLOORS
from rankwise.results.predictions import main_split
from rankwise.results.rows import Row
from rankwise.runs.store import PICTURE

SHOWN = 4
LONGEST = 800
"""Characters of a text; the rest is left out, with a note of its length."""
OF_ONE_RUN = 2
"""Examples in the section of one run, and MISSED rows that it got wrong."""
MISSED = 10


@dataclass(frozen=True)
class Example:
    """One input, the references, and what each method wrote, by its label."""

    source: str
    references: list[str]
    outputs: dict[str, str]


def examples(best: Sequence[Row]) -> list[Example]:
    """A few rows of the main evaluation split, evenly spread, by what the first seed of each method wrote for them.

    What the model wrote before training, if it was asked, comes first. Empty if the runs wrote no texts. A method
    without a text for a row is left out there.
    """
    rows = sorted(best, key=lambda row: row.name not in FLOORS)
    names = [f"{row.method} ({FLOORS[row.name]})" if row.name in FLOORS else row.method for row in rows]
    return _side_by_side({name: _written(row.first) for name, row in zip(names, rows, strict=True)}, SHOWN, LONGEST)


def of_run(folder: Path) -> list[Example]:
    """The same for one run: fewer rows, shorter texts."""
    return _side_by_side({"written": _written(folder)}, OF_ONE_RUN, LONGEST // 3)


def missed(folder: Path) -> str:
    """How many rows of the main split a classifier got wrong, and the first of them; "" if there are no classes."""
    rows = _rows(folder, ["idx", "label", "prediction"])
    classes = [row for row in rows if isinstance(row["label"], int) and isinstance(row["prediction"], int)]
    if not rows or len(classes) < len(rows) or any(row["label"] < 0 for row in rows):
        return ""
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    listed = ", ".join(f"{row['idx']} ({row['prediction']} for {row['label']})" for row in wrong[:MISSED])
    text = f"{len(wrong):,} of {len(rows):,} rows answered wrong"
    return f"{text}; the first, as row (answer for label): {listed}." if wrong else f"{text}."


def pictures(best: Sequence[Row]) -> list[tuple[str, bytes]]:
    """For each method whose runs left a picture, its label and the PNG of the first seed."""
    pngs = []
    for row in best:
        with suppress(OSError, InputError):
            pngs.append((row.method, read_bytes(row.first / PICTURE)))
    return pngs


def _side_by_side(written: dict[str, dict[int, dict[str, Any]]], count: int, longest: int) -> list[Example]:
    written = {method: rows for method, rows in written.items() if rows}
    if not written:
        return []
    rows = next(iter(written.values()))
    numbers = list(rows)
    shown = min(count, len(numbers))
    chosen = [numbers[place * len(numbers) // shown] for place in range(shown)]
    return [
        Example(
            _cut(rows[number]["source"], longest),
            [_cut(text, longest) for text in rows[number]["references"]],
            {method: _cut(own[number]["prediction"], longest) for method, own in written.items() if number in own},
        )
        for number in chosen
    ]


def _written(folder: Path) -> dict[int, dict[str, Any]]:
    """The rows of the main split for which a text was written, by number; {} if there are none."""
    rows = _rows(folder, ["idx", "source", "references", "prediction"])
    return {row["idx"]: row for row in rows if row["prediction"] is not None}


def _rows(folder: Path, columns: list[str]) -> list[dict[str, Any]]:
    """The answers to the main split; [] if they cannot be read or a column is missing."""
    table = main_split(folder, columns) or {}
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text):,} characters in all)"
