"""WikiSQL queries: what a text is read as, when two are equal, and what they return on a table."""

import contextlib
import os
import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rankwise.errors import InputError
from rankwise.metrics import wikisql as module
from rankwise.metrics.wikisql import (
    AGGREGATIONS,
    OPERATORS,
    Condition,
    Query,
    Table,
    execution,
    logical_form,
    parse,
    per_query,
    render,
    wikisql,
)

REAL = Path(os.environ.get("RANKWISE_DATA") or "nowhere") / "wikisql"

# Words that a reader could take for something else, and letters that are longer or other ones in lower case.
ODD = "a b max count from table where and 5 1,000 it's (x) é ΑΣ İ ; 100% FROM WHERE AND MAX"
parts = st.sampled_from(ODD.split())
names = st.lists(parts, min_size=1, max_size=3).map(lambda some: " ".join(some).lower())
hard_names = st.lists(parts | st.sampled_from(OPERATORS), min_size=1, max_size=4).map(
    lambda some: " ".join(some).lower()
)
values = st.one_of(
    st.lists(parts | st.sampled_from([*OPERATORS, 'say "a"']), min_size=1, max_size=4).map(" ".join),
    st.sampled_from(['"Black"', '"Foreign Exchange"', "6'10\"", "75=", '""']),
).map(str.lower)
easy_words = st.sampled_from(["year", "home", "team", "1995-96", "café", "(s)", "points"])
easy = st.lists(easy_words, min_size=1, max_size=3).map(" ".join)


def queries(columns, values=values, aggregations=("", *AGGREGATIONS)):
    conditions = st.builds(Condition, columns, st.sampled_from(OPERATORS), values)
    return st.builds(Query, columns, st.sampled_from(aggregations), st.frozensets(conditions, max_size=4))


def columns_of(*several):
    return {name for query in several for name in (query.column, *(c.column for c in query.conditions))}


def written(query, case=str, conditions=None):
    """`query` as text, with columns and values in another case, or with other conditions."""
    wheres = [
        f'{case(column)} {operator} "{case(value)}"' if " " in value else f"{case(column)} {operator} {case(value)}"
        for column, operator, value in (query.conditions if conditions is None else conditions)
    ]
    where = f" WHERE {' AND '.join(wheres)}" if wheres else ""
    return f"SELECT {query.aggregation} {case(query.column)} FROM table{where}"


@given(queries(names))
def test_what_is_written_is_read_back(query):
    assert parse(render(query)) == query
    assert parse(render(query), columns_of(query)) == query
    assert parse(f"  {render(query)}\n".replace(" ", "  ")) == query
    if not any(condition.value in OPERATORS for condition in query.conditions):
        assert parse(f"{render(query)} ;") == query


@given(queries(hard_names))
def test_operators_in_names_are_read_back_where_the_columns_are_known(query):
    columns = columns_of(query)
    # of `a` and `a = b`, the start of `a = b = c` may be both
    assume(not any(other.startswith(f"{name} ") for name in columns for other in columns))
    assert parse(render(query), columns) == query


@given(queries(names), st.randoms(use_true_random=False))
def test_order_and_repetition_of_conditions_do_not_count(query, random):
    conditions = [*query.conditions, *list(query.conditions)[:1]]
    random.shuffle(conditions)
    assert logical_form(written(query, conditions=conditions), render(query))


@given(queries(easy, easy))
def test_case_does_not_count(query):
    for case in (str.upper, str.title, str.swapcase):
        assert logical_form(written(query, case), render(query))
        assert logical_form(written(query, case).lower(), render(query), columns_of(query))


@given(queries(names), queries(names))
def test_two_queries_are_equal_when_all_three_parts_are(one, other):
    parts_equal = (one.column, one.aggregation, one.conditions) == (other.column, other.aggregation, other.conditions)
    assert logical_form(render(one), render(other), columns_of(one, other)) is parts_equal


@given(queries(names), st.data())
def test_one_changed_part_is_wrong(query, data):
    gold = render(query)
    assert not logical_form(render(Query(query.column + " more", query.aggregation, query.conditions)), gold)
    aggregation = data.draw(st.sampled_from([a for a in ("", *AGGREGATIONS) if a != query.aggregation]))
    assert not logical_form(render(Query(query.column, aggregation, query.conditions)), gold)
    for condition in query.conditions:
        rest = query.conditions - {condition}
        operator = data.draw(st.sampled_from([o for o in OPERATORS if o != condition.operator]))
        assert not logical_form(render(Query(query.column, query.aggregation, rest)), gold)
        changed = rest | {condition._replace(operator=operator)}
        assert logical_form(render(Query(query.column, query.aggregation, changed)), gold) is (
            changed == query.conditions
        )
        changed = rest | {condition._replace(value=f"{condition.value}0")}
        assert logical_form(render(Query(query.column, query.aggregation, changed)), gold) is (
            changed == query.conditions
        )


def one(column, operator, value):
    return frozenset([Condition(column, operator, value)])


@pytest.mark.parametrize(
    ("text", "columns", "query"),
    [
        ("SELECT Home team FROM table", (), Query("home team")),
        ("SELECT COUNT year FROM table ;", (), Query("year", "COUNT")),
        ("SELECT COUNT(year) FROM table", (), Query("year", "COUNT")),
        ("SELECT COUNT (year) FROM table", ("year",), Query("year", "COUNT")),
        ("SELECT COUNT (latin) FROM table", ("(latin)",), Query("(latin)", "COUNT")),
        # lower case is a word, unless the whole text is
        ("SELECT max speed FROM table", (), Query("max speed")),
        ("select max speed from table", (), Query("speed", "MAX")),
        ("select max speed from table", ("max speed",), Query("max speed")),
        ("select max max speed from table", ("max speed",), Query("max speed", "MAX")),
        ("Select max(speed) From Table", ("speed",), Query("speed", "MAX")),
        ("SELECT km from town FROM table", (), Query("km from town")),
        ("SELECT a FROM table WHERE you and i = 5", (), Query("a", "", one("you and i", "=", "5"))),
        ("select a from table where you and i = 5", (), Query("a", "", one("you and i", "=", "5"))),
        (
            "select a from table where b = 1 and date and time = 5",
            ("b", "date and time"),
            Query("a", "", one("b", "=", "1") | one("date and time", "=", "5")),
        ),
        # values with words of the language, and with quotes
        ('SELECT a FROM table WHERE b = "Salt AND Pepper"', (), Query("a", "", one("b", "=", "salt and pepper"))),
        ('SELECT a FROM table WHERE b = "salt AND b = 1"', (), Query("a", "", one("b", "=", "salt and b = 1"))),
        ('SELECT a FROM table WHERE b = "Tom" AND "Tim"', (), Query("a", "", one("b", "=", 'tom" and "tim'))),
        (
            'SELECT a FROM table WHERE b = "x FROM table WHERE c"',
            (),
            Query("a", "", one("b", "=", "x from table where c")),
        ),
        ("SELECT a FROM table WHERE b = Al Jefferson", (), Query("a", "", one("b", "=", "al jefferson"))),
        ('SELECT a FROM table WHERE b = "Black"', (), Query("a", "", one("b", "=", '"black"'))),
        ('SELECT a FROM table WHERE b = ""Black Sea""', (), Query("a", "", one("b", "=", '"black sea"'))),
        ('SELECT a FROM table WHERE b = 7" AND c > 3', (), Query("a", "", one("b", "=", '7"') | one("c", ">", "3"))),
        ('SELECT a FROM table WHERE b = "7" single"', (), Query("a", "", one("b", "=", '7" single'))),
        ('SELECT a FROM table WHERE b = "7 AND c > 3', (), Query("a", "", one("b", "=", '"7') | one("c", ">", "3"))),
        ("SELECT a FROM table WHERE b = < 100", (), Query("a", "", one("b", "=", "< 100"))),
        # operators in names
        ("SELECT a FROM table WHERE 1 usd = = 4.5", (), Query("a", "", one("1 usd", "=", "= 4.5"))),
        ("SELECT a FROM table WHERE 1 usd = = 4.5", ("1 usd =",), Query("a", "", one("1 usd =", "=", "4.5"))),
        (
            "SELECT a FROM table WHERE y = 2011 = b = 3",
            ("y", "Y = 2011"),
            Query("a", "", one("y = 2011", "=", "b = 3")),
        ),
    ],
)
def test_texts_with_more_than_one_reading(text, columns, query):
    assert parse(text, columns) == query


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SELECT",
        "SELECT FROM table",
        "SELECT a",
        "SELECT a FROM",
        "SELECT a FROM tables",
        "SELECT a FROM table WHERE",
        "SELECT a FROM table WHERE b",
        "SELECT a FROM table WHERE b =",
        "SELECT a FROM table WHERE = 5",
        "SELECT a FROM table WHERE b AND c = 5",
        "SELECT a FROM table WHERE b != 5",
        'SELECT a FROM table WHERE b = " "',
        "SELECT a FROM table ORDER BY a",
        "SELECT a FROM table; DROP TABLE cells",
        "UPDATE table SET a = 5",
        "SELECT a FROM table WHERE b = " + "5" * 20_000,
    ],
)
def test_what_is_no_query_is_wrong_and_no_error(text):
    assert parse(text) is None
    assert not logical_form(text, "SELECT a FROM table")
    assert not execution(text, "SELECT year FROM table", GAMES)


pieces = st.sampled_from(
    [
        "SELECT",
        "FROM",
        "table",
        "WHERE",
        "AND",
        *OPERATORS,
        '"',
        '""',
        "year",
        "city",
        "COUNT",
        "MAX(",
        ")",
        ";",
        "\ud800",
    ]
)


@given(st.text() | st.lists(pieces, max_size=25).map(" ".join) | st.lists(pieces, max_size=25).map("".join))
def test_no_prediction_is_an_error(text):
    gold = "SELECT year FROM table WHERE city = oslo"
    scores = per_query([text, f"SELECT {text}", f"{gold} AND {text}"], [gold] * 3, tables=[GAMES] * 3)
    for values in scores.values():
        assert set(values) <= {0.0, 1.0}
    assert logical_form(text, gold) is (parse(text) == parse(gold))


GAMES = Table(
    columns=("Year", "City", "Points", "City"),
    types=("real", "text", "real", "text"),
    rows=(
        (1994, "Oslo", "1,200.5", "x"),
        (1998, "Nagano", 900, "x"),
        (2002, "Salt Lake City", None, "x"),
        (2006, "Turin", "n/a", "y"),
        (2010, None, 900.0, "y"),
    ),
)


@pytest.mark.parametrize(
    ("predicted", "gold", "right"),
    [
        # other queries with the same answer
        ("SELECT year FROM table WHERE city = OSLO", "SELECT year FROM table WHERE points = 1200.5", True),
        ("SELECT year FROM table WHERE points = 1,200.50", "SELECT year FROM table WHERE year < 1995", True),
        ('SELECT year FROM table WHERE points = "900 or so"', "SELECT year FROM table WHERE points = 900", True),
        ("SELECT COUNT points FROM table", "SELECT COUNT year FROM table WHERE year < 2010", True),
        ("SELECT MIN year FROM table", "SELECT year FROM table WHERE city = oslo", True),
        ("SELECT city FROM table WHERE year > 3000", "SELECT year FROM table WHERE city = rome", True),
        # each condition keeps its own value
        (
            "SELECT year FROM table WHERE year > 1995 AND year < 2000",
            "SELECT year FROM table WHERE city = nagano",
            True,
        ),
        # other answers
        ("SELECT year FROM table WHERE city = oslo", "SELECT year FROM table WHERE city = turin", False),
        ("SELECT city FROM table", "SELECT year FROM table", False),
        ("SELECT MAX year FROM table", "SELECT MIN year FROM table", False),
        ("SELECT year FROM table WHERE city = rome", "SELECT MAX year FROM table WHERE city = rome", False),
        # what cannot be run
        ("SELECT nothing FROM table", "SELECT year FROM table", False),
        ("SELECT year FROM table WHERE nothing = 5", "SELECT year FROM table", False),
        ("SELECT year FROM table WHERE points = many", "SELECT year FROM table WHERE city = rome", False),
    ],
)
def test_execution(predicted, gold, right):
    assert execution(predicted, gold, GAMES) is right
    assert execution(gold, gold, GAMES) is True


def test_a_gold_query_that_cannot_be_used_is_an_error_with_its_row():
    good = "SELECT year FROM table"
    for gold, message in (
        ("SELECT", "row 1: the gold text is no query of WikiSQL's form: SELECT"),
        ("SELECT none FROM table", "row 1: the gold query cannot be run .there is no column 'none'.: SELECT none"),
        ("SELECT year FROM table WHERE year = x", "row 1: the gold query cannot be run .'x' is no number."),
    ):
        with pytest.raises(InputError, match=message) as caught:
            per_query([good, good], [good, gold], tables=[GAMES, GAMES])
        assert "\n" not in str(caught.value)


cells = st.none() | st.sampled_from(["Oslo", "oslo", "Rome", "5", "", "ÉVIAN"])
numbers = st.none() | st.integers(-9, 9) | st.sampled_from(["1,000", "-3"])
tables = st.lists(st.tuples(cells, numbers, cells, numbers), max_size=6).map(
    lambda rows: Table(("name", "size", "more", "max size"), ("text", "real", "text", "real"), tuple(rows))
)
of_texts = (st.sampled_from(["name", "more"]), st.sampled_from(OPERATORS), st.sampled_from(["oslo", "5"]))
of_numbers = (
    st.sampled_from(["size", "max size"]),
    st.sampled_from(OPERATORS),
    st.sampled_from(["0", "3", "-3", "1000", "1,000"]),
)
conditions = st.frozensets(st.builds(Condition, *of_texts) | st.builds(Condition, *of_numbers), max_size=2)
# SQLite has its own idea of the sum of texts
of_table = st.one_of(
    st.builds(Query, st.just("name"), st.sampled_from(["", "MAX", "MIN", "COUNT"]), conditions),
    st.builds(Query, st.sampled_from(["size", "max size"]), st.sampled_from(["", *AGGREGATIONS]), conditions),
)


def plain(query, table):
    """What `query` returns, by going through the rows."""

    def value(cell):
        if cell is None or not isinstance(cell, str):
            return cell
        return float(cell.replace(",", "")) if re.fullmatch(r"-?[\d,]+", cell) else cell.lower()

    def cell(row, column):
        place = table.columns.index(column)
        return value(row[place]) if table.types[place] == "real" else row[place] and row[place].lower()

    def holds(row, condition):
        left = cell(row, condition.column)
        number = "size" in condition.column
        right = value(condition.value) if number else condition.value
        if left is None:
            return False
        return {"=": left == right, ">": left > right, "<": left < right}[condition.operator]

    found = [cell(row, query.column) for row in table.rows if all(holds(row, c) for c in query.conditions)]
    some = [one for one in found if one is not None]
    if not query.aggregation:
        return found
    if query.aggregation == "COUNT":
        return [len(some)]
    if not some:
        return [None]
    return [{"MAX": max, "MIN": min, "SUM": sum, "AVG": lambda all: sum(all) / len(all)}[query.aggregation](some)]


@given(tables, of_table, of_table)
def test_execution_is_what_going_through_the_rows_gives(table, one, other):
    assert execution(render(one), render(other), table) is (plain(one, table) == plain(other, table))


@given(tables, of_table)
def test_equal_logical_forms_return_the_same(table, query):
    assert execution(written(query, str.title), render(query), table)


def test_the_database_can_only_be_read_and_not_for_long():
    with contextlib.closing(module._database(GAMES)) as database:
        for statement in (
            "DELETE FROM cells",
            "INSERT INTO cells VALUES (1, 2, 3, 4)",
            "DROP TABLE cells",
            "CREATE TABLE more (x)",
            "ATTACH 'file.db' AS more",
            "PRAGMA writable_schema = ON",
            "SELECT randomblob(5)",
            "SELECT load_extension('x')",
        ):
            with pytest.raises(sqlite3.DatabaseError, match="not authorized|prohibited"):
                database.execute(statement)
        assert database.execute("SELECT COUNT(c0) FROM cells").fetchall() == [(5,)]
        everything = ", ".join(f"cells AS t{place}" for place in range(12))
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            database.execute(f"SELECT COUNT(t0.c0) FROM {everything}").fetchall()


def test_per_query_and_means():
    gold = ["SELECT year FROM table WHERE city = oslo"] * 4
    predictions = [gold[0], "SELECT MIN year FROM table", "SELECT city FROM table", "?"]
    scores = per_query(predictions, gold, tables=[GAMES] * 4)
    assert {name: values.tolist() for name, values in scores.items()} == {
        "logical_form": [1, 0, 0, 0],
        "execution": [1, 1, 0, 0],
    }
    assert wikisql(predictions, gold, tables=[GAMES] * 4) == {"logical_form": 0.25, "execution": 0.5}
    assert wikisql(predictions, gold) == {"logical_form": 0.25}
    assert all(values.dtype == np.float64 for values in scores.values())


def test_columns_of_each_example_are_used():
    gold, other = 'SELECT a FROM table WHERE y = 1 = "b c"', "SELECT a FROM table WHERE y = 1 = b c"
    assert per_query([other] * 2, [gold] * 2, [["y"], ["y = 1"]])["logical_form"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "no predictions"),
        ((["a"], []), "1 predictions and 0 gold queries"),
        ((["a"], ["a"], [[], []]), "1 predictions and 2 lists of columns"),
        ((["a"], ["a"], None, []), "1 predictions and 0 tables"),
        (("a", "a"), "not one text"),
    ],
)
def test_lists_that_do_not_fit_are_refused(arguments, message):
    for metric in (per_query, wikisql):
        with pytest.raises(InputError, match=message):
            metric(*arguments)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (((), (), ()), "0 columns"),
        ((("a",), ("text", "real"), ()), "1 columns and 2 types"),
        ((("a",), ("int",), ()), "'int' is no type"),
        ((("a",), ("text",), (("x",), ("x", "y"))), "row 1 of a table has 2 cells for 1 columns"),
    ],
)
def test_tables_that_are_none_are_refused(table, message):
    with pytest.raises(InputError, match=message):
        Table(*table)


@pytest.mark.skipif(not REAL.is_dir(), reason="RANKWISE_DATA has no wikisql")
@pytest.mark.parametrize(("split", "rows"), [("train", 52_835), ("validation", 7_967), ("test", 14_942)])
def test_every_complete_query_of_the_data_is_read_as_its_source_has_it(split, rows):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [bench]")
    table = [row for row in parquet.read_table(REAL / f"{split}.parquet").to_pylist() if row["sql_complete"]]
    assert len(table) == rows
    for row in table:
        query = parse(row["sql_plain"], row["known_columns"])
        assert query is not None, row["sql_plain"]
        assert parse(render(query), row["known_columns"]) == query
        assert columns_of(query) <= set(row["known_columns"])
        # the column `sql` marks where each column's name starts, so that it has one reading only
        head, _, tail = row["sql"].removesuffix(" ;").partition(" FROM TABLE AS TABLEalias0")
        found = re.fullmatch(r"SELECT (?:([A-Z]+) )?TABLEalias0\.(.+)_FIELD", head)
        assert (query.aggregation, query.column.upper().replace(" ", "_")) == (found[1] or "", found[2])
        wanted = set()
        for condition in re.split(r" (?:WHERE|AND) (?=TABLEalias0\.)", tail)[1:]:
            column, operator, value = re.fullmatch(r"TABLEalias0\.(.+?)_FIELD ([=<>]) (.*)", condition).groups()
            if " " in value and value[0] == value[-1] == '"':
                value = value[1:-1]
            wanted.add((column, operator, value.lower()))
        assert {(c.column.upper().replace(" ", "_"), c.operator, c.value) for c in query.conditions} == wanted
