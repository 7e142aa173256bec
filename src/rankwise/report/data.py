"""What the models of a task read: lengths, what is cut, what is repeated, and a few rows with what is learnt marked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rankwise.results import seen as results
from rankwise.results.rows import Row
from rankwise.runs.data import Seen, SeenRow, seen


@dataclass(frozen=True)
class Shown:
    """A row: where it is, its text in parts that are learnt or only read, how many tokens are left out, its class."""

    place: str
    segments: Sequence[tuple[str, bool]]
    more: int
    label: str


@dataclass(frozen=True)
class Data:
    """What one model reads.

    Attributes:
        caption: whose data it is, and who reads it.
        splits, classes: tables; `classes` is None without classes.
        remarks: what may be wrong with the rows.
        rows: a few of them.
    """

    caption: str
    splits: results.Lines
    classes: results.Lines | None
    remarks: Sequence[str]
    rows: Sequence[Shown]


def data(best: Sequence[Row]) -> list[Data]:
    """One for each different model among the first runs of the methods; none for runs that have not noted it."""
    found = [each for row in best if (each := seen(row.first))]
    # methods are given rows of their own when they are run with other settings
    distinct = {repr(replace(each, rows=())): each for each in found}
    return [_of(each) for each in distinct.values()]


def _of(each: Seen) -> Data:
    return Data(
        results.caption(each),
        results.by_split(each.splits),
        results.by_class(each.splits) if any(split.classes for split in each.splits) else None,
        [remark for split in each.splits for remark in results.remarks(split)],
        [_row(row) for row in each.rows],
    )


def _row(row: SeenRow) -> Shown:
    return Shown(f"{row.place} of {row.split}", row.segments, row.more, row.label)
