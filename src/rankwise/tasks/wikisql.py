"""WikiSQL (Zhong et al. 2017, arXiv 1709.00103): a question about a table into the query that answers it.

`RANKWISE_DATA/wikisql/<split>.parquet` or `Salesforce/wikisql` on the hub, in one of two layouts:

    the hub's   `question`, `table` (header, types, rows) and `sql` (sel, agg, conds): the query is written from its
                parts and can be executed
    queries     `question`, `sql_plain` (the query as text), `known_columns` and `sql_complete`: no tables, so that
                nothing can be executed. The columns are those that some query of the table names: a part of the
                header that always has the right ones, which makes the task easier. Rows with an incomplete query are
                left out.

The model reads the question and the columns, ` | ` between them, and writes the query as `rankwise.metrics.wikisql`
reads it. A table's cells are never an input.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import InputError, need
from rankwise.metrics.wikisql import AGGREGATIONS, OPERATORS, Condition, Query, Table, parse, per_query, render
from rankwise.tasks.base import Split
from rankwise.tasks.generation import Generation, Judged
from rankwise.tasks.source import Origin, Rows, checked

if TYPE_CHECKING:
    import pyarrow as pa

# The hub's own parquet files of what the repository has as a script.
ORIGIN = Origin("WikiSQL", "wikisql", "Salesforce/wikisql", revision="refs/convert/parquet")
OFFICIAL = {"train": 56_355, "validation": 8_421, "test": 15_878}


@dataclass(frozen=True)
class WikiSQL(Generation, name="wikisql"):
    """A question and a table's columns into a query; logical-form accuracy, and execution accuracy where tables are.

    LoRA's published numbers are on the validation rows, those of WikiSQL's own papers on the test rows.
    """

    main: ClassVar[str] = "logical_form"
    metrics: ClassVar[tuple[str, ...]] = ("logical_form", "execution")

    target_length: int = 96

    def train(self) -> Split:
        return _split("train", tables=False)

    def evaluation(self) -> list[Split]:
        return [_split(self.split, tables=True)]

    def score_texts(self, hypotheses: list[str], split: Split) -> Judged:
        data = split.data
        tables = None
        if "cells" in data.column_names:
            tables = [_table(row) for row in data.select_columns(["columns", "types", "cells"])]
        found = per_query(hypotheses, data["target"][:], data["columns"][:], tables)
        notes = () if tables else ("no execution accuracy: the data has no tables",)
        return Judged({name: float(each.mean()) for name, each in found.items()}, found["logical_form"].tolist(), notes)


def _split(name: str, tables: bool) -> Split:
    """The rows of a split, with the `columns` that scoring needs and, with `tables` and where there are any, cells."""
    datasets = need("datasets", "bench")
    rows = ORIGIN.read(name)
    found, left_out, note = _queries(rows) if "known_columns" in rows.table.column_names else _tables(rows, tables)
    if not found:
        raise InputError(f"{rows.where} has only rows {left_out}: {rows.remedy}")
    missing = rows.table.num_rows - len(found)
    notes = [
        rows.note(name, OFFICIAL[name], len(found)),
        f"{missing:,} rows {left_out} left out" if missing else "",
        note,
    ]
    columns = {column: [row[column] for row in found] for column in found[0]}
    columns["idx"] = list(range(len(found)))
    said = "; ".join(filter(None, notes))
    return Split(rows.split, datasets.Dataset.from_dict(columns), not said, said)


def _queries(rows: Rows) -> tuple[list[dict[str, Any]], str, str]:
    """Rows of the layout without tables; which are left out; and what is to be said of the rest."""
    pa = need("pyarrow", "bench")
    texts = ("question", "sql_plain")
    types = dict.fromkeys(texts, pa.string()) | {"known_columns": pa.list_(pa.string()), "sql_complete": pa.bool_()}
    found = []
    for place, row in enumerate(checked(rows, types, filled=texts).to_pylist()):
        columns, target = row["known_columns"], row["sql_plain"]
        if row["sql_complete"]:
            if parse(target, columns) is None:
                raise InputError(f"{rows.where}: the query in {rows.at(place)} cannot be read: {rows.remedy}")
            found.append({"source": _source(row["question"], columns), "target": target, "columns": columns})
    easier = "the columns in the input are those that queries name, which is easier than the full header"
    return found, "without a complete query", easier


def _tables(rows: Rows, tables: bool) -> tuple[list[dict[str, Any]], str, str]:
    """Rows of the hub's layout; which are left out; and what is to be said of the rest."""
    pa = need("pyarrow", "bench")
    table = checked(rows, {"question": pa.string(), "table": None, "sql": None}, filled=("question",))
    parts = {"question": table["question"], "sql": table["sql"], "header": _field(rows, table, "header")}
    if tables:
        parts |= {"types": _field(rows, table, "types"), "cells": _field(rows, table, "rows")}
    found = []
    for place, row in enumerate(pa.table(parts).to_pylist()):
        try:
            query = _query(row["sql"], row["header"])
            made = {
                "source": _source(row["question"], row["header"]),
                "target": render(query),
                "columns": row["header"],
            }
            if tables:
                made |= {"types": row["types"], "cells": [[str(cell) for cell in cells] for cells in row["cells"]]}
                _table(made)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = error if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise InputError(
                f"{rows.where}: {rows.at(place)} is not as WikiSQL has it ({reason}): {rows.remedy}"
            ) from None
        if parse(made["target"], row["header"]) == query:
            found.append(made)
    return found, "whose query has no reading as text", ""


def _field(rows: Rows, table: "pa.Table", name: str) -> Any:
    """A part of every row's table, without the others, whose cells take much room."""
    try:
        return need("pyarrow.compute", "bench").struct_field(table["table"], name)
    except need("pyarrow", "bench").ArrowException:
        raise InputError(f"{rows.where}: the column 'table' has no {name!r}: {rows.remedy}") from None


def _query(sql: dict[str, Any], header: list[str]) -> Query:
    """The query that WikiSQL writes as numbers of columns, aggregations and operators."""
    names = [_plain(name) for name in header]
    parts = (sql["conds"][part] for part in ("column_index", "operator_index", "condition"))
    conditions = zip(*parts, strict=True)
    return Query(
        names[sql["sel"]],
        ("", *AGGREGATIONS)[sql["agg"]],
        frozenset(Condition(names[column], OPERATORS[which], _plain(value)) for column, which, value in conditions),
    )


def _table(row: dict[str, Any]) -> Table:
    return Table(tuple(row["columns"]), tuple(row["types"]), tuple(map(tuple, row["cells"])))


def _plain(value: Any) -> str:
    return " ".join(str(value).lower().split())


def _source(question: str, columns: list[str]) -> str:
    return " | ".join([question.strip(), *columns])
