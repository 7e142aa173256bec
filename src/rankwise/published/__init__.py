"""What papers print, as they print it. Nothing here is computed.

One YAML file per paper: its `source`, its `tables` and `figures` by name, and `claims` in its text. A number stays the
text that is printed; if it is doubtful or printed below the wrong heading, a `reading` says how it is read, and why.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from rankwise.errors import InputError, nearest
from rankwise.settings import parse_yaml


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        name: its heading.
        unit: what is printed: percent (0 to 100), a fraction (0 to 1), or a number with a scale of its own.
        task, metric: which of ours it can be compared with, the metric without the suffix of a split; "" for none.
        average: the benchmark whose average it is, instead of a task's metric.
        times: what our metric is multiplied by to be in this unit.
        options: options of the method that hold for this column alone.
        note: how it is to be read.
    """

    name: str
    unit: Literal["percent", "fraction", "number"]
    task: str = ""
    metric: str = ""
    average: str = ""
    times: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def factor(self) -> float:
        """`times`, which is 100 for percent unless the column says otherwise."""
        return self.times if self.times is not None else 100.0 if self.unit == "percent" else 1.0


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: what the row is called there.
        cells: what is printed below each column; None for nothing.
        parameters: the label of its trainable parameters, as printed; "" for none.
        method: the name of the method with the options that make it this row.
        nearest: the same where the paper does not say enough: our choice of what to compare with it.
        learning_rate: where the row is of one.
        note: on the label of the parameters.
        reading: what has to be known of the cells, and why they are read so.
    """

    name: str
    cells: tuple[str | None, ...] = ()
    parameters: str = ""
    method: dict[str, Any] | None = None
    nearest: dict[str, Any] | None = None
    learning_rate: float | None = None
    note: str = ""
    reading: str = ""


@dataclass(frozen=True)
class Table:
    """A table, or a figure, which has no rows, as what it shows is not printed as numbers.

    Attributes:
        id: `paper/name`, such as `lora/e2e_gpt2_medium`.
        source: paper or slides.
        number: its number there, or its heading.
        about: what it shows.
        experiment: the file in `experiments/` that is for it.
        arch: the model, as `rankwise archs` names it; "" for one that is not listed there.
        reading: what has to be known of all cells, and why they are read so.
        as_printed: `headings` and `rows` as printed, if they are read differently.
    """

    id: str
    source: str
    number: str
    about: str
    experiment: str
    arch: str = ""
    columns: tuple[Column, ...] = ()
    rows: tuple[Row, ...] = ()
    reading: str = ""
    as_printed: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`table` or `figure`."""
        return "table" if self.rows else "figure"

    @property
    def numbers(self) -> int:
        """How many numbers are printed in it, labels of parameters among them."""
        return sum(bool(row.parameters) + sum(cell is not None for cell in row.cells) for row in self.rows)


@dataclass(frozen=True)
class Paper:
    """One file: the tables, then the figures, and what the text claims."""

    name: str
    source: str
    tables: tuple[Table, ...]
    claims: dict[str, str]


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


@cache
def papers() -> tuple[Paper, ...]:
    """All papers by the names of their files."""
    listed = sorted(files(__name__).iterdir(), key=lambda file: file.name)
    return tuple(
        _paper(file.name.removesuffix(".yaml"), parse_yaml(file.read_text(encoding="utf-8")))
        for file in listed
        if file.name.endswith(".yaml")
    )


def find(name: str) -> Table:
    """The table or figure `paper/name`. Raises InputError if there is none."""
    known = {table.id: table for paper in papers() for table in paper.tables}
    if name not in known:
        raise InputError(f"{name}: no such table{nearest(name, known)}; `rankwise papers` lists them")
    return known[name]


def number(printed: str) -> float:
    """The value of a printed cell, without its ±: `70.4 ± .1` is 70.4. ValueError for what is no number."""
    parsed = re.fullmatch(r"(-?[\d.]+(?:e-?\d+)?)(?: ± [\d.]+)?", printed)
    if parsed is None:
        raise ValueError(f"{printed!r} is no printed number")
    return float(parsed[1])


def counts() -> list[tuple[str, str, dict[str, Any], Label]]:
    """All published counts: arch, method, the options that decide the count, and the label."""
    labelled = []
    for table in (table for paper in papers() for table in paper.tables):
        for row in table.rows:
            if row.method and row.parameters:
                options = {key: value for key, value in row.method.items() if key != "name"}
                label = Label(row.parameters, table.source, table.number, row.name, row.note)
                labelled.append((table.arch, row.method["name"], options, label))
    return labelled


def labels(arch: str, method: str, options: Mapping[str, Any]) -> list[Label]:
    """The labels printed for exactly this, most often none.

    Args:
        options: all options of the method, defaults filled in. Those that no label names do not decide a count.
    """
    return [
        label
        for of, by, deciding, label in counts()
        if (of, by) == (arch, method) and all(same(options.get(key), value) for key, value in deciding.items())
    ]


def same(one: Any, other: Any) -> bool:
    """Whether two values of an option are alike; lists are, whatever their order."""
    if isinstance(one, list) and isinstance(other, list):
        return set(one) == set(other)
    return one == other


def _paper(name: str, content: dict[str, Any]) -> Paper:
    entries = {**content.get("tables", {}), **content.get("figures", {})}
    tables = tuple(
        Table(
            **{
                "id": f"{name}/{key}",
                "source": content["source"],
                **entry,
                "columns": tuple(Column(**column) for column in entry.get("columns", ())),
                "rows": tuple(Row(**{**row, "cells": tuple(row.get("cells", ()))}) for row in entry.get("rows", ())),
            }
        )
        for key, entry in entries.items()
    )
    return Paper(name, content["source"], tables, content.get("claims", {}))
