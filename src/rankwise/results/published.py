"""Our results next to the published ones, as tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.results.beside import Beside
from rankwise.results.formats import plain

HEADER = ["printed row", "column", "ours", "mean ± sd", "seeds", "budget", "final", "published", "parameters", "note"]


@dataclass(frozen=True)
class Compared:
    """One published table with ours in it: rows below HEADER, of the cells with runs of ours.

    Means are in the unit that is printed. The notes say how ours differs from the paper's run, and how the printed
    number is to be read; the last column of a row has their numbers.
    """

    title: str
    rows: list[list[str]]
    notes: list[str]


def compared(cells: Sequence[Beside]) -> list[Compared]:
    """What `beside` gives, a table for each published one."""
    names = dict.fromkeys(cell.table for cell in cells)
    return [_compared([cell for cell in cells if cell.table == name]) for name in names]


def text(cells: Sequence[Beside]) -> str:
    """The tables and their notes for a terminal; "" for no cells."""
    parts = []
    for table in compared(cells):
        parts += [table.title, plain(HEADER, table.rows) if table.rows else "", "\n".join(table.notes)]
    return "\n\n".join(filter(None, parts))


def mean_sd(cell: Beside) -> str:
    """`70.40 ± 0.12` in the unit that is printed; "" for none."""
    if cell.mean is None:
        return ""
    digits = {"percent": 2, "fraction": 4, "number": 3}[cell.unit]
    spread = "" if cell.sd is None else f" ± {cell.sd:.{digits}f}"
    return f"{cell.mean:.{digits}f}{spread}"


def _compared(cells: Sequence[Beside]) -> Compared:
    ours = [cell for cell in cells if cell.n]
    clauses = [_clauses(cell) for cell in ours]
    shared = clauses[0] if len(clauses) > 1 else []
    common = [clause for clause in shared if all(clause in each for each in clauses)]
    notes = list(dict.fromkeys(clause for each in clauses for clause in each if clause not in common))
    rows = []
    for cell, own in zip(ours, clauses, strict=True):
        sizes = ["" if size is None else f"{size:,}" for size in (cell.budget, cell.final)]
        names = [cell.row, cell.column or "parameters", cell.method]
        printed = [cell.published or "-", cell.published_parameters or "-"]
        numbers = ", ".join(str(notes.index(clause) + 1) for clause in own if clause in notes)
        rows.append([*names, mean_sd(cell), str(cell.n), *sizes, *printed, numbers])
    lines = [*(f"All rows: {clause}" for clause in common), *(f"{n}: {clause}" for n, clause in enumerate(notes, 1))]
    if missing := len(cells) - len(ours):
        lines.insert(0, f"No run of ours for {missing} of the printed cells.")
    title = f"{cells[0].table}: ours next to {cells[0].source}, table {cells[0].number}"
    return Compared(title, rows, lines)


def _clauses(cell: Beside) -> list[str]:
    return [*(f"ours: {clause}" for clause in cell.differs), *(f"printed: {clause}" for clause in cell.reading)]
