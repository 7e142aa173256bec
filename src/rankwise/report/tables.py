"""The table of results as Markdown, CSV and LaTeX. The columns are those of the HTML page."""

import csv as csv_format
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from rankwise.errors import shown_line
from rankwise.results.columns import Column, best_of, columns, values
from rankwise.results.notes import footnotes
from rankwise.results.rows import Row

Columns = Sequence[Column[Row]]
_LATEX = {"\\": "\\textbackslash{}", "±": "$\\pm$", "…": "--", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
_LATEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"} | {mark: f"${mark}$" for mark in "<>|"}


def markdown(rows: Sequence[Row], shown: Columns = (), caption: str = "", bold: bool = False) -> str:
    """A Markdown table with its notes below it.

    Args:
        shown: the columns; all if empty.
        caption: a line above the table; "" for none.
        bold: whether the best score of each task stands out.
    """
    shown = shown or columns(rows)
    cells = [
        [f"**{cell}**" if best else cell for cell, best in line] for line in _cells(rows, shown, bold, _in_markdown)
    ]
    lines = [
        [_in_markdown(column.full) for column in shown],
        ["---:" if column.number else "---" for column in shown],
        *cells,
    ]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"\n{_in_markdown(note)}\n".replace("\n* ", "\n\\* ", 1) for note in footnotes(rows))
    return f"{_in_markdown(caption)}\n\n{table}{notes}" if caption else table + notes


def csv(rows: Sequence[Row], shown: Columns = ()) -> str:
    """Comma-separated values in full precision, a line per row, of the columns `shown` or all there is of a row."""
    named = {key: value for column in shown for key, value in column.values.items()} or values(rows)
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    writer.writerow(map(_in_csv, named))
    writer.writerows([_in_csv(value(row)) for value in named.values()] for row in rows)
    return text.getvalue()


def latex(rows: Sequence[Row], shown: Columns = (), caption: str = "", bold: bool = False) -> str:
    """A LaTeX tabular that needs booktabs, in a table if it has a caption; notes are comments. Else as `markdown`."""
    shown = shown or columns(rows)
    places = "".join("r" if column.number else "l" for column in shown)
    cells = [
        [f"\\textbf{{{cell}}}" if best else cell for cell, best in line]
        for line in _cells(rows, shown, bold, _in_latex)
    ]
    lines = [
        f"\\begin{{tabular}}{{{places}}}",
        "\\toprule",
        *(f"{' & '.join(line)} \\\\" for line in [[_in_latex(column.full) for column in shown]]),
        "\\midrule",
        *(f"{' & '.join(line)} \\\\" for line in cells),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    if caption:
        lines = ["\\begin{table}", "\\centering", f"\\caption{{{_in_latex(caption)}}}", *lines, "\\end{table}"]
    return "".join(f"{line}\n" for line in [*lines, *(f"% {_one_line(note)}" for note in footnotes(rows))])


def _cells(
    rows: Sequence[Row], shown: Columns, bold: bool, written: Callable[[str], str]
) -> list[list[tuple[str, bool]]]:
    """For each row its cells, as `written`, and whether each is the best of its column."""
    best = {id(column): best_of(column, rows) if bold else [] for column in shown}
    return [
        [(written(column.cell(row)), any(row is each for each in best[id(column)])) for column in shown] for row in rows
    ]


def _in_markdown(text: str) -> str:
    """Foreign text as one line of Markdown, without columns, HTML and links of its own."""
    text = re.sub(r"([\\|`\[\]])", r"\\\1", _one_line(text)).replace("<", "&lt;")
    return re.sub(r"(?i)(?<=http)(?=s?:)|(?<=https)(?=:)|(?<=www)(?=\.)|(?<=ftp)(?=:)", "&#8203;", text)


def _in_csv(value: Any) -> Any:
    """A value of a CSV; a name that a spreadsheet would take for a formula has an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in _one_line(text))


def _one_line(text: str) -> str:
    """Without line breaks, which would end a row or a comment, and without what a terminal acts on."""
    return shown_line(" ".join(text.split()))
