"""Three tasks made on the spot from the docstrings of the Python standard library on the user's own disk.

Real English and real labels with nothing to download: the sources are parsed, never imported. A *summary line* is the
first line of the docstring of a class, method or function, the *body* is the rest. Which side of the split a line falls
on, and its place in it, depend on the line alone, so two machines with the same sources have the same rows in the same
order, and a line is never in both sides.
"""

import ast
import hashlib
import inspect
import os
import platform
import re
import sys
import sysconfig
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from rankwise.errors import InputError, need
from rankwise.files import uncollected
from rankwise.tasks.base import Split
from rankwise.tasks.classification import Classification

# Tests are not documentation; idlelib, lib2to3 and turtledemo are programs that lie beside the library.
NOT_LIBRARY = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "idlelib",
    "lib2to3",
    "turtledemo",
}
LARGEST = 24


class Docstring(NamedTuple):
    """One docstring: its top-level module, `class`, `method` or `function`, its summary line, and the rest of it."""

    module: str
    kind: str
    line: str
    body: str


class StdlibTask(Classification):
    """A task over the docstrings of this Python's standard library."""

    main = "accuracy"
    metrics = ("accuracy",)

    def train(self) -> Split:
        return self._split("train", False)

    def evaluation(self) -> list[Split]:
        return [self._split("validation", True)]

    @abstractmethod
    def examples(self) -> list[tuple[tuple[str, ...], int]]:
        """Every (texts, label) of the task, both sides; the first text decides the side and the place."""

    @cached_property
    def _examples(self) -> list[tuple[tuple[str, ...], int]]:
        return sorted(self.examples(), key=lambda example: (_draw(example[0][0]), example))

    def _split(self, name: str, validation: bool) -> Split:
        datasets = need("datasets", "bench")
        rows = [example for example in self._examples if _in_validation(example[0][0]) == validation]
        if not rows:
            raise InputError(
                f"{_folder()} has no docstrings for {self.name}: this Python's library is stripped; use another"
            )
        columns: dict[str, list] = {column: [texts[i] for texts, _ in rows] for i, column in enumerate(self.text)}
        columns |= {"label": [label for _, label in rows], "idx": list(range(len(rows)))}
        note = f"split by rankwise from Python {platform.python_version()}'s own docstrings"
        return Split(name, datasets.Dataset.from_dict(columns), False, note)


class StdlibModule(StdlibTask, name="stdlib-module", aliases=("stdlib-docs",)):
    """Which of the 24 largest modules of Python's standard library does a summary line describe? Accuracy."""

    text = ("line",)

    @cached_property
    def _modules(self) -> dict[str, str]:
        return _agreed((docstring.line, docstring.module) for docstring in _docstrings())

    @cached_property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """The modules by name; which ones depends on the library at hand."""
        sizes = Counter(self._modules.values())
        return tuple(sorted(sorted(sizes, key=lambda module: (-sizes[module], module))[:LARGEST]))

    def examples(self) -> list[tuple[tuple[str, ...], int]]:
        number = {module: i for i, module in enumerate(self.labels)}
        return [((line,), number[module]) for line, module in self._modules.items() if module in number]


class StdlibKind(StdlibTask, name="stdlib-kind"):
    """Does a docstring's summary line describe a class, a method or a function? Accuracy."""

    text = ("line",)
    labels = ("class", "method", "function")

    def examples(self) -> list[tuple[tuple[str, ...], int]]:
        kinds = _agreed((docstring.line, docstring.kind) for docstring in _docstrings())
        return [((line,), self.labels.index(kind)) for line, kind in kinds.items()]


class StdlibMatch(StdlibTask, name="stdlib-match"):
    """Does a summary line belong to the rest of this docstring, or is that from another one of the module? Accuracy.

    Every line and every body stands in one pair that belongs and one that does not, both on the same side of the split:
    neither text alone tells anything, and half of the pairs belong.
    """

    text = ("line", "body")
    labels = ("other", "belongs")

    def examples(self) -> list[tuple[tuple[str, ...], int]]:
        # a line with two bodies, or a body with two lines, could make a pair that belongs look like one that does not
        pairs = [docstring for docstring in _docstrings() if docstring.body]
        body_of = _agreed((docstring.line, docstring.body) for docstring in pairs)
        line_of = _agreed((docstring.body, docstring.line) for docstring in pairs)
        module_of = _agreed((docstring.line, docstring.module) for docstring in pairs)
        groups: dict[tuple[str, bool], list[str]] = {}
        for line in sorted(module_of, key=lambda line: (_draw(line), line)):
            if line in body_of and body_of[line] in line_of:
                groups.setdefault((module_of[line], _in_validation(line)), []).append(line)
        examples: list[tuple[tuple[str, ...], int]] = []
        for lines in groups.values():
            if len(lines) > 1:
                for line, other in zip(lines, lines[1:] + lines[:1], strict=True):
                    examples += [((line, body_of[line]), 1), ((line, body_of[other]), 0)]
        return examples


@cache
def _draw(line: str) -> str:
    """A number drawn for a line: the same in every process, whatever other lines there are."""
    return hashlib.sha256(f"rankwise:{_key(line)}".encode()).hexdigest()


def _in_validation(line: str) -> bool:
    return int(_draw(line)[:8], 16) % 4 == 0


def _key(text: str) -> str:
    """What makes two texts one: case, spaces and punctuation do not."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _agreed(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Text to label, each text once (as it is first spelt), without the texts that come with two labels."""
    spelt: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for text, label in pairs:
        spelt.setdefault(_key(text), text)
        labels.setdefault(_key(text), set()).add(label)
    return {spelt[key]: found.pop() for key, found in labels.items() if len(found) == 1}


def _folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
@uncollected()
def _docstrings() -> tuple[Docstring, ...]:
    """The docstrings of the library with a summary line of three words or more, by file name and line."""
    found = []
    for name in _files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old sources are not this program's to report
            try:
                tree = ast.parse((_folder() / name).read_bytes())
            except (OSError, SyntaxError, ValueError):
                continue  # a file that this Python could not import either
        module = name.partition("/")[0].removesuffix(".py")
        for kind, text in _walk(tree.body, in_class=False):
            line, _, body = inspect.cleandoc(text).partition("\n")
            if len(re.findall(r"[A-Za-z]{2,}", line)) >= 3:
                found.append(Docstring(module, kind, " ".join(line.split()), body.strip()))
    if not found:
        raise InputError(
            f"{_folder()} holds no Python sources with docstrings: use a Python with its library's sources"
        )
    return tuple(found)


def _files() -> list[str]:
    """The library's sources, as names with `/` relative to its folder, sorted."""
    names = []
    for folder, below, files in os.walk(_folder()):
        below[:] = [name for name in below if name not in NOT_LIBRARY]
        inside = Path(folder).relative_to(_folder())
        names += [(inside / name).as_posix() for name in files if name.endswith(".py")]
    # names that are not the library's own were put there by someone else
    return sorted(name for name in names if name.partition("/")[0].removesuffix(".py") in sys.stdlib_module_names)


def _walk(body: list, in_class: bool) -> Iterator[tuple[str, str]]:
    """Kind and docstring of every class and function in a list of statements, however deep."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            is_class = isinstance(node, ast.ClassDef)
            match node.body[0]:
                case ast.Expr(ast.Constant(str() as text)):
                    yield "class" if is_class else "method" if in_class else "function", text
            yield from _walk(node.body, is_class)
        else:  # only statements hold definitions: expressions, most of the tree, are passed over
            for field in ("body", "orelse", "handlers", "finalbody", "cases"):
                inner = getattr(node, field, None)
                if isinstance(inner, list):
                    yield from _walk(inner, in_class)
