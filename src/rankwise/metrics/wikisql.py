"""WikiSQL (Zhong et al. 2017): queries read from text, compared as logical forms and by what they return.

A query is written `SELECT [MAX|MIN|COUNT|SUM|AVG] column FROM table [WHERE column =|>|< value [AND …]]`, and
`COUNT(column)` is read as well. A value with a space in it is in double quotes, one without stands bare, and quotes of
the value's own are kept: `title = "Black"` asks for a text with quotes, and so does `title = ""Foreign Exchange""`.

Nothing in this form is escaped, and columns are not quoted, so that some texts have more than one reading:

- A column may hold an operator (`1 usd =`, `y = 2008`). With the table's columns given, the longest one that fits is
  taken; without, the text up to the first operator.
- ` AND ` ends a value only where a column and an operator follow it, and a quoted value only right after a quote. So
  `title = "salt AND pepper = dear"` is one condition, and `title = "a" AND b = "c"` is always two.
- Keywords are in upper case, so that `and`, `from` or `max` in lower case are words of a column or value. In a text
  that does not start with `SELECT` in upper case they count in any case; a known column `max speed` goes before.

A text that has no reading is no query. As a prediction it is wrong, never an error.
"""

import contextlib
import re
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from rankwise.errors import InputError
from rankwise.metrics.metric import Metric

AGGREGATIONS = ("MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
METRICS = dict.fromkeys(("logical_form", "execution"), Metric())

_LONGEST = 10_000
"""Characters of a text that is still read; the longest query of the data has a few hundred."""

Cell = str | float | int | None


class Condition(NamedTuple):
    """`column operator value`, column and value in lower case."""

    column: str
    operator: str
    value: str


@dataclass(frozen=True)
class Query:
    """A logical form. Two are equal when column, aggregation and the set of conditions are, all without case.

    Attributes:
        column: the selected column, in lower case.
        aggregation: one of `AGGREGATIONS`, or "".
        conditions: all of them must hold; a set, so that neither order nor repetition counts.
    """

    column: str
    aggregation: str = ""
    conditions: frozenset[Condition] = frozenset()


@dataclass(frozen=True)
class Table:
    """A table to run queries on.

    Attributes:
        columns: the names; of equal ones (without case) the first is meant.
        types: "text" or "real" for each column.
        rows: one cell for each column; None is an empty one.
    """

    columns: tuple[str, ...]
    types: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if not self.columns or len(self.columns) != len(self.types):
            raise InputError(f"a table has {len(self.columns)} columns and {len(self.types)} types: one for each")
        if wrong := sorted(set(self.types) - {"text", "real"}):
            raise InputError(f"{wrong[0]!r} is no type of a table: text or real")
        for place, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise InputError(f"row {place} of a table has {len(row)} cells for {len(self.columns)} columns")


def parse(text: str, columns: Iterable[str] = ()) -> Query | None:
    """The query that `text` is, or None if it is not one; the module says how it is read.

    `columns` are the table's, where they are known; they only choose between readings. Some missing, or a query with
    others, does no harm.
    """
    # the end of the statement, unless it is the last condition's value
    words = re.sub(r"(?<! [=<>]) ;$", "", " ".join(text.split()))
    if len(words) > _LONGEST:
        return None
    return _parse(words, tuple(sorted({_plain(name) for name in columns} - {""}, key=lambda c: (-len(c), c))))


def render(query: Query) -> str:
    """`query` as text, conditions in alphabetical order. `parse` with the same columns gives `query` back."""
    select = f"SELECT {query.aggregation} {query.column}" if query.aggregation else f"SELECT {query.column}"
    wheres = [
        f'{column} {operator} "{value}"' if " " in value else f"{column} {operator} {value}"
        for column, operator, value in sorted(query.conditions)
    ]
    return f"{select} FROM table" + (f" WHERE {' AND '.join(wheres)}" if wheres else "")


def logical_form(predicted: str, gold: str, columns: Iterable[str] = ()) -> bool:
    """Whether both texts are the same logical form: select column, aggregation and set of conditions.

    As the official script compares: values as texts in lower case, so that 5 and 5.0 differ. Columns are compared by
    name, there by number. InputError where `gold` is no query.
    """
    columns = tuple(columns)
    return parse(predicted, columns) == _gold(gold, columns)


def execution(predicted: str, gold: str, table: Table) -> bool:
    """Whether both queries return the same rows of `table`, in its order.

    The text never reaches SQLite: a new SELECT is built from what was read, columns by number, values bound, on a
    database in memory that nothing can write to and that stops after a set number of steps. A prediction that is no
    query, names a column that is not there or cannot be run is wrong.

    As in the official script texts are compared in lower case, and a value for a `real` column is read as a number,
    with commas for thousands, or else as the first number in it. Unlike there, two conditions on one column keep a
    value each: it gives both the later one's. InputError where `gold` is no query or cannot be run.
    """
    wanted = _gold(gold, table.columns)
    query = parse(predicted, table.columns)
    with contextlib.closing(_database(table)) as database:
        try:
            rows = _run(database, table, wanted)
        except (LookupError, sqlite3.Error) as error:
            raise InputError(f"the gold query cannot be run ({_one_line(error)}): {_short(gold)}") from None
        if query is None or query == wanted:
            return query is not None
        try:
            return _run(database, table, query) == rows
        except (LookupError, sqlite3.Error, UnicodeError):
            return False


def per_query(
    predictions: Sequence[str],
    golds: Sequence[str],
    columns: Sequence[Iterable[str]] | None = None,
    tables: Sequence[Table] | None = None,
) -> dict[str, np.ndarray]:
    """`logical_form` and, with `tables`, `execution` of every example, each (n,) floats, 1 right and 0 wrong.

    `columns` and `tables` have one entry for each example; the columns are the tables' where only those are given.
    InputError for counts that differ, for nothing at all, and for a gold query that cannot be read or run (its row).
    """
    n = len(predictions)
    if isinstance(predictions, str) or isinstance(golds, str):
        raise InputError("predictions and golds must be lists of queries, not one text")
    for what, values in (("gold queries", golds), ("lists of columns", columns), ("tables", tables)):
        if values is not None and len(values) != n:
            raise InputError(f"{n} predictions and {len(values)} {what}: there must be one for each")
    if not n:
        raise InputError("there are no predictions to score")
    if columns is None:
        columns = [table.columns for table in tables] if tables is not None else [()] * n
    scores = {"logical_form": np.zeros(n)} | ({"execution": np.zeros(n)} if tables is not None else {})
    for row, (predicted, gold, names) in enumerate(zip(predictions, golds, columns, strict=True)):
        try:
            scores["logical_form"][row] = logical_form(predicted, gold, names)
            if tables is not None:
                scores["execution"][row] = execution(predicted, gold, tables[row])
        except InputError as error:
            raise InputError(f"row {row}: {error}") from None
    return scores


def wikisql(
    predictions: Sequence[str],
    golds: Sequence[str],
    columns: Sequence[Iterable[str]] | None = None,
    tables: Sequence[Table] | None = None,
) -> dict[str, float]:
    """Logical-form accuracy and, with `tables`, execution accuracy, 0 to 1: means of `per_query`."""
    return {name: float(values.mean()) for name, values in per_query(predictions, golds, columns, tables).items()}


def _gold(text: str, columns: Iterable[str]) -> Query:
    query = parse(text, columns)
    if query is None:
        raise InputError(f"the gold text is no query of WikiSQL's form: {_short(text)}")
    return query


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:199]}…"


def _one_line(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


@lru_cache(maxsize=4096)  # one gold query is read for both metrics, and the same prediction comes again
def _parse(text: str, columns: tuple[str, ...]) -> Query | None:
    anycase = re.NOFLAG if text.startswith("SELECT ") else re.IGNORECASE
    found = re.fullmatch(r"SELECT (.+?) FROM (?i:table)(?: WHERE (.+))?", text, anycase)
    if not found:
        return None
    aggregation, column = _selected(found[1], columns, anycase)
    if found[2] is None:
        return Query(column, aggregation)
    conditions = _conditions(found[2], columns, anycase)
    return None if conditions is None else Query(column, aggregation, frozenset(conditions))


def _selected(text: str, columns: tuple[str, ...], anycase: re.RegexFlag) -> tuple[str, str]:
    """Aggregation and column of what stands between SELECT and FROM."""
    whole = ("", _plain(text))
    readings = []
    if spaced := re.fullmatch(rf"({'|'.join(AGGREGATIONS)}) (.+)", text, anycase):
        readings.append((spaced[1].upper(), _plain(spaced[2])))
    if called := re.fullmatch(rf"({'|'.join(AGGREGATIONS)}) ?\((.+)\)", text, anycase):
        readings.append((called[1].upper(), _plain(called[2])))
    # in lower case `max speed` is a column's name first; in upper case the keyword is one
    readings = [whole, *readings] if anycase and whole[1] in columns else [*readings, whole]
    return next((reading for reading in readings if reading[1] in columns), readings[0])


def _conditions(text: str, columns: tuple[str, ...], anycase: re.RegexFlag) -> list[Condition] | None:
    """The conditions of what follows WHERE; None if a part of it is not a condition."""
    joints = [(found.start(), found.end()) for found in re.finditer(r" AND (?=\S)", text, anycase)]
    heads = {start: _head(text, start, columns, anycase) for start in (0, *(end for _, end in joints))}
    conditions = []
    start = 0
    while True:
        head = heads[start]
        if head is None:
            return None
        column, operator, value_start = head
        ends = [(end, after) for end, after in joints if end > value_start and heads[after] is not None]
        ends.append((len(text), len(text)))
        if text[value_start] == '"':
            # right after a quote; a quote that is never closed belongs to a bare value
            ends = [place for place in ends if place[0] > value_start + 1 and text[place[0] - 1] == '"'] or ends
        end, after = ends[0]
        value = text[value_start:end].lower()
        if len(value) > 1 and value[0] == value[-1] == '"' and " " in value[1:-1]:
            value = value[1:-1].strip()
        if not value:
            return None
        conditions.append(Condition(column, operator, value))
        if after == len(text):
            return conditions
        start = after


def _head(text: str, start: int, columns: tuple[str, ...], anycase: re.RegexFlag) -> tuple[str, str, int] | None:
    """Column, operator and the place of the value of a condition that begins at `start`; None where none does."""
    for column in columns:
        if text[start : start + len(column)].lower() == column:
            operator = re.compile(r" ([=<>]) (?=\S)").match(text, start + len(column))
            if operator:
                return column, operator[1], operator.end()
    found = re.compile(r"(\S.*?) ([=<>]) (?=\S)").match(text, start)
    if not found:
        return None
    # `date and time = 5`: only where AND has any case and no column is known can it be inside of one
    if re.search(" AND ", found[1], anycase) and (columns or not anycase):
        return None
    return _plain(found[1]), found[2], found.end()


def _database(table: Table) -> sqlite3.Connection:
    """`table` in memory, texts in lower case. From here on it can only be read, and for a set number of steps."""
    database = sqlite3.connect(":memory:")
    kinds = ", ".join(f"c{place} {kind.upper()}" for place, kind in enumerate(table.types))
    database.execute(f"CREATE TABLE cells ({kinds})")
    marks = ", ".join("?" * len(table.columns))
    rows = [tuple(_cell(cell, kind) for cell, kind in zip(row, table.types, strict=True)) for row in table.rows]
    database.executemany(f"INSERT INTO cells VALUES ({marks})", rows)
    database.commit()

    def allow(action: int, _: str | None, function: str | None, *__: str | None) -> int:
        known = action == sqlite3.SQLITE_FUNCTION and str(function).upper() in AGGREGATIONS
        return (
            sqlite3.SQLITE_OK
            if known or action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
            else sqlite3.SQLITE_DENY
        )

    database.set_authorizer(allow)
    # One scan takes some ten steps for each cell; what takes a hundred times as many is no scan.
    rounds = iter(range(100 + len(table.rows) * (1 + len(table.columns))))
    database.set_progress_handler(lambda: next(rounds, None) is None, 1000)
    return database


def _cell(cell: Cell, kind: str) -> Cell:
    if cell is None:
        return None
    if kind == "text":
        return str(cell).lower()
    if not isinstance(cell, str):
        return float(cell)
    number = _number(cell, exact=True)
    return cell.lower() if number is None else number


def _number(text: str, exact: bool = False) -> float | None:
    """`text` as a number, commas for thousands allowed; else the first number in it, unless `exact`."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)"
    plain = text.strip().replace(",", "")
    if re.fullmatch(number, plain, re.ASCII):
        return float(plain)
    found = None if exact else re.search(number, text, re.ASCII)
    return float(found[0]) if found else None


def _run(database: sqlite3.Connection, table: Table, query: Query) -> list[tuple[Cell, ...]]:
    """What `query` returns. LookupError for a column that is not there or a number that none is."""
    places: dict[str, int] = {}
    for place, name in enumerate(table.columns):
        places.setdefault(_plain(name), place)

    def place_of(column: str) -> int:
        if column not in places:
            raise LookupError(f"there is no column {column!r}")
        return places[column]

    select = f"c{place_of(query.column)}"
    if query.aggregation:
        if query.aggregation not in AGGREGATIONS:
            raise LookupError(f"there is no aggregation {query.aggregation!r}")
        select = f"{query.aggregation}({select})"
    wheres: list[str] = []
    values: list[Cell] = []
    for column, operator, value in sorted(query.conditions):
        place = place_of(column)
        if operator not in OPERATORS:
            raise LookupError(f"there is no operator {operator!r}")
        bound: Cell = value
        if table.types[place] == "real":
            bound = _number(value)
            if bound is None:
                raise LookupError(f"{value!r} is no number")
        wheres.append(f"c{place} {operator} ?")
        values.append(bound)
    where = f" WHERE {' AND '.join(wheres)}" if wheres else ""
    return database.execute(f"SELECT {select} FROM cells{where}", values).fetchall()
