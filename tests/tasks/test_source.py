"""Files and what can be wrong with them: every message is one line that names the file and the place in it."""

import csv
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asserts import refused
from rankwise.tasks.source import Origin, checked, read

STRINGS = {"text": pa.string(), "target": pa.string()}


def fails(folder, types=STRINGS, filled=("target",)) -> str:
    return refused(lambda: checked(read(str(folder), "train"), types, filled))


TEXT = st.text(st.characters(exclude_characters="\r\x00", exclude_categories=["Cs"]), max_size=8)


@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6))
@settings(deadline=None)
def test_the_kinds_of_files_give_the_same_texts(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    texts, targets = [text for text, _ in rows], [target for _, target in rows]
    pq.write_table(pa.table({"text": texts, "target": targets}), folder / "a.parquet")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "target"), *rows])
    lines = [json.dumps({"target": b, "text": a}, ensure_ascii=False) for a, b in rows]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "a.json").write_text(f"[{', '.join(lines)}]", encoding="utf-8-sig")
    for ending in ("parquet", "csv", "jsonl", "json"):
        table = checked(read(str(folder / f"a.{ending}"), "train"), STRINGS)
        assert table.to_pydict() == {"text": texts, "target": targets}
        assert table.schema.types == [pa.string()] * 2


def test_a_folder_has_a_file_for_each_split(tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text("text,target\na,b\n")
    (tmp_path / "validation.jsonl").write_text('{"text": "c", "target": "d"}\n')
    monkeypatch.chdir(tmp_path.parent)
    for folder in (str(tmp_path), tmp_path.name, f"./{tmp_path.name}"):
        assert read(folder, "train").table.to_pydict() == {"text": ["a"], "target": ["b"]}
        assert read(folder, "validation").table["text"].to_pylist() == ["c"]
    assert "test.parquet does not exist (nor .csv or .jsonl or .json)" in refused(lambda: read(str(tmp_path), "test"))
    (tmp_path / "train.parquet").write_bytes(b"")
    assert "both train.parquet and train.csv" in refused(lambda: read(str(tmp_path), "train"))
    assert "there is no such file or folder" in refused(lambda: read(str(tmp_path / "nowhere"), "train"))
    assert "nowhere.csv: there is no such file or folder" in refused(lambda: read("nowhere.csv", "train"))
    (tmp_path / "odd.xlsx").touch()
    assert "a file whose name ends in .parquet or" in refused(lambda: read(str(tmp_path / "odd.xlsx"), "train"))
    assert '(did you mean "train.csv"?)' in refused(lambda: read(str(tmp_path / "trian.csv"), "train"))


def test_values_of_a_csv_are_text_until_they_are_cast(tmp_path):
    (tmp_path / "train.csv").write_text('\ufefftext,target,value\n007,NA,1.5\n"a,\n""b""",null,2\n\n', encoding="utf-8")
    rows = read(str(tmp_path), "train")
    table = checked(rows, STRINGS | {"value": pa.float32()})
    assert table.to_pydict() == {"text": ["007", 'a,\n"b"'], "target": ["NA", "null"], "value": [1.5, 2.0]}
    assert [rows.at(row) for row in (0, 1)] == ["line 2", "line 3"]


def test_a_long_field_is_read_and_the_limit_stays(tmp_path):
    before = csv.field_size_limit()
    assert before < 300_000 < sys.maxsize
    (tmp_path / "train.csv").write_text(f"text,target\n{'a' * 300_000},b\n")
    assert len(read(str(tmp_path), "train").table["text"][0].as_py()) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_of_a_spreadsheet_may_have_semicolons_or_tabs(tmp_path, mark):
    file = tmp_path / "train.csv"
    for header in ("text;target", '"text, or ""what"" is read";target', '"text\nbelow";target'):
        file.write_text(f"{header}\na, b;c\n'd';\"e;f\"\n".replace(";", mark).replace(f"e{mark}f", "e;f"))
        rows = read(str(tmp_path), "train").table.to_pylist()
        assert [list(row.values()) for row in rows] == [["a, b", "c"], ["'d'", "e;f"]]
    file.write_text("text;target\na;b;c\n".replace(";", mark))
    assert f"that contain {'semicolons' if mark == ';' else 'tabs'}" in fails(tmp_path)
    file.write_text("text,target\na;b,c\td\n")  # a comma in the header settles it
    assert read(str(tmp_path), "train").table.to_pylist() == [{"text": "a;b", "target": "c\td"}]


CSV = {
    "has no column 'target', only text, targets (did you mean \"targets\"?)": b"text,targets\na,b\n",
    "train.csv has no rows": b"text,target\n",
    "has no rows": b"",
    "has an empty target in line 3": b"text,target\na,b\nc,  \n",
    "has an empty target in line 4": b'text,target\n"a\nb",c\nd,\n',
    "line 3 has 3 fields but the header 2": b"text,target\na,b\nc,d,e\n",
    "line 2 has 1 fields but the header 2": b"text,target\na\n",
    "line 3 is not text in UTF-8": "text,target\na,b\nCafé,d\n".encode("latin-1"),
    "line 1 is not text in UTF-8": "text,target\na,b\n".encode("utf-16"),
    "line 4 is not valid CSV": b'text,target\na,b\nc,"d\ne\n',
    "the header has the column 'text' twice": b"text,text,target\na,b,c\n",
}


@pytest.mark.parametrize("wanted", CSV)
def test_a_bad_csv(tmp_path, wanted):
    (tmp_path / "train.csv").write_bytes(CSV[wanted])
    message = fails(tmp_path)
    assert wanted in message
    assert str(tmp_path / "train.csv") in message


JSONL = {
    "line 2 is not JSON": '{"text": "a", "target": "b"}\n{"text": "a",\n',
    "line 1 is not a JSON object": '["a", "b"]\n',
    "has no target in line 3": '{"text": "a", "target": "b"}\n\n{"text": "a"}\n',
    "has no text in line 2": '{"text": "a", "target": "b"}\n{"text": null, "target": "b"}\n',
    "'target' has values of several types in line 2": '{"text": "a", "target": "b"}\n{"text": "a", "target": 1}\n',
    "column 'target' does not hold string in line 1": '{"text": "a", "target": ["b"]}\n',
    "has no rows": "\n",
    "has an empty target in line 1": '{"text": "a", "target": "\\u3000"}\n',
}


JSON = {
    "train.json is not JSON (": '[{"text": "a", "target": "b"},\n]',
    "it has the key 'text' twice": '[{"text": "a", "target": "b", "text": "c"}]',
    "train.json is not a list of objects": '{"text": "a", "target": "b"}',
    "row 1 is not a JSON object": '[{"text": "a", "target": "b"}, "a"]',
    "has no target in row 1": '[{"text": "a", "target": "b"}, {"text": "a"}]',
    "'target' has values of several types in row 1": '[{"text": "a", "target": "b"}, {"text": "a", "target": 1}]',
    "has no rows": "[]",
    "is not text in UTF-8": b"\xff[]",
}


@pytest.mark.parametrize("wanted", JSON)
def test_a_bad_json(tmp_path, wanted):
    text = JSON[wanted]
    (tmp_path / "train.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = fails(tmp_path)
    assert wanted in message
    assert str(tmp_path / "train.json") in message


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_column_that_is_not_read_may_have_any_types(tmp_path, ending):
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": "two"}, {"text": "c", "id": [1, {}]}, {"text": "d"}]
    rows = [{**row, "big": 10 ** (30 * place)} for place, row in enumerate(rows)]
    text = json.dumps(rows) if ending == "json" else "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / f"train.{ending}").write_text(text)
    found = read(str(tmp_path), "train")
    assert checked(found, {"text": pa.string()})["text"].to_pylist() == ["a", "b", "c", "d"]
    assert found.take([0, 2]).mixed == found.mixed
    for column in ("id", "big"):
        message = refused(lambda: checked(found, {"text": pa.string(), column: None}))  # noqa: B023
        assert f"train.{ending}: column {column!r} has values of several types" in message


@pytest.mark.parametrize("wanted", JSONL)
def test_a_bad_jsonl(tmp_path, wanted):
    (tmp_path / "train.jsonl").write_text(JSONL[wanted])
    message = fails(tmp_path)
    assert wanted in message
    assert str(tmp_path / "train.jsonl") in message


PARQUET = {
    "has no column 'target', only text": {"text": ["a"]},
    "has no rows": {"text": pa.array([], pa.string()), "target": pa.array([], pa.string())},
    "has no target in row 1": {"text": ["a", "b"], "target": ["c", None]},
    "has an empty target in row 1": {"text": ["a", "b"], "target": ["c", ""]},
    "column 'text' does not hold string in row 0": {"text": [["a"]], "target": ["c"]},
}


@pytest.mark.parametrize("wanted", PARQUET)
def test_a_bad_parquet(tmp_path, wanted):
    pq.write_table(pa.table(PARQUET[wanted]), tmp_path / "train.parquet")
    message = fails(tmp_path)
    assert wanted in message
    assert str(tmp_path / "train.parquet") in message


@pytest.mark.parametrize("keep", [0, 3, 60, -1])
def test_a_damaged_parquet(tmp_path, keep):
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a"], "target": ["b"]}), file)
    file.write_bytes(file.read_bytes()[:keep])
    message = fails(tmp_path)
    assert f"{file} cannot be read as parquet" in message


@pytest.mark.parametrize("bad", [[], ["a", None], ["a", " "], [None]])
def test_a_list_of_references_must_be_full(tmp_path, bad):
    pq.write_table(pa.table({"references": [["a", "b"], bad, []]}), tmp_path / "train.parquet")
    message = fails(tmp_path, {"references": pa.list_(pa.string())}, ("references",))
    assert "has an empty references in row 1" in message


def test_a_value_that_does_not_cast_is_named_by_its_place(tmp_path):
    (tmp_path / "train.csv").write_text("value\n1\n2\nthree\n")
    message = fails(tmp_path, {"value": pa.int64()}, ())
    assert "column 'value' does not hold int64 in line 4" in message
    assert "three" in message


def test_blanks_can_be_left_out_and_places_stay(tmp_path):
    for ending, texts in (("parquet", ["a", "", None, "b"]), ("csv", ["a", "", " ", "b"])):
        file = tmp_path / f"train.{ending}"
        columns = {"text": texts, "target": ["w", "x", "y", ""]}
        if ending == "parquet":
            pq.write_table(pa.table(columns), file)
        else:
            with file.open("w", newline="") as opened:
                csv.writer(opened).writerows([columns, *zip(*columns.values(), strict=True)])
        rows = read(str(file), "train")
        kept = rows.without_blanks("text")
        assert kept.table["text"].to_pylist() == ["a", "b"]
        assert kept.without_blanks("text") is kept
        place = {"parquet": "row 3", "csv": "line 5"}[ending]
        assert f"has an empty target in {place}" in refused(lambda kept=kept: checked(kept, STRINGS, ("target",)))
        assert kept.without_blanks("target", "nothing").table["text"].to_pylist() == ["a"]


def test_a_published_set_is_where_the_variable_says(tmp_path, monkeypatch):
    origin = Origin("The set", "a/b", "some/where")
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "nowhere"))
    message = refused(lambda: origin.read("train"))
    assert "a/b/train.parquet" in message
    assert "unset it to take The set from the hub" in message
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path))
    assert "put it there, or unset RANKWISE_DATA" in refused(lambda: origin.read("train"))
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/train_subset.jsonl").write_text('{"text": "a"}\n')
    rows = origin.read("train")
    assert (rows.split, rows.table.num_rows) == ("train_subset", 1)
    assert rows.note("train", 1) == "train_subset: 1 rows, not the official 1 of train"
    (tmp_path / "a/b/train.csv").write_text("text\na\nb\n")
    assert origin.read("train").note("train", 2) == ""
    assert origin.read("train").note("train", 3) == "train: 2 rows, not the official 3 of train"
    assert origin.read("train").note("train", 2, 1) == "train: 1 rows, not the official 2 of train"
