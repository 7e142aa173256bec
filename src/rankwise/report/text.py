"""The table of results as Markdown, CSV and LaTeX. The columns are those of the HTML page."""

import csv as csv_format
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankwise.runs.summary import duration, plus_minus, size, span
from rankwise.runs.tables import Row, unofficial


@dataclass(frozen=True)
class Column:
    """One column: what stands above it, what it means, and the cell of a row."""

    heading: str
    cell: Callable[[Row], str]
    meaning: str = ""
    unit: str = ""
    number: bool = True


def columns(rows: Sequence[Row]) -> list[Column]:
    """All columns for `rows`: what they are, how they score, their sizes, what they cost."""
    return [*who(rows), *scores(rows), *SIZES, *COSTS]


def who(rows: Sequence[Row]) -> list[Column]:
    """The method, behind the task where there are several."""
    method = Column("method", lambda row: row["method"], "name, rank, and what tells it from the others", number=False)
    task = Column("task", task_name, "* marks a split that is not official, trained on or scored", number=False)
    return [task, method] if len({row["task"] for row in rows}) > 1 else [method]


def scores(rows: Sequence[Row]) -> list[Column]:
    """The main metric with its interval, how it came about, and the further metrics."""
    names = list(dict.fromkeys(row["score"] for row in rows))
    others = dict.fromkeys(name for row in rows for name in row["metrics"] if name != row["score"])
    main = Column(
        names[0] if len(names) == 1 and names[0] else "score",
        lambda row: plus_minus(row["mean"], row["sd"]),
        "mean over the seeds ± sample standard deviation",
        "mean ± sd",
    )
    metric = Column("metric", lambda row: row["score"], "the main metric of the task", number=False)
    return [
        *([metric] if len(names) > 1 else []),
        main,
        Column("95 % interval", lambda row: span(row["interval"]), "Student's t-interval of the mean over the seeds"),
        Column("learning rate", lambda row: f"{row['learning_rate']:g}", "of the adapters and the head"),
        Column("seeds", lambda row: str(row["n"]), "how many runs the row draws together"),
        *(Column(name, _metric(name), "a further metric of the same runs", "mean ± sd") for name in others),
    ]


def task_name(row: Row) -> str:
    """The task, with a star when a split it was trained or scored on is not the official one."""
    return f"{row['task']} *" if unofficial(row) else row["task"]


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    shown = columns(rows)
    lines = [
        [_heading(column) for column in shown],
        ["---:" if column.number else "---" for column in shown],
        *([column.cell(row).replace("|", "\\|") for column in shown] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + _footnote(rows, "\n\\* {}\n")


def csv(rows: Sequence[Row]) -> str:
    """Comma-separated values in full precision, one line per row, metrics as `accuracy` and `accuracy_sd`."""
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    keys = ["task", "method", "learning_rate", "n", "score", "mean", "sd", "budget", "trainable", "final", "head"]
    keys += ["peak_memory", "seconds", "examples_per_second", "adapter_bytes", "split", "rows", "official", "note"]
    keys += ["train_split", "train_official", "train_note"]
    ends = [f"{name}{end}" for name in metrics for end in ("", "_sd")]
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    writer.writerow([*keys, "interval_low", "interval_high", *ends])
    for row in rows:
        low, high = row["interval"] or (None, None)
        values = [row["metrics"].get(name, {}).get(kind) for name in metrics for kind in ("mean", "sd")]
        writer.writerow([*(row[key] for key in keys), low, high, *values])
    return text.getvalue()


def latex(rows: Sequence[Row]) -> str:
    """A LaTeX tabular that needs the package booktabs."""
    shown = columns(rows)
    places = "".join("r" if column.number else "l" for column in shown)
    lines = [f"\\begin{{tabular}}{{{places}}}", "\\toprule", _latex_line([_heading(column) for column in shown])]
    lines.append("\\midrule")
    lines += [_latex_line([column.cell(row) for column in shown]) for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n" + _footnote(rows, "% * {}\n")


def _heading(column: Column) -> str:
    return f"{column.heading} ({column.unit})" if column.unit else column.heading


def _latex_line(cells: Sequence[str]) -> str:
    marks = {"\\": "\\textbackslash{}", "±": "$\\pm$", "…": "--", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    marks |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return " & ".join("".join(marks.get(letter, letter) for letter in cell) for cell in cells) + " \\\\"


def _footnote(rows: Sequence[Row], form: str) -> str:
    """Why a split is not official, so that no table is quoted without it."""
    notes = dict.fromkeys(f"{row['task']}, {split}: {why}" for row in rows for split, why in unofficial(row).items())
    return "".join(form.format(note) for note in notes)


def _metric(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = row["metrics"].get(name)
        return plus_minus(found["mean"], found["sd"]) if found else ""

    return cell


def _count(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:,}"


SIZES = (
    Column("budget", _count("budget"), "adapter parameters that the method may spend", "parameters"),
    Column(
        "peak", _count("trainable"), "most adapter parameters at any time, with the weights ω of a search", "parameters"
    ),
    Column("final", _count("final"), "adapter parameters at the end", "parameters"),
    Column("head", _count("head"), "parameters of the head, in none of the other counts", "parameters"),
)
COSTS = (
    Column("peak memory", lambda row: size(row["peak_memory"]), "most memory in use at once, mean over the seeds"),
    Column("time of a run", lambda row: duration(row["seconds"]), "training with its evaluations, mean over the seeds"),
    Column("speed", lambda row: f"{row['examples_per_second']:.1f}", "training rows per second, mean", "rows/s"),
    Column("adapter", lambda row: size(row["adapter_bytes"]), "size of what is saved, mean over the seeds", "on disk"),
)
