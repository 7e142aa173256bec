"""The table of results as Markdown, CSV and LaTeX. The columns are those of the HTML page."""

import csv as csv_format
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.errors import shown_line
from rankwise.results.summary import chosen_on, duration, interval, plus_minus, size
from rankwise.results.tables import Row, unofficial


@dataclass(frozen=True, eq=False)
class Head:
    """What stands above a column, and whether there are numbers below it."""

    heading: str
    unit: str = ""
    number: bool = True


@dataclass(frozen=True, eq=False, kw_only=True)
class Column(Head):
    """A column of results: the cell of a row, the values behind the cell, and what they mean."""

    cell: Callable[[Row], str]
    values: Mapping[str, Callable[[Row], Any]]
    """Name in the CSV -> what stands there for a row; rows are sorted by the first."""
    meaning: str


def columns(rows: Sequence[Row]) -> list[Column]:
    """All columns for `rows`: what they are, how they score, their sizes, what they cost."""
    return [*who(rows), *scores(rows), *sizes(rows), *COSTS]


def who(rows: Sequence[Row]) -> list[Column]:
    """The method, behind the task where there are several."""
    return [TASK, METHOD] if len({row["task"] for row in rows}) > 1 else [METHOD]


def scores(rows: Sequence[Row]) -> list[Column]:
    """The main metric with its interval, how it came about, and the further metrics."""
    names = list(dict.fromkeys(row["score"] for row in rows))
    others = dict.fromkeys(name for row in rows for name in row["metrics"] if name != row["score"])
    main = Column(
        names[0] if len(names) == 1 and names[0] else "score",
        "mean ± sd",
        cell=lambda row: plus_minus(row["mean"], row["sd"]),
        values={"mean": _of("mean"), "sd": _of("sd")},
        meaning="mean over the seeds ± sample standard deviation",
    )
    return [*([METRIC] if len(names) > 1 else []), main, INTERVAL, RATE, SEEDS, *map(_metric, others)]


def sizes(rows: Sequence[Row]) -> list[Column]:
    """Parameters, with the share of a budget where there is one."""
    return [*SIZES, *([SHARE] if any(row["asked"] for row in rows) else [])]


def task_name(row: Row) -> str:
    """The task, with a star when a split it was trained or scored on is not the official one."""
    return f"{row['task']} *" if unofficial(row) else row["task"]


def word(value: Any) -> str:
    """A setting as people say it: `not set` for None, options behind the name of a method or a task."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        options = ", ".join(f"{key}={word(each)}" for key, each in value.items() if key != "name")
        return f"{value.get('name', '')} ({options})" if options else str(value.get("name", ""))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    shown = columns(rows)
    lines = [
        [_in_markdown(_heading(column)) for column in shown],
        ["---:" if column.number else "---" for column in shown],
        *([_in_markdown(column.cell(row)) for column in shown] for row in rows),
    ]
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + _footnotes(rows, "\n{}\n", "\\*", _in_markdown)
    )


def csv(rows: Sequence[Row]) -> str:
    """Comma-separated values in full precision, one line per row, metrics as `accuracy` and `accuracy_sd`."""
    fixed = [TASK, METRIC, *(column for column in columns(rows) if column not in (TASK, METRIC))]
    metrics = map(_metric, dict.fromkeys(name for row in rows for name in row["metrics"]))
    found = {key: value for column in (*fixed, *metrics) for key, value in column.values.items()}
    found |= {key: _of(key) for key in ("split", "rows", "official", "note")}
    found |= {key: _of(key) for key in ("train_split", "train_official", "train_note", "asked", "used")}
    found["always"] = lambda row: row["always"]["score"] if row["always"] else None
    found["share"] = _of("share")
    found |= {f"tuned_{key}": _tuned(key) for key in ("split", "rows", "note")}
    found["tuned_rates"] = lambda row: (
        " ".join(f"{each['learning_rate']:g}" for each in row["tuned"]["rates"]) if row["tuned"] else None
    )
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    writer.writerow(map(_in_csv, found))
    writer.writerows([_in_csv(value(row)) for value in found.values()] for row in rows)
    return text.getvalue()


def latex(rows: Sequence[Row]) -> str:
    """A LaTeX tabular that needs the package booktabs."""
    shown = columns(rows)
    places = "".join("r" if column.number else "l" for column in shown)
    lines = [f"\\begin{{tabular}}{{{places}}}", "\\toprule", _latex_line([_heading(column) for column in shown])]
    lines.append("\\midrule")
    lines += [_latex_line([column.cell(row) for column in shown]) for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n" + _footnotes(rows, "% {}\n", "*", _one_line)


def _in_markdown(text: str) -> str:
    """Foreign text in one line of Markdown, in which it makes no column, no HTML and no link."""
    text = re.sub(r"([\\|`\[\]])", r"\\\1", _one_line(text)).replace("<", "&lt;")
    return re.sub(r"(?i)(?<=http)(?=s?:)|(?<=https)(?=:)|(?<=www)(?=\.)|(?<=ftp)(?=:)", "&#8203;", text)


def _in_csv(value: Any) -> Any:
    """A value of a CSV; a name that a spreadsheet would take for a formula has an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _heading(column: Head) -> str:
    return f"{column.heading} ({column.unit})" if column.unit else column.heading


def _one_line(text: str) -> str:
    """Without the line breaks that would end a row of a table, or a comment, early, and what a terminal acts upon."""
    return shown_line(" ".join(text.split()))


def _latex_line(cells: Sequence[str]) -> str:
    marks = {"\\": "\\textbackslash{}", "±": "$\\pm$", "…": "--", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    marks |= {mark: f"\\{mark}" for mark in "&%$#_{}"} | {mark: f"${mark}$" for mark in "<>|"}
    return " & ".join("".join(marks.get(letter, letter) for letter in _one_line(cell)) for cell in cells) + " \\\\"


def _footnotes(rows: Sequence[Row], form: str, star: str, written: Callable[[str], str]) -> str:
    """Why a split is not official, and on what rates were chosen, so that no table is quoted without it."""
    marked = [f"{row['task']}, {split}: {why}" for row in rows for split, why in unofficial(row).items()]
    notes = [f"{star} {written(note)}" for note in marked]
    notes += [written(chosen_on(row)) for row in rows if row["tuned"]]
    return "".join(form.format(note) for note in dict.fromkeys(notes))


def _of(key: str) -> Callable[[Row], Any]:
    return lambda row: row[key]


def _tuned(key: str) -> Callable[[Row], Any]:
    return lambda row: row["tuned"][key] if row["tuned"] else None


def _end(place: int) -> Callable[[Row], Any]:
    return lambda row: row["interval"][place] if row["interval"] else None


def _metric(name: str) -> Column:
    def value(kind: str) -> Callable[[Row], Any]:
        return lambda row: row["metrics"].get(name, {}).get(kind)

    return Column(
        name,
        "mean ± sd",
        cell=lambda row: plus_minus(value("mean")(row), value("sd")(row)),
        values={name: value("mean"), f"{name}_sd": value("sd")},
        meaning="a further metric of the same runs",
    )


def _count(heading: str, key: str, meaning: str) -> Column:
    return Column(heading, "parameters", cell=lambda row: f"{row[key]:,}", values={key: _of(key)}, meaning=meaning)


TASK = Column(
    "task",
    number=False,
    cell=task_name,
    values={"task": _of("task")},
    meaning="* marks a split that is not official, trained on or scored",
)
METHOD = Column(
    "method",
    number=False,
    cell=_of("method"),
    values={"method": _of("method")},
    meaning="name, rank, and what tells it from the others",
)
METRIC = Column(
    "metric", number=False, cell=_of("score"), values={"score": _of("score")}, meaning="the main metric of the task"
)
INTERVAL = Column(
    "95 % interval",
    cell=lambda row: interval(row["interval"], row["n"]),
    values={"interval_low": _end(0), "interval_high": _end(1)},
    meaning="Student's t-interval of the mean over the seeds, within what the metric can be",
)
RATE = Column(
    "learning rate",
    cell=lambda row: f"{row['learning_rate']:g}",
    values={"learning_rate": _of("learning_rate")},
    meaning="of the adapters and the head",
)
SEEDS = Column(
    "seeds", cell=lambda row: str(row["n"]), values={"n": _of("n")}, meaning="how many runs the row draws together"
)
SIZES = (
    _count("budget", "budget", "parameters of the size given: of uniform ranks, or all that trains beside the head"),
    _count("peak", "trainable", "most adapter parameters at any time, with the weights ω of a search"),
    _count("final", "final", "adapter parameters at the end"),
    _count("head", "head", "parameters of the head, in none of the other counts"),
)
SHARE = Column(
    "of budget",
    cell=lambda row: "outside" if row["used"] is None else f"{row['used']:.1%}",
    values={"used": _of("used")},
    meaning="the peak as a share of what the experiment's budget allows every method",
)
COSTS = (
    Column(
        "peak memory",
        cell=lambda row: size(row["peak_memory"]),
        values={"peak_memory": _of("peak_memory")},
        meaning="most memory in use at once, mean over the seeds",
    ),
    Column(
        "time of a run",
        cell=lambda row: duration(row["seconds"]),
        values={"seconds": _of("seconds")},
        meaning="training with its evaluations, mean over the seeds",
    ),
    Column(
        "speed",
        "rows/s",
        cell=lambda row: f"{row['examples_per_second']:.1f}",
        values={"examples_per_second": _of("examples_per_second")},
        meaning="training rows per second, mean",
    ),
    Column(
        "adapter",
        "on disk",
        cell=lambda row: size(row["adapter_bytes"]),
        values={"adapter_bytes": _of("adapter_bytes")},
        meaning="size of what is saved, mean over the seeds",
    ),
)
