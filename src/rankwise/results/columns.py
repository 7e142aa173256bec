"""The columns of tables, for terminal, page, Markdown, CSV and LaTeX alike.

A column is declared once, with its header, unit, format and meaning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeVar

from rankwise.errors import InputError, nearest
from rankwise.metrics import worth
from rankwise.results.formats import duration, plain, plus_minus, size, span_over
from rankwise.results.notes import remarks
from rankwise.results.rows import Row, unofficial
from rankwise.results.tuning import Rate

T = TypeVar("T")
MEAN_SD = "mean ± sd"


@dataclass(frozen=True, eq=False)
class Head:
    """What stands above a column, and whether there are numbers below it."""

    heading: str
    unit: str = ""
    number: bool = True

    @property
    def full(self) -> str:
        """Heading and unit in one."""
        return f"{self.heading} ({self.unit})" if self.unit else self.heading


@dataclass(frozen=True, eq=False, kw_only=True)
class Column(Head, Generic[T]):
    """A column: the cell of a row, the values that it shows, and what they mean.

    Attributes:
        cell: what is shown for a row.
        values: name in the CSV -> what stands there for a row; rows are sorted by the first.
        meaning: in a few words; "" for a column that explains itself.
        on_terminal: its heading there, without a second line for a unit; "" for `heading`.
        metric: for cells that are scores, its name for a row; the best can be shown in bold.
    """

    cell: Callable[[T], str]
    values: Mapping[str, Callable[[T], Any]]
    meaning: str = ""
    on_terminal: str = ""
    metric: Callable[[T], str] | None = None

    def number_of(self, row: T) -> Any:
        """What a row is sorted by in this column; None for text."""
        return next(iter(self.values.values()))(row) if self.number else None


@dataclass(frozen=True)
class Tried(Rate):
    """A rate that was tried for a method, and whether it was chosen."""

    method: str
    chosen: bool


def columns(rows: Sequence[Row]) -> list[Column[Row]]:
    """All columns for `rows`: what they are, how they score, their sizes, what they cost."""
    return [*who(rows), *scores(rows), *sizes(rows), *COSTS]


def chosen(rows: Sequence[Row], names: Sequence[str]) -> list[Column[Row]]:
    """Those of `columns` and of the further metrics that are called `names`, in that order.

    A name is a heading or what the CSV calls a value. Raises InputError for one that is neither.
    """
    known: dict[str, Column[Row]] = {}
    for column in [TASK, METRIC, *columns(rows), *_metrics(rows), SHARE]:
        for name in (column.heading, *column.values):
            known.setdefault(name, column)
    if unknown := [name for name in names if name not in known]:
        shown = ", ".join(dict.fromkeys(column.heading for column in known.values()))
        raise InputError(f"no column is called {unknown[0]!r}{nearest(unknown[0], known)}; there are {shown}")
    return list(dict.fromkeys(known[name] for name in names))


def who(rows: Sequence[Row]) -> list[Column[Row]]:
    """The method, after the task if there are several."""
    return [TASK, METHOD] if len({row.task for row in rows}) > 1 else [METHOD]


def scores(rows: Sequence[Row]) -> list[Column[Row]]:
    """The main metric with its interval, how it came about, and the further metrics."""
    names = list(dict.fromkeys(row.score for row in rows))
    others = dict.fromkeys(name for row in rows for name in row.metrics if name != row.score)
    main: Column[Row] = Column(
        names[0] if len(names) == 1 and names[0] else "score",
        MEAN_SD,
        cell=lambda row: plus_minus(row.mean, row.sd),
        values={"mean": lambda row: row.mean, "sd": lambda row: row.sd},
        meaning="mean over the seeds ± sample standard deviation",
        on_terminal=MEAN_SD,
        metric=lambda row: row.score,
    )
    return [*([METRIC] if len(names) > 1 else []), main, INTERVAL, RATE, SEEDS, *map(_metric, others)]


def sizes(rows: Sequence[Row]) -> list[Column[Row]]:
    """Parameters, with the share of a budget if there is one."""
    return [*SIZES, *([SHARE] if any(row.asked for row in rows) else [])]


def values(rows: Sequence[Row]) -> dict[str, Callable[[Row], Any]]:
    """All there is of a row, by the names of the CSV."""
    fixed = [TASK, METRIC, *(column for column in columns(rows) if column not in (TASK, METRIC))]
    named = {key: value for column in (*fixed, *_metrics(rows)) for key, value in column.values.items()}
    for prefix, split in (("", "evaluated"), ("train_", "trained")):
        named |= {
            f"{prefix}{'split' if key == 'name' else key}": _of(f"{split}.{key}")
            for key in ("name", "rows", "official", "note", "own")
            if prefix + key != "train_rows"
        }
    named |= {key: _of(key) for key in ("asked", "used", "share")}
    named["always"] = _of("always.score")
    named |= {
        f"tuned_{key}": _of(f"tuned.split.{'name' if key == 'split' else key}") for key in ("split", "rows", "note")
    }
    named["tuned_rates"] = lambda row: row.tuned and " ".join(f"{rate.learning_rate:g}" for rate in row.tuned.rates)
    named["notes"] = lambda row: " ".join(remarks(row))
    return named


def tried(rows: Sequence[Row]) -> list[tuple[list[Column[Tried]], list[Tried]]]:
    """Every rate that was tried for `rows` of one task; a table for each set of rows that rates were chosen by."""
    tables: dict[str, tuple[list[Column[Tried]], list[Tried]]] = {}
    for row in rows:
        if row.tuned is None:
            continue
        split = row.tuned.split
        score: Column[Tried] = Column(
            f"{row.tuned.score} on {split.name}",
            cell=lambda line: plus_minus(line.mean, line.sd),
            values={"mean": _of("mean")},
        )
        _, lines = tables.setdefault(f"{split.name} {split.rows}", ([*_TRIED[:3], score, _TRIED[3]], []))
        chosen = row.tuned.learning_rate
        lines += [
            Tried(**vars(rate), method=row.method, chosen=rate.learning_rate == chosen) for rate in row.tuned.rates
        ]
    return list(tables.values())


def on_terminal(shown: Sequence[Column[T]], rows: Sequence[T]) -> str:
    """A table of plain text."""
    return plain(
        [column.on_terminal or column.heading for column in shown],
        [[column.cell(row) for column in shown] for row in rows],
    )


def scores_on_terminal(rows: Sequence[Row]) -> str:
    """The table of scores and sizes of one task, with the rate next to the method."""
    main, interval, rate, seeds, *others = scores(rows)
    return on_terminal([METHOD, rate, seeds, main, interval, *others, *sizes(rows)], rows)


def legend(rows: Sequence[Row]) -> str:
    """What the sizes and costs of `rows` are, a line each."""
    shown = (*sizes(rows), *COSTS)
    return "\n".join(f"{column.on_terminal or column.heading}: {column.meaning}" for column in shown)


def task_name(row: Row) -> str:
    """The task, with a star when a split it was trained or scored on is not the official one."""
    return f"{row.task} *" if unofficial(row) else row.task


def best_of(column: Column[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows with the best score in a column of scores, those of each task apart; equal ones are all best."""
    if column.metric is None:
        return []
    best = []
    for task in dict.fromkeys(row.task_options for row in rows):
        own = [row for row in rows if row.task_options == task and column.number_of(row) is not None]
        for name in dict.fromkeys(column.metric(row) for row in own):
            same = [row for row in own if column.metric(row) == name]
            top = column.cell(max(same, key=lambda row: worth(name, column.number_of(row))))
            best += [row for row in same if column.cell(row).split(" ")[0] == top.split(" ")[0]]
    return best


def _metrics(rows: Sequence[Row]) -> list[Column[Row]]:
    """A column for every metric of `rows`."""
    return [_metric(name) for name in dict.fromkeys(name for row in rows for name in row.metrics)]


def _of(key: str) -> Callable[[Any], Any]:
    """Reads what `key` names, such as `evaluated.rows`, from a row; None where a part on the way is None."""
    return lambda row: reduce(lambda value, part: value and getattr(value, part), key.split("."), row)


def _end(place: int) -> Callable[[Row], Any]:
    return lambda row: row.interval[place] if row.interval else None


def _metric(name: str) -> Column[Row]:
    def value(row: Row, kind: str) -> float | None:
        return getattr(row.metrics[name], kind) if name in row.metrics else None

    return Column(
        name,
        MEAN_SD,
        cell=lambda row: plus_minus(value(row, "mean"), value(row, "sd")),
        values={name: lambda row: value(row, "mean"), f"{name}_sd": lambda row: value(row, "sd")},
        meaning="a further metric of the same runs",
        metric=lambda _: name,
    )


def _count(key: str, meaning: str, heading: str = "") -> Column[Row]:
    return Column(
        heading or key, "parameters", cell=lambda row: f"{getattr(row, key):,}", values={key: _of(key)}, meaning=meaning
    )


TASK: Column[Row] = Column(
    "task",
    number=False,
    cell=task_name,
    values={"task": _of("task")},
    meaning="* marks a split that is not official, trained on or scored",
)
METHOD: Column[Row] = Column(
    "method",
    number=False,
    cell=_of("method"),
    values={"method": _of("method")},
    meaning="name, rank, and what tells it from the others",
)
METRIC: Column[Row] = Column(
    "metric", number=False, cell=_of("score"), values={"score": _of("score")}, meaning="the main metric of the task"
)
INTERVAL: Column[Row] = Column(
    "95 % interval",
    cell=lambda row: span_over(row.interval, row.n),
    values={"interval_low": _end(0), "interval_high": _end(1)},
    meaning="Student's t-interval of the mean over the seeds, within the metric's range",
)
RATE: Column[Row] = Column(
    "learning rate",
    cell=lambda row: f"{row.learning_rate:g}" if row.trains else "",
    values={"learning_rate": _of("learning_rate")},
    meaning="of the adapters and the head",
)
SEEDS: Column[Row] = Column(
    "seeds",
    cell=lambda row: str(row.n),
    values={"n": _of("n")},
    meaning="how many runs the row averages over",
)
SIZES = (
    _count("budget", "parameters of the size given (uniform ranks, or all that trains except the head)"),
    _count("trainable", "most adapter parameters at any time, with the weights ω of a search", "peak"),
    _count("final", "adapter parameters at the end"),
    _count("head", "parameters of the head, in none of the other counts"),
)
SHARE: Column[Row] = Column(
    "of budget",
    cell=lambda row: f"{row.used:.1%}" if row.used is not None else "outside" if row.trains else "",
    values={"used": _of("used")},
    meaning="the peak as a share of what the experiment's budget allows every method",
)
COSTS: tuple[Column[Row], ...] = (
    Column(
        "peak memory",
        cell=lambda row: size(row.peak_memory),
        values={"peak_memory": _of("peak_memory")},
        meaning="most memory in use at once, mean over the seeds",
    ),
    Column(
        "time of a run",
        cell=lambda row: duration(row.seconds),
        values={"seconds": _of("seconds")},
        meaning="training with its evaluations, mean over the seeds",
    ),
    Column(
        "speed",
        "rows/s",
        cell=lambda row: f"{row.examples_per_second:.1f}" if row.trains else "",
        values={"examples_per_second": _of("examples_per_second")},
        meaning="training rows per second, mean",
        on_terminal="examples/s",
    ),
    Column(
        "adapter",
        "on disk",
        cell=lambda row: size(row.adapter_bytes),
        values={"adapter_bytes": _of("adapter_bytes")},
        meaning="size of what is saved, without padding, mean over the seeds",
        on_terminal="adapter on disk",
    ),
)
_TRIED: tuple[Column[Tried], ...] = (
    Column("method", number=False, cell=_of("method"), values={"method": _of("method")}),
    Column("rate tried", cell=lambda line: f"{line.learning_rate:g}", values={"learning_rate": _of("learning_rate")}),
    Column("seeds", cell=lambda line: str(line.n), values={"n": _of("n")}),
    Column("outcome", number=False, cell=lambda line: "chosen" * line.chosen, values={"chosen": _of("chosen")}),
)
