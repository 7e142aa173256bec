"""Conversations of anyone's own: every form and file, what is cut, and what is wrong with them in one line."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import rankwise as rw
from asserts import refused
from chats import sharegpt, tokenizer_for, turns, write
from rankwise import tasks
from rankwise.errors import InputError
from rankwise.metrics import METRICS
from rankwise.report.examples import of_run
from rankwise.results.predictions import predictions
from rankwise.tasks import Evaluation
from rankwise.tasks.generation import IGNORE
from rankwise.train.model import build
from rankwise.train.run import run
from runs import make

ROWS = [turns(f"What is {n} + {n}?", f"It is {n + n}.", system="Count." * (n % 2)) for n in range(40)]


def chat(dataset: Path, kind: str = "chat", **options: Any) -> Any:
    return tasks.build({"name": kind, "dataset": str(dataset), **options})


def read(task: Any) -> list[list[dict[str, Any]]]:
    return [json.loads(row)[0] for row in task._train[1]["conversation"].to_pylist()]


def messages(file: Path, **options: Any) -> list[list[dict[str, Any]]]:
    return read(chat(file, **options))


FORMS = {
    "messages": [{"messages": row} for row in ROWS],
    "conversations": [{"conversations": sharegpt(row)} for row in ROWS],
    "conversations with role and content": [{"conversations": row} for row in ROWS],
    "messages with from and value": [{"messages": sharegpt(row)} for row in ROWS],
    "JSON in a text": [{"messages": json.dumps(row)} for row in ROWS],
    "system in a column": [{"messages": row[-2:], "system": row[0]["content"] if row[2:] else ""} for row in ROWS],
    "ShareGPT with system in a column": [
        {"conversations": sharegpt(row[-2:]), "system": row[0]["content"] if row[2:] else None} for row in ROWS
    ],
    "content in parts": [
        {"messages": [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in row]} for row in ROWS
    ],
    "content in parts here and there": [
        {"messages": [row[0], *({**each, "content": [{"type": "text", "text": each["content"]}]} for each in row[1:])]}
        for row in ROWS
    ],
    "more keys": [{"messages": [{**each, "name": None} for each in row], "id": n} for n, row in enumerate(ROWS)],
}
ANY = (1, "two", [3], {"four": None})


def test_other_columns_may_hold_anything_but_not_one_that_is_read(tmp_path):
    rows = [{"messages": row, "id": ANY[place % 4]} for place, row in enumerate(ROWS)]
    assert len(ROWS) > 1 and messages(write(tmp_path / "a.jsonl", rows)) == ROWS
    write(tmp_path / "a.jsonl", [{"messages": row, "system": ANY[place % 2]} for place, row in enumerate(ROWS)])
    with pytest.raises(InputError, match="column 'system' has values of several types in line 2"):
        messages(tmp_path / "a.jsonl")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_conversations(tmp_path, form):
    assert messages(write(tmp_path / "a.jsonl", FORMS[form])) == ROWS
    (tmp_path / "a.json").write_text(json.dumps(FORMS[form], indent=1))
    assert messages(tmp_path / "a.json") == ROWS
    if form != "content in parts here and there":  # a column of parquet has one type
        pyarrow.parquet.write_table(pa.Table.from_pylist(FORMS[form]), tmp_path / "a.parquet")
        assert messages(tmp_path / "a.parquet") == ROWS


def test_a_csv_has_its_conversations_as_json(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([["messages"], *([json.dumps(row)] for row in ROWS)])
    assert messages(tmp_path / "a.csv") == ROWS


INSTRUCTIONS = {
    "prompt and completion": [{"prompt": row[-2]["content"], "completion": row[-1]["content"]} for row in ROWS],
    "instruction and output": [
        {"instruction": row[-2]["content"], "input": "", "output": row[-1]["content"]} for row in ROWS
    ],
    "without input": [{"instruction": row[-2]["content"], "output": row[-1]["content"]} for row in ROWS],
}


@pytest.mark.parametrize("form", INSTRUCTIONS)
def test_each_form_of_instructions_gives_the_same_conversations(tmp_path, form):
    wanted = [row[-2:] for row in ROWS]
    assert messages(write(tmp_path / "a.jsonl", INSTRUCTIONS[form]), kind="instruct") == wanted
    pyarrow.parquet.write_table(pa.Table.from_pylist(INSTRUCTIONS[form]), tmp_path / "a.parquet")
    assert messages(tmp_path / "a.parquet", kind="instruct") == wanted
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([[*INSTRUCTIONS[form][0]], *(row.values() for row in INSTRUCTIONS[form])])
    assert messages(tmp_path / "a.csv", kind="instruct") == wanted


def test_an_input_follows_its_instruction_and_columns_may_have_other_names(tmp_path):
    row = {"question": "Add.", "more": "1 and 2", "answer": "3", "role": "You count."}
    write(tmp_path / "a.jsonl", [row, {**row, "question": "Sum.", "more": None}])
    columns = {"instruction": "question", "input": "more", "output": "answer", "system": "role"}
    first, second = messages(tmp_path / "a.jsonl", kind="instruct", columns=columns)
    assert first == turns("Add.\n\n1 and 2", "3", system="You count.") and second[1]["content"] == "Sum."
    write(tmp_path / "b.jsonl", [{"dialogue": row} for row in ROWS])
    assert messages(tmp_path / "b.jsonl", columns={"messages": "dialogue"}) == ROWS


def test_lines_end_and_begin_as_in_other_files(tmp_path):
    """A line separator in a text, a byte order mark, lines that end in CR LF, empty lines."""
    rows = [turns("a\u2028b\u0085c", "d\u2029e"), turns("1\r\n2", "3")]
    file = write(tmp_path / "a.jsonl", [{"messages": row} for row in rows], end="\r\n\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert messages(file) == rows


def test_a_tenth_of_a_single_file_is_held_out_by_what_is_asked(tmp_path):
    rows = [{"messages": turns(f"Question {n % 60}", f"Answer {n}")} for n in range(120)]
    task = chat(write(tmp_path / "a.jsonl", rows))
    train, [held] = task.train(), task.evaluation()
    assert len(train.data) + len(held.data) == 120 and 4 <= len(held.data) <= 26
    assert not set(train.data["source"]) & set(held.data["source"])
    again = chat(write(tmp_path / "b.jsonl", rows[::-1])).evaluation()[0]
    assert sorted(again.data["conversation"]) == sorted(held.data["conversation"])
    assert task.label == "a (chat)" and held.own == "your file that were held out of training"


def test_a_conversation_and_its_continuation_are_on_the_same_side(tmp_path):
    rows = [
        {"messages": turns(f"Question {n % 60}", "First", *["More?", f"Answer {n}"] * (n // 60))} for n in range(180)
    ]
    task = chat(write(tmp_path / "a.jsonl", rows))
    train, [held] = task.train(), task.evaluation()
    rest, tuned_on = task.tuning(train, 0.1)
    for one, other in ((train, held), (rest, tuned_on)):
        assert one.data.num_rows % 3 == other.data.num_rows % 3 == 0 < len(other.data)
        assert not {*map(opening, one.data["conversation"])} & {*map(opening, other.data["conversation"])}


def opening(conversation: str) -> str:
    content: str = json.loads(conversation)[0][0]["content"]
    return content


def test_a_folder_has_a_file_for_each_split_and_repeated_rows_are_told(tmp_path, capsys):
    write(tmp_path / "train.jsonl", [{"messages": row} for row in ROWS[:30]])
    write(tmp_path / "validation.jsonl", [{"messages": row} for row in ROWS[28:]])
    [split] = chat(tmp_path).evaluation()
    assert len(split.data) == 12 and split.note == "2 of 12 rows are read in training too"
    assert "2 of 12 rows are read in training too" in capsys.readouterr().err


def test_the_revision_changes_with_every_text_and_with_the_template(tmp_path):
    def revision(row: Any, **options: Any) -> str:
        rows = [*ROWS, *(turns(f"Say {n}.", str(n)) for n in range(40))]
        return chat(write(tmp_path / "a.jsonl", [*({"messages": each} for each in rows), row]), **options).revision()

    (tmp_path / "t.jinja").write_text("one")
    row = turns("a", "b", "c", "d")
    known = [revision({"messages": each}) for each in (row, turns("a", "b", "c", "e"), turns("a", "x", "c", "d"))]
    known.append(revision({"messages": row, "tools": [1]}))
    known.append(revision({"messages": [row[0], {**row[1], "weight": 0}, *row[2:]]}))
    template = {"template": str(tmp_path / "t.jinja")}
    known.append(revision({"messages": row}, **template))
    (tmp_path / "t.jinja").write_text("two")
    known.append(revision({"messages": row}, **template))
    assert len({*known}) == len(known)
    assert chat(tmp_path / "a.jsonl", **template).label == "a (chat) template=t.jinja"


def test_a_list_of_turns_is_no_text(tmp_path):
    """TRL's prompts and completions may be lists; their JSON would be a strange question."""
    row = turns("a", "b")
    for name, values in (("prompt", [row[:1], "c"]), ("completion", ["d", row[1:]])):
        rows = [{"prompt": "a", "completion": "b", name: value} for value in values]
        said = refused(lambda rows=rows: chat(write(tmp_path / "a.jsonl", rows), "instruct").train())
        assert f"column '{name}'" in said
    both = {"messages": row, "instruction": "a", "output": "b"}
    for name, kind in (("system", "chat"), ("system", "instruct"), ("input", "instruct")):
        file = write(tmp_path / "a.jsonl", [{**both, name: None}, {**both, name: row[:1]}])
        said = refused(lambda file=file, kind=kind: chat(file, kind).train())
        assert said == f"{file}: {name} in line 2 is no text: correct it or leave it out"


def test_a_system_column_of_numbers_is_read_as_texts(tmp_path):
    file = write(tmp_path / "a.jsonl", [{**OPENAI, "prompt": "Hi", "completion": "Yes", "system": 3}])
    assert messages(file) == messages(file, kind="instruct") == [turns("Hi", "Yes", system="3")]


def test_history_comes_before_an_instruction(tmp_path):
    """As LLaMA-Factory's alpaca format has it."""
    row = {
        "instruction": "And 2 + 2?",
        "input": "",
        "output": "4",
        "system": "You count.",
        "history": [["1 + 1?", "2"]],
    }
    file = write(tmp_path / "a.jsonl", [row, {**row, "history": []}, {**row, "history": None}])
    wanted = turns("1 + 1?", "2", "And 2 + 2?", "4", system="You count.")
    assert messages(file, kind="instruct") == [wanted, *[[wanted[0], *wanted[3:]]] * 2]
    write(file, [{**row, "history": ["1 + 1?", "2"]}])
    assert "history in line 1 is no list of pairs" in refused(lambda: chat(file, "instruct").train())


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("loss_weight", 0.0), ("train", False), ("training", False)])
def test_each_tools_way_to_leave_a_turn_out_of_the_loss_is_read(tmp_path, key, value):
    first, second, *rest = turns("a", "b", "c", "d")
    task = chat(write(tmp_path / "a.jsonl", [{"messages": [first, {**second, key: value}, *rest]}]))
    assert json.loads(task._train[1]["conversation"][0].as_py())[2] == [False, False, False, True]
    assert read(task) == [turns("a", "b", "c", "d")]


def test_parts_of_a_content_may_have_their_text_as_value(tmp_path):
    """As in LLaMA-Factory's v1_sft_demo.jsonl; else a system turn would be read as if it were empty."""
    row = turns("a", "b", system="Be short.")
    parts = [{**each, "content": [{"type": "text", "value": each["content"]}]} for each in row]
    assert messages(write(tmp_path / "a.jsonl", [{"messages": parts}])) == [row]
    parts[0]["content"] = [{"type": "text"}]
    said = refused(lambda: chat(write(tmp_path / "a.jsonl", [{"messages": parts}])).train())
    assert said.endswith("line 1, turn 1: its content is no text")


def test_the_notes_of_openais_files_are_read(tmp_path):
    """`weight: 0` of a turn, null content next to calls, and arguments in JSON."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    row = [
        *turns("1 + 1?"),
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    task = chat(write(tmp_path / "a.jsonl", [{"messages": row, "tools": [{"type": "function"}]}]))
    [found], [cell] = read(task), task._train[1]["conversation"].to_pylist()
    assert found[1]["content"] == "" and found[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    assert json.loads(cell)[1:] == [[{"type": "function"}], [False, False, False, True]]


def test_calls_and_observations_of_sharegpt_are_those_of_openai(tmp_path):
    """As in LLaMA-Factory's glaive_toolcall_en_demo.json, where a row without tools has `[]`."""
    call = {"name": "calculate_area", "arguments": {"shape": "rectangle", "dimensions": [5, 3]}}
    row = [
        {"from": "human", "value": "The area of 5 by 3?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": '{"area": 15}'},
        {"from": "gpt", "value": "It is 15."},
    ]
    rows = [{"conversations": row, "tools": json.dumps([{"name": "calculate_area"}])}]
    task = chat(write(tmp_path / "a.jsonl", [*rows, {"conversations": sharegpt(turns("Hi", "Yes")), "tools": "[]"}]))
    first, second = read(task)
    assert [each["role"] for each in first] == ["user", "assistant", "tool", "assistant"]
    assert first[1]["tool_calls"] == [{"type": "function", "function": call}] and second == turns("Hi", "Yes")


OPENAI, SHAREGPT = {"messages": turns("Hi", "Yes")}, {"messages": sharegpt(turns("Hi", "Yes"))}
WRONG: dict[str, tuple[Any, str]] = {
    "no answer": (turns("Hi"), ": no turn of the assistant is there to be learnt"),
    "nothing after a question": (turns("Hi", "Yes", "?"), ": the last turn is of the role user, and no answer follows"),
    "two answers": ([*turns("Hi", "Yes"), turns("", "No")[1]], ", turn 3: the role assistant cannot come after assist"),
    "the answer first": (turns("Hi", "Yes")[1:], ", turn 1: the role assistant cannot come first"),
    "the system late": ([*turns("Hi"), *turns(system="x")], ", turn 2: the role system cannot come after user"),
    "an empty answer": (turns("Hi", " \n"), ", turn 2: the answer is empty"),
    "an empty question": (turns("", "Yes"), ", turn 1: the content is empty"),
    "no content": ([*turns("Hi"), {"role": "assistant", "content": None}], ", turn 2: the answer is empty"),
    "an unknown role": ([{"role": "usr", "content": "Hi"}], """no role is called 'usr' (did you mean "user"?); kno"""),
    "a role that is no text": ([{"role": 3, "content": "Hi"}], "no role is called 3"),
    "a role in a list": ([{"role": ["user"], "content": "Hi"}], "no role is called ['user']"),
    "a role that is null": ([{"role": None, "content": "Hi"}], ", turn 1: it has neither role and content nor from "),
    "calls that are no list": ([*turns("Hi"), {"role": "assistant", "tool_calls": 3}], ", turn 2: its tool_calls are"),
    "too many brackets": ("[" * 100_000, ": messages is no list, nor one in JSON: '[[["),
    "no list": ("Hi", ": messages is no list, nor one in JSON: 'Hi'"),
    "a number": (7, ": messages is no list but int"),
    "an object": ({"role": "user"}, ": messages is no list but dict"),
    "an empty list": ([], ": messages is an empty list"),
    "texts in a list": (["Hi", "Yes"], ", turn 1: it has neither role and content nor from and value"),
    "other keys": ([{"speaker": "me", "text": "Hi"}], ", turn 1: it has neither role and content nor from and value"),
    "a picture": ([{"role": "user", "content": [{"type": "image_url"}]}], ", turn 1: its content is no text"),
    "a number to read": ([{"role": "user", "content": 3}], ", turn 1: its content is no text"),
    "mixed turns": ([*turns("Hi"), *sharegpt(turns("", "Yes"))[1:]], ", turn 2: role and content are mixed with from "),
    "mixed rows": (SHAREGPT["messages"], ", turn 1: role and content are mixed with from and value in one file"),
    "an old call": ([*turns("Hi"), {"role": "assistant", "function_call": {}}], ", turn 2: function_call is not read"),
    "a strange call": ([*turns("Hi"), {"role": "assistant", "tool_calls": [3]}], ", turn 2: its tool_calls are not t"),
    "a strange weight": ([*turns("Hi"), {"role": "assistant", "content": "x", "weight": 2}], ", turn 2: weight is 2, "),
    "nothing to learn": ([*turns("Hi"), {"role": "assistant", "content": "x", "weight": 0}], ": no turn of the ass"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_is_told_with_file_and_line(tmp_path, fault):
    row, wanted = WRONG[fault]
    file = write(tmp_path / "a.jsonl", [OPENAI, {"messages": row if isinstance(row, list | str) else json.dumps(row)}])
    said = refused(lambda: chat(file).train())
    assert said.startswith(f"{file}, line 2") and wanted in said
    if isinstance(row, list):  # as a CSV has it
        write(file, [OPENAI, {"messages": json.dumps(row)}])
        assert refused(lambda: chat(file).train()) == said


KEYS = st.sampled_from(
    ["role", "content", "from", "value", "weight", "tool_calls", "function", "name", "arguments", "type", "text", "x"]
)
WORDS = st.sampled_from(
    ["user", "assistant", "human", "gpt", "tool", "function_call", "text", "{}", "[]", "null", "", "a"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats(allow_nan=False) | WORDS,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(KEYS, some, max_size=4),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"role": WORDS | JSON, "content": WORDS | JSON},
    optional={"tool_calls": JSON, "weight": JSON, "function_call": JSON},
)


@settings(max_examples=300)
@given(rows=st.lists(st.lists(TURN | JSON, max_size=4) | JSON, min_size=1, max_size=2), more=st.tuples(JSON, JSON))
def test_whatever_a_file_holds_is_read_or_refused_in_one_line(rows, more, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "anything.jsonl"
    write(file, [{"messages": row, "system": more[0], "tools": more[1]} for row in rows])
    try:
        found = messages(file)
    except InputError as error:
        assert "\n" not in str(error) and str(file) in str(error)
        return
    for row in found:
        assert row[-1]["role"] == "assistant" and all(isinstance(turn["content"], str) for turn in row)


def test_columns_that_are_missing_or_there_twice_are_told(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"dialog": turns("Hi", "Yes")}])
    assert refused(lambda: chat(file).train()) == f"{file} has no column 'messages', only dialog: name another"
    write(file, [OPENAI, {"conversations": sharegpt(turns("Hi", "Yes"))}])
    assert "has the columns messages and conversations: name one of them" in refused(lambda: chat(file).train())
    write(file, [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}])
    assert "prompt and completion, or instruction and output, not both" in refused(
        lambda: chat(file, "instruct").train()
    )
    write(file, [{"question": "a", "output": "b"}])
    said = refused(lambda: chat(file, "instruct").train())
    assert said.startswith(f"{file} has no column 'instruction', only question, output")
    write(file, [{"instruction": "a", "output": ""}])
    assert refused(lambda: chat(file, "instruct").train()).startswith(f"{file} has an empty output in line 1")
    said = refused(lambda: chat(file, template=str(tmp_path / "no.jinja")).train())
    assert "template" in said and "no.jinja" in said


def long(file: Path) -> Any:
    """Rows of one, two and three answers, the last of which are too long for 60 tokens and fewer."""
    return chat(
        write(file, [{"messages": turns(*["a", "b"] * (n % 3 + 1), "long " * n, "word " * n)} for n in range(1, 60)])
    )


@settings(max_examples=20)
@given(limit=st.integers(8, 300))
def test_rows_are_cut_after_answers_and_what_became_of_them_is_told(tmp_path_factory, limit):
    task = long(tmp_path_factory.getbasetemp() / "long.jsonl")
    train = task.train()
    tokenizer = tokenizer_for(task)
    whole = task.encode(train, tokenizer, 100_000)
    assert set(whole["cut"][:]) == {""} and len(whole) == len(train.data)
    assert task.kept(train, whole) == train
    try:
        rows = task.encode(train, tokenizer, limit)
    except InputError as error:
        assert str(error).startswith(f"max_length = {limit}: no row of the split 'train' has anything to learn")
        assert all(next(p for p, label in enumerate(row["labels"]) if label != IGNORE) >= limit for row in whole)
        return
    kept = task.kept(train, rows)
    assert kept.data["idx"][:] == [train.data["idx"][place] for place in rows["idx"]] and max(rows["length"]) <= limit
    full = dict(zip(whole["idx"], whole, strict=True))
    for row in rows:
        before = full.pop(row["idx"])
        length = row["length"]
        assert len(row["input_ids"]) == len(row["labels"]) == length
        assert row["input_ids"] == before["input_ids"][:length] and row["labels"] == before["labels"][:length]
        assert (length == before["length"]) == (not row["cut"])
        if row["cut"] == "cut after an answer":  # and no later answer would have fitted
            assert row["labels"][-1] != IGNORE and before["labels"][length] == IGNORE
            rest = before["labels"][length:limit]
            assert all(label == IGNORE for label in rest) or rest[-1] != IGNORE
        elif row["cut"]:
            assert length == limit and row["labels"][-1] != IGNORE
    for left in full.values():  # of what is left out nothing could be learnt
        assert all(label == IGNORE for label in left["labels"][:limit])
    counts = [
        (sum(cut == what for cut in rows["cut"]), what) for what in ("cut after an answer", "cut within an answer")
    ]
    told = [*counts, (len(full), "left out, since no answer begins before that")]
    parts = ", ".join(f"{count} are {what}" for count, what in told if count)
    assert kept.note == (f"max_length: of {len(train.data)} rows, {parts}" if parts else "")


def test_what_is_cut_is_said_once_on_stderr(tmp_path, capsys):
    task = long(tmp_path / "told.jsonl")
    train, tokenizer = task.train(), tokenizer_for(task)
    for _ in range(2):
        task.encode(train, tokenizer, 90)
    said = capsys.readouterr().err
    assert said.count("warning: train rows of told (chat): max_length = 90: of ") == 1


@pytest.mark.large
def test_a_run_counts_what_was_cut_and_shows_sample_answers(tmp_path):
    rows = [turns(f"What is {n} + {n}?", f"It is {n + n}." * (1 + 3 * (n % 5 == 0))) for n in range(150)]
    rows += [turns("long " * 60, "No.")] * 3
    file = write(tmp_path / "sums.jsonl", [{"messages": row} for row in rows])
    task = {"type": "chat", "dataset": str(file)}
    settings = {"model": "random-llama", "max_length": 56, "eval_every": 6, "train_rows": None, "eval_rows": None}
    result = run(make(tmp_path / "runs" / "chat", task=task, **settings))
    train, [held] = result["splits"]["train"], result["splits"]["evaluation"]
    left = chat(file).train().data["source"][:].count("user: " + "long " * 60)
    assert train["rows"] + held["rows"] == 150 and "max_length: of " in train["note"] + held["note"]
    assert (f"{left} are left out" in train["note"]) == (left > 0)
    assert result["score"] == "perplexity" and set(result["metrics"]) == {"perplexity", "token_accuracy"}
    found = predictions(tmp_path / "runs" / "chat")
    assert found is not None and found.kind == "statistics"
    value = METRICS["perplexity"].value
    assert value is not None and value(found.values.sum(axis=0)) == pytest.approx(result["metrics"]["perplexity"])
    for example in of_run(tmp_path / "runs" / "chat"):
        assert "What is " in example.source and example.references[0].startswith("It is ")


@pytest.mark.large
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_packed_rows_are_learnt_as_unpacked_ones_are(tmp_path, kind):
    rows = [{"messages": turns(f"What is {n}?", f"It is {n}."), "text": f"The number {n}."} for n in range(40)]
    file = write(tmp_path / "a.jsonl", rows)
    losses = []
    for packing in (False, True):
        folder = make(
            tmp_path / "runs" / str(packing),
            task={"type": kind, "dataset": str(file)},
            model="random-llama",
            packing=packing,
            max_length=64,
            max_steps=4,
            eval_every=1,
        )
        run(folder)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([value for line in lines for key, value in line.items() if "loss" in key])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) >= 4


def test_a_loop_of_ones_own_learns_from_conversations(tmp_path):
    file = write(tmp_path / "sums.jsonl", [{"messages": turns(f"What is {n}?", f"It is {n}.")} for n in range(60)])
    task = rw.task({"type": "chat", "dataset": str(file)})
    model, tokenizer, head = build("random-llama", task, max_length=64)
    assert head == []
    rows = task.encode(task.train(), tokenizer, max_length=64)
    [held] = task.evaluation()
    evaluation = Evaluation(held, task.encode(held, tokenizer, max_length=64))
    before = task.evaluate(model, evaluation, tokenizer, batch_size=8, final=False).metrics
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collate = task.collate(model, tokenizer, seed=0)
    for batch in DataLoader(rows, batch_size=16, collate_fn=collate):  # type: ignore[arg-type]
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.evaluate(model, evaluation, tokenizer, batch_size=8, final=True).metrics
    assert after["perplexity"] < before["perplexity"] / 2
