"""What papers print, as they print it. Nothing here is computed, and nothing that is computed is tuned to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from rankwise.config import parse_yaml


@dataclass(frozen=True)
class Label:
    """A number of trainable parameters as a paper prints it.

    Attributes:
        label: as printed.
        source: paper or slides.
        table: its number or heading there.
        row: what the row is called there.
        note: ours, on how it is meant or why it differs from the count; empty for most.
    """

    label: str
    source: str
    table: str
    row: str
    note: str = ""

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        return f"{self.label}: {self.source}, table {self.table}, {self.row}{note}"


def counts() -> list[tuple[str, str, dict[str, Any], Label]]:
    """All published counts: arch, method, the options that decide the count, and the label."""
    found = []
    for paper in parse_yaml(files(__name__).joinpath("counts.yaml").read_text(encoding="utf-8")):
        for row in paper["rows"]:
            label = Label(row["label"], paper["source"], str(row["table"]), row["row"], row.get("note", ""))
            found.append((row["arch"], row["method"], row["options"], label))
    return found


def labels(arch: str, method: str, options: Mapping[str, Any]) -> list[Label]:
    """The labels printed for exactly this, most often none.

    Args:
        options: all options of the method, defaults filled in. Those that no label names do not decide a count.
    """
    return [
        label
        for of, by, deciding, label in counts()
        if (of, by) == (arch, method) and all(_same(options.get(key), value) for key, value in deciding.items())
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return set(one) == set(other)
    return one == other
