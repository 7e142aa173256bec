"""WikiSQL (Zhong et al. 2017, arXiv 1709.00103): the query that answers a question about a table.

`RANKWISE_DATA/wikisql/<split>.parquet` or `Salesforce/wikisql` on the hub, in one of two layouts:

    the hub's   `question`, `table` (header, types, rows) and `sql` (sel, agg, conds): the query is written from its
                parts and can be executed
    queries     `question`, `sql_plain` (the query as text), `known_columns` and `sql_complete`: without tables, so that
                queries cannot be executed. The columns are those that some query of the table names: a part of the
                header with all the right ones, which makes the task easier. Rows with an incomplete query are left out.

The model reads the question and the columns, separated by ` | `, and writes the query in the form that
`rankwise.metrics.wikisql` reads. Cells of tables are never an input.
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

# The repository has a script, of which the hub keeps parquet files.
ORIGIN = Origin("WikiSQL", "wikisql", "Salesforce/wikisql", revision="refs/convert/parquet")
OFFICIAL = {"train": 56_355, "validation": 8_421, "test": 15_878}


@dataclass(frozen=True)
class WikiSQL(Generation, name="wikisql"):
    """A query from a question and a table's columns; logical-form accuracy, and execution accuracy if there are tables.

    LoRA's published numbers are on the validation rows, those of papers on WikiSQL on the test rows.
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
        scores = per_query(hypotheses, data["target"][:], data["columns"][:], tables)
        notes = () if tables else ("no execution accuracy: the data has no tables",)
        return Judged({k: float(v.mean()) for k, v in scores.items()}, scores["logical_form"].tolist(), notes)


def _split(name: str, tables: bool) -> Split:
    """The rows of a split, with `columns` for scoring and, if `tables` is True and the data has tables, `cells`."""
    datasets = need("datasets", "bench")
    rows = ORIGIN.read(name)
    examples, left_out, note = _queries(rows) if "known_columns" in rows.table.column_names else _tables(rows, tables)
    if not examples:
        raise InputError(f"{rows.where} has only rows {left_out}: {rows.remedy}")
    missing = rows.table.num_rows - len(examples)
    notes = [
        rows.note(name, OFFICIAL[name], len(examples)),
        f"{missing:,} rows {left_out} left out" if missing else "",
        note,
    ]
    columns = {column: [row[column] for row in examples] for column in examples[0]}
    columns["idx"] = list(range(len(examples)))
    joined = "; ".join(filter(None, notes))
    return Split(rows.split, datasets.Dataset.from_dict(columns), not joined, joined)


def _queries(rows: Rows) -> tuple[list[dict[str, Any]], str, str]:
    """Rows of the layout without tables; which rows are left out; and a note on the others."""
    pa = need("pyarrow", "bench")
    texts = ("question", "sql_plain")
    types = dict.fromkeys(texts, pa.string()) | {"known_columns": pa.list_(pa.string()), "sql_complete": pa.bool_()}
    examples = []
    for index, row in enumerate(checked(rows, types, filled=texts).to_pylist()):
        columns, target = row["known_columns"], row["sql_plain"]
        if row["sql_complete"]:
            if parse(target, columns) is None:
                raise InputError(f"{rows.where}: the query in {rows.at(index)} cannot be read: {rows.remedy}")
            examples.append({"source": _source(row["question"], columns), "target": target, "columns": columns})
    easier = "the columns in the input are those that queries name, which is easier than the full header"
    return examples, "without a complete query", easier


def _tables(rows: Rows, tables: bool) -> tuple[list[dict[str, Any]], str, str]:
    """Rows of the hub's layout; which rows are left out; and a note on the others."""
    pa = need("pyarrow", "bench")
    table = checked(rows, {"question": pa.string(), "table": None, "sql": None}, filled=("question",))
    parts = {"question": table["question"], "sql": table["sql"], "header": _field(rows, table, "header")}
    if tables:
        parts |= {"types": _field(rows, table, "types"), "cells": _field(rows, table, "rows")}
    examples = []
    for index, row in enumerate(pa.table(parts).to_pylist()):
        try:
            query, header = _query(row["sql"], row["header"]), row["header"]
            example = {"source": _source(row["question"], header), "target": render(query), "columns": header}
            if tables:
                example |= {"types": row["types"], "cells": [[str(cell) for cell in cells] for cells in row["cells"]]}
                _table(example)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = error if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise InputError(
                f"{rows.where}: {rows.at(index)} is not in WikiSQL's format ({reason}): {rows.remedy}"
            ) from None
        if parse(example["target"], header) == query:
            examples.append(example)
    return examples, "whose query has no reading as text", ""


def _field(rows: Rows, table: "pa.Table", name: str) -> Any:
    """One part of every row's table; reading all of them would need much memory for the cells."""
    try:
        return need("pyarrow.compute", "bench").struct_field(table["table"], name)
    except need("pyarrow", "bench").ArrowException:
        raise InputError(f"{rows.where}: the column 'table' has no {name!r}: {rows.remedy}") from None


def _query(sql: dict[str, Any], header: list[str]) -> Query:
    """The query that WikiSQL stores as numbers of columns, aggregations and operators."""
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
