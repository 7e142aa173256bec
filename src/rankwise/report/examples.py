"""What the methods said of the same few examples: texts side by side, and the pictures that runs left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.config import need
from rankwise.runs.tables import Row

SHOWN = 4
LONGEST = 800
"""Characters of a text; the rest is left out, and said to be."""
PICTURE = "masks.png"
"""The file of a run that shows some of its outputs."""


@dataclass(frozen=True)
class Example:
    """One input, the right answers, and what each method wrote: its label -> text."""

    source: str
    references: list[str]
    outputs: dict[str, str]


def examples(best: Sequence[Row]) -> list[Example]:
    """A few rows of the main evaluation split, evenly spread, by what the first seed of each method wrote for them.

    Empty where the runs wrote no texts. A method that has not written for one of the rows is left out of that.
    """
    written = {row["method"]: found for row in best if (found := _written(_first(row)))}
    if not written:
        return []
    rows = next(iter(written.values()))
    numbers = list(rows)
    shown = min(SHOWN, len(numbers))
    chosen = [numbers[place * len(numbers) // shown] for place in range(shown)]
    return [
        Example(
            _cut(rows[number]["source"]),
            [_cut(text) for text in rows[number]["references"]],
            {method: _cut(own[number]["prediction"]) for method, own in written.items() if number in own},
        )
        for number in chosen
    ]


def pictures(best: Sequence[Row]) -> list[tuple[str, bytes]]:
    """Of each method whose runs left a picture its label and the PNG of the first seed."""
    files = [(row["method"], _first(row) / PICTURE) for row in best]
    return [(method, file.read_bytes()) for method, file in files if file.is_file()]


def _first(row: Row) -> Path:
    return Path(row["folders"][min(row["folders"])])


def _written(folder: Path) -> dict[int, dict[str, Any]]:
    """The rows of the main split by their number; {} where there are none, or they are no texts."""
    columns = ["split", "idx", "source", "references", "prediction"]
    try:
        file = need("pyarrow.parquet", "bench").ParquetFile(folder / "predictions.parquet")
        if not set(columns) <= set(file.schema_arrow.names):
            return {}
        rows = file.read(columns=columns).to_pylist()
    except (OSError, ValueError):  # pyarrow's errors are of these kinds
        return {}
    return {row["idx"]: row for row in rows if row["split"] == rows[0]["split"]}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters in all)"
