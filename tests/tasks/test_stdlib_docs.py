"""The tasks made of the standard library's docstrings, built for real from the library that runs the tests."""

import ast
import inspect
import json
import os
import posixpath
import shutil
import subprocess
import sys
import textwrap
from collections import Counter

import pytest

import chats
from rankwise import tasks
from rankwise.errors import InputError
from rankwise.tasks import stdlib_docs, subset

NAMES = ["stdlib-module", "stdlib-kind", "stdlib-match"]


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    return tasks.build(request.param)


def rows(split, *columns):
    return list(zip(*(split.data[column] for column in columns), strict=True))


def test_about_six_thousand_lines_are_found():
    lines = {docstring.line for docstring in stdlib_docs._docstrings()}
    assert 3_000 < len(lines) < 12_000  # a distribution may leave tkinter or distutils out


def test_splits_are_a_quarter_to_three_and_not_official(task):
    train, (validation,) = task.train(), task.evaluation()
    assert 0.2 < len(validation.data) / (len(validation.data) + len(train.data)) < 0.3
    for split in (train, validation):
        assert not split.official
        assert split.note.startswith("split by rankwise from Python 3.")
        assert split.labelled
        assert split.data["idx"][:] == list(range(len(split.data)))
        assert set(split.data["label"]) == set(range(len(task.labels)))


def test_no_text_is_on_both_sides(task):
    train, (validation,) = task.train(), task.evaluation()
    for column in task.text:
        seen = {stdlib_docs._key(text) for text in train.data[column]}
        assert not seen & {stdlib_docs._key(text) for text in validation.data[column]}


def test_no_line_is_on_different_sides_in_two_tasks():
    lines = {"train": set(), "validation": set()}
    for name in NAMES:
        for split in (tasks.build(name).train(), *tasks.build(name).evaluation()):
            lines[split.name] |= set(split.data["line"])
    assert not lines["train"] & lines["validation"]


@pytest.mark.parametrize("name", ["stdlib-module", "stdlib-kind"])
def test_a_line_stands_once(name):
    task = tasks.build(name)
    lines = [line for split in (task.train(), *task.evaluation()) for line in split.data["line"]]
    assert len({stdlib_docs._key(line) for line in lines}) == len(lines)
    assert all(line == " ".join(line.split()) for line in lines)


def test_modules_are_the_24_with_the_most_lines():
    task = tasks.build("stdlib-module")
    assert len(task.labels) == 24 == len(set(task.labels))
    assert list(task.labels) == sorted(task.labels)
    assert set(task.labels) <= sys.stdlib_module_names
    assert not set(task.labels) & {"test", "idlelib", "lib2to3", "turtledemo"}
    sizes = Counter(stdlib_docs._agreed((d.line, d.module) for d in stdlib_docs._docstrings()).values())
    smallest = min(sizes[module] for module in task.labels)
    assert all(size <= smallest for module, size in sizes.items() if module not in task.labels)


def test_labels_are_what_the_library_says():
    kinds, modules = {}, {}
    for docstring in stdlib_docs._docstrings():
        kinds.setdefault(docstring.line, set()).add(docstring.kind)
        modules.setdefault(docstring.line, set()).add(docstring.module)
    for name, truth in (("stdlib-kind", kinds), ("stdlib-module", modules)):
        task = tasks.build(name)
        for split in (task.train(), *task.evaluation()):
            assert all(truth[line] == {task.labels[label]} for line, label in rows(split, "line", "label"))


def test_match_is_balanced_and_neither_text_alone_tells():
    task = tasks.build("stdlib-match")
    truth = {(docstring.line, docstring.body) for docstring in stdlib_docs._docstrings()}
    module = {docstring.body: docstring.module for docstring in stdlib_docs._docstrings()}
    by_line = {docstring.line: docstring.module for docstring in stdlib_docs._docstrings() if docstring.body}
    for split in (task.train(), *task.evaluation()):
        pairs = rows(split, "line", "body", "label")
        for text in (0, 1):
            seen = Counter((pair[text], pair[2]) for pair in pairs)
            assert set(seen.values()) == {1}
            assert {key for key, label in seen if label} == {key for key, label in seen if not label}
        for line, body, label in pairs:
            assert ((line, body) in truth) == bool(label)
            assert by_line[line] == module[body]


def test_a_line_with_two_labels_is_left_out():
    pairs = [("One two.", "a"), ("one  Two", "b"), ("Three", "a"), ("three!", "a")]
    assert stdlib_docs._agreed(pairs) == {"Three": "a"}


def test_kinds_follow_the_innermost_definition():
    source = '''
class A:
    """class A"""
    def method(self):
        """method of A"""
        def inner():
            """function in a method"""
    if True:
        async def later(self):
            """method behind an if"""
try:
    pass
except ValueError:
    def handler():
        """function in a handler"""
def none(): pass
def empty():
    f"""not {1} docstring"""
'''
    assert [(kind, text) for kind, text, _ in stdlib_docs._walk(ast.parse(source).body, in_class=False)] == [
        ("class", "class A"),
        ("method", "method of A"),
        ("function", "function in a method"),
        ("method", "method behind an if"),
        ("function", "function in a handler"),
    ]


PROGRAM = """
import json, sys
from rankwise import tasks
from rankwise.tasks import stdlib_docs
before = set(sys.modules)
stdlib_docs._docstrings()
added = sorted(set(sys.modules) - before)
found = {name: tasks.build(name) for name in sys.argv[1:]}
print(json.dumps([added, {name: [task.revision(), task.train().data[:5]] for name, task in found.items()}]))
"""


@pytest.mark.large
def test_another_process_builds_the_same_rows_and_imports_nothing():
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"  # where this has none it was drawn
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM, *NAMES],
        env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    added, found = json.loads(done.stdout)
    assert not {"turtle", "antigravity", "this", "tkinter"} & set(added)
    ours = {name: tasks.build(name) for name in NAMES}
    assert found == {name: [task.revision(), task.train().data[:5]] for name, task in ours.items()}


def test_the_order_of_the_folder_does_not_matter(monkeypatch):
    names = stdlib_docs._files()
    expected = tasks.build("stdlib-kind").revision()
    walk = os.walk

    def backwards(top):
        for folder, below, files in walk(top):
            below.reverse()
            yield folder, below, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert stdlib_docs._files() == names
    stdlib_docs._docstrings.cache_clear()
    assert tasks.build("stdlib-kind").revision() == expected


def test_a_library_without_sources_is_told(monkeypatch, tmp_path):
    (tmp_path / "abc.py").write_text("def broken(:\n")
    (tmp_path / "stranger.py").write_text('def f():\n    """Three words here."""\n')
    monkeypatch.setattr(stdlib_docs, "_folder", lambda: tmp_path)
    stdlib_docs._docstrings.cache_clear()
    try:
        with pytest.raises(InputError, match="no Python sources") as caught:
            tasks.build("stdlib-match").train()
    finally:
        stdlib_docs._docstrings.cache_clear()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_signatures_are_those_of_the_functions_that_the_lines_describe():
    task = tasks.build("stdlib-signature")
    train, [validation] = task.train(), task.evaluation()
    rows = [json.loads(text) for split in (train, validation) for text in split.data["conversation"]]
    assert len(rows) > 1_000 and len(validation.data) > 200
    assert not set(train.data["source"]) & set(validation.data["source"])
    answers = {}
    for (user, assistant), _, _ in rows:
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        [function] = ast.parse(f"{assistant['content']} pass").body
        assert isinstance(function, ast.FunctionDef) and len(assistant["content"]) <= stdlib_docs.LONGEST
        line = user["content"].removeprefix(f"{stdlib_docs.ASKED} ")
        answers[line] = function.name, [arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)]
    found = 0
    for module in (posixpath, shutil, textwrap):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            line = " ".join((inspect.getdoc(function) or "").partition("\n")[0].split())
            if line in answers and not name.startswith("_"):
                assert answers[line] == (name, [*inspect.signature(function).parameters])
                found += 1
    assert found > 5


@pytest.mark.large
def test_the_answers_of_the_signatures_are_learnt_and_their_questions_are_not():
    task, tokenizer = tasks.build("stdlib-signature"), chats.tokenizer("smollm2")
    split = subset(task.evaluation()[0], 20)
    for row, text in zip(task.encode(split, tokenizer, 256), split.data["conversation"], strict=True):
        (_, answer), _, _ = json.loads(text)
        learnt = tokenizer.decode([id for id, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0])
        assert learnt == f"{answer['content']}<|im_end|>\n"
