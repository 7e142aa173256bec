"""Our results next to the published ones, cell by cell."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankwise.published import Column, Table, find, same
from rankwise.published import Row as Printed
from rankwise.results.rows import Row, averages, unofficial
from rankwise.results.stats import mean, sd

MAY_DIFFER = ("targets", "every")
"""Options in which ours may differ, for another model or a short run; `differs` then names them."""


@dataclass(frozen=True)
class Beside:
    """A printed cell and ours next to it. Without a run of ours `n` is 0 and the rest of ours is None.

    Attributes:
        table: as in `rankwise papers`; source, number: paper, and the table's number there.
        row, column: what the cell stands in there; `column` is "" for a row of parameters alone.
        unit: of `mean`, `sd` and `published`: percent, fraction, or number.
        task, metric: ours, as our tables call them; the metric with the suffix of its split.
        published: as printed, ± included; "" where the paper leaves the cell empty.
        published_parameters: the label as printed; "" for none.
        reading: how to read the printed number, a clause each.
        method, learning_rate: of our row; the rate is None for an average.
        mean, sd: of our seeds, in `unit`; sd is None for one seed. n: how many seeds.
        budget, final: our adapter parameters, allowed and kept.
        differs: known differences between our run and the paper's, a clause each.
    """

    table: str
    source: str
    number: str
    row: str
    column: str
    unit: str
    task: str
    metric: str
    published: str
    published_parameters: str
    reading: tuple[str, ...]
    method: str = ""
    learning_rate: float | None = None
    mean: float | None = None
    sd: float | None = None
    n: int = 0
    budget: int | None = None
    final: int | None = None
    differs: tuple[str, ...] = ()


def beside(rows: Sequence[Row], best: Sequence[Row], experiment: Mapping[str, Any]) -> list[Beside]:
    """Every cell of the tables that `experiment` names in its `published:`, in the order of the papers; [] for none.

    A row of ours stands next to a printed one by the name of its method and by the options that make the printed row,
    never by a label; where only options in MAY_DIFFER are different it stands there too, and `differs` says so. It is
    the one at the best learning rate, except for rows that are printed for one rate.

    Args:
        rows, best: what `summarise` and `best` give.
        experiment: what `Store.experiment()` gives.

    Raises:
        InputError: for an unknown table.
    """
    about = experiment.get("published") or {}
    return [cell for name in about.get("tables", ()) for cell in _Side(find(name), rows, best, about).cells()]


@dataclass(frozen=True)
class _Side:
    """One table, and the rows to put next to it."""

    table: Table
    rows: Sequence[Row]
    best: Sequence[Row]
    about: Mapping[str, Any]

    def cells(self) -> Iterator[Beside]:
        columns = [
            (place, column) for place, column in enumerate(self.table.columns) if column.metric or column.average
        ]
        for row in self.table.rows:
            for place, column in columns:
                yield from self._cell(row, column, row.cells[place] or "")
            if not columns and row.method:
                yield from self._cell(row, Column("", "number"), "")

    def _cell(self, row: Printed, column: Column, printed: str) -> list[Beside]:
        wanted = {**(row.method or row.nearest or {}), **column.options}
        rows = self.best if row.learning_rate is None else self.rows
        ours = [
            each
            for each in _like(rows, wanted)
            if row.learning_rate in (None, each.learning_rate)
            and (not column.task or json.loads(each.task_options)["name"] == column.task)
        ]
        blank = Beside(
            table=self.table.id,
            source=self.table.source,
            number=self.table.number,
            row=row.name,
            column=column.name,
            unit=column.unit,
            task=column.task or column.average,
            metric=column.metric,
            published=printed,
            published_parameters=row.parameters,
            reading=tuple(filter(None, (self.table.reading, row.reading, column.note, row.note))),
        )
        fill = self._averages if column.average else self._scores if column.metric else self._sizes
        return list(fill(blank, column, ours, wanted)) or ([blank] if printed else [])

    def _scores(
        self, blank: Beside, column: Column, ours: Sequence[Row], wanted: Mapping[str, Any]
    ) -> Iterator[Beside]:
        for row in ours:
            if score := row.metrics.get(column.metric):
                differs = self._differs(row, wanted, [f"{split}: {why}" for split, why in unofficial(row).items()])
                yield _filled(blank, row, column.factor, score.mean, score.sd, metric=column.metric, differs=differs)

    def _averages(
        self, blank: Beside, column: Column, ours: Sequence[Row], wanted: Mapping[str, Any]
    ) -> Iterator[Beside]:
        members = [row for row in ours if row.benchmark == column.average]
        known = {row.method: row for row in members}
        for average in averages(self.best):
            if average.benchmark == column.average and average.method in known:
                row, scores = known[average.method], average.values
                over = f"the average of {len(average.tasks)} tasks: {', '.join(average.tasks)}"
                splits = [
                    f"{each.task}, {split}: {why}"
                    for each in members
                    if each.method == average.method
                    for split, why in unofficial(each).items()
                ]
                changes: dict[str, Any] = {"metric": "average", "differs": self._differs(row, wanted, [over, *splits])}
                changes |= {"task": column.average, "learning_rate": None, "n": len(scores)}
                yield _filled(blank, row, column.factor, mean(scores), sd(scores), **changes)

    def _sizes(self, blank: Beside, column: Column, ours: Sequence[Row], wanted: Mapping[str, Any]) -> Iterator[Beside]:
        for row in {row.method: row for row in ours}.values():
            yield _filled(blank, row, column.factor, None, None, differs=self._differs(row, wanted, []))

    def _differs(self, row: Row, wanted: Mapping[str, Any], splits: Sequence[str]) -> tuple[str, ...]:
        clauses = [f"scale {row.scale}"] if row.scale != "full" else []
        if self.table.arch and row.model.rpartition("/")[2].lower() != self.table.arch:
            clauses.append(f"model {row.model} instead of {self.table.arch}")
        for option in _otherwise(row, wanted):
            clauses.append(f"{option} {_words(row.options.get(option))} instead of {_words(wanted[option])}")
        changed = [f"set on the command line: {setting}" for setting in self.about.get("changed", ())]
        return tuple(filter(None, [*clauses, *splits, *changed, self.about.get("differs", "")]))


def _filled(
    blank: Beside, row: Row, factor: float, middle: float | None, spread: float | None, **changes: Any
) -> Beside:
    for name, value in (("mean", middle), ("sd", spread)):
        changes[name] = None if value is None else factor * value
    ours = {key: getattr(row, key) for key in ("task", "method", "learning_rate", "n", "budget", "final")}
    return replace(blank, **{**ours, **changes})


def _like(rows: Sequence[Row], wanted: Mapping[str, Any]) -> list[Row]:
    """Those of this method and these options; if none has them all, those that differ only in MAY_DIFFER."""
    options = {key: value for key, value in wanted.items() if key not in ("name", *MAY_DIFFER)}
    like = [
        row
        for row in rows
        if row.name == wanted.get("name") and all(same(row.options.get(key), value) for key, value in options.items())
    ]
    return [row for row in like if not _otherwise(row, wanted)] or like


def _otherwise(row: Row, wanted: Mapping[str, Any]) -> list[str]:
    """Which options of MAY_DIFFER are not as in the printed row."""
    return [option for option in MAY_DIFFER if option in wanted and not same(row.options.get(option), wanted[option])]


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
