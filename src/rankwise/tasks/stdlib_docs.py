"""Four tasks made from the docstrings of the Python standard library on the user's own disk.

They have real English and real labels without a download: the sources are parsed, never imported. A *summary line* is
the first line of the docstring of a class, method or function, the *body* is the rest. The split of a line, and its
position there, depend only on the line, so machines with the same sources have the same rows in the same order, and no
line is in both splits.
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
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rankwise.errors import InputError, need
from rankwise.files import uncollected
from rankwise.tasks.base import Split
from rankwise.tasks.chat import Conversations, table_of
from rankwise.tasks.classification import Classification
from rankwise.tasks.templates import Conversation

if TYPE_CHECKING:
    import pyarrow as pa

# Tests are not documentation; idlelib, lib2to3 and turtledemo are programs in the library's folder.
NOT_LIBRARY = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("idlelib", "lib2to3", "turtledemo"),
}
LARGEST = 24
ASKED = "Write the first line of a Python function."
LONGEST = 80
"""Characters of that line."""
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


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

    @classmethod
    def prepare(cls) -> None:
        _docstrings()

    @abstractmethod
    def examples(self) -> list[tuple[tuple[str, ...], int]]:
        """Every (texts, label) of the task, for both splits; the first text decides the split and the position."""

    @cached_property
    def _examples(self) -> list[tuple[tuple[str, ...], int]]:
        return sorted(self.examples(), key=lambda example: (_draw(example[0][0]), example))

    def _split(self, name: str, validation: bool) -> Split:
        rows = [example for example in self._examples if _in_validation(example[0][0]) == validation]
        columns: dict[str, list] = {column: [texts[i] for texts, _ in rows] for i, column in enumerate(self.text)}
        columns |= {"label": [label for _, label in rows]}
        return _as_split(name, need("pyarrow", "bench").table(columns), self.name)


class StdlibModule(StdlibTask, name="stdlib-module", aliases=("stdlib-docs",)):
    """Which of the 24 largest modules of Python's standard library does a summary line describe? Accuracy."""

    text = ("line",)

    @cached_property
    def _modules(self) -> dict[str, str]:
        return _agreed((docstring.line, docstring.module) for docstring in _docstrings())

    @cached_property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """The modules by name, which depend on the Python in use."""
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
    """Does a summary line belong to this docstring's body, or is that from another one of the module? Accuracy.

    Every line and every body is in one pair that belongs together and in one that does not, both in the same split:
    neither text alone gives the label away, and half of the pairs belong together.
    """

    text = ("line", "body")
    labels = ("other", "belongs")

    def examples(self) -> list[tuple[tuple[str, ...], int]]:
        # without lines that have several bodies, and bodies that have several lines, or labels could be wrong
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


@dataclass(frozen=True)
class StdlibSignature(Conversations, name="stdlib-signature"):
    """Which function does this? Its first line, asked for by its summary line. Perplexity of the answers' tokens.

    Each row is a conversation. Private functions and lines of more than 80 characters are left out.
    """

    @classmethod
    def prepare(cls) -> None:
        _signatures()

    def train(self) -> Split:
        return self._split("train", False)

    def evaluation(self) -> list[Split]:
        return [self._split("validation", True)]

    def _split(self, name: str, validation: bool) -> Split:
        lines = sorted(_signatures(), key=_draw)
        pairs = [(line, _signatures()[line]) for line in lines if _in_validation(line) == validation]
        conversations = [
            [{"role": "user", "content": f"{ASKED} {line}"}, {"role": "assistant", "content": signature}]
            for line, signature in pairs
        ]
        where = [f"{name}, row {row}" for row in range(len(pairs))]
        table = table_of(map(Conversation, conversations, where))
        return _as_split(name, table, self.name)


@cache
@uncollected()
def _signatures() -> dict[str, str]:
    """The first line of a function by the summary line of its docstring, without lines that several have."""
    pairs = []
    for docstring, node in _documented():
        if not isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            first = f"def {node.name}({ast.unparse(node.args)}):"
            if len(first) <= LONGEST:
                pairs.append((docstring.line, first))
    return _agreed(pairs)


def _as_split(name: str, table: "pa.Table", task: str) -> Split:
    if table.num_rows == 0:
        raise InputError(f"{_folder()} has no docstrings for {task}: use a Python whose library has its docstrings")
    table = table.append_column("idx", [list(range(table.num_rows))])
    note = f"split by rankwise from Python {platform.python_version()}'s own docstrings"
    return Split(name, need("datasets", "bench").Dataset(table), False, note)


@cache
def _draw(line: str) -> str:
    """A pseudo-random hex number for a line, the same in every process."""
    return hashlib.sha256(f"rankwise:{_key(line)}".encode()).hexdigest()


def _in_validation(line: str) -> bool:
    return int(_draw(line)[:8], 16) % 4 == 0


def _key(text: str) -> str:
    """`text` without case, spaces and punctuation: texts with one key count as the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _agreed(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Text to label, each text once (in its first spelling), without texts that have two labels."""
    spellings: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for text, label in pairs:
        spellings.setdefault(_key(text), text)
        labels.setdefault(_key(text), set()).add(label)
    return {spellings[key]: values.pop() for key, values in labels.items() if len(values) == 1}


def _folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
@uncollected()
def _docstrings() -> tuple[Docstring, ...]:
    """The docstrings of the library with a summary line of three words or more, by file name and line."""
    docstrings = tuple(docstring for docstring, _ in _documented())
    if not docstrings:
        raise InputError(
            f"{_folder()} holds no Python sources with docstrings: use a Python with its library's sources"
        )
    return docstrings


def _documented() -> Iterator[tuple[Docstring, Definition]]:
    """Every class and function of the library whose docstring has a summary line of three words or more."""
    for name in _files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old escapes in the library's sources
            try:
                tree = ast.parse((_folder() / name).read_bytes())
            except (OSError, SyntaxError, ValueError):
                continue  # this Python cannot import it either
        module = name.partition("/")[0].removesuffix(".py")
        for kind, text, node in _walk(tree.body, in_class=False):
            line, _, body = inspect.cleandoc(text).partition("\n")
            if len(re.findall(r"[A-Za-z]{2,}", line)) >= 3:
                yield Docstring(module, kind, " ".join(line.split()), body.strip()), node


def _files() -> list[str]:
    """The library's sources, as names with `/` relative to its folder, sorted."""
    names = []
    for folder, below, files in os.walk(_folder()):
        below[:] = [name for name in below if name not in NOT_LIBRARY]
        inside = Path(folder).relative_to(_folder())
        names += [(inside / name).as_posix() for name in files if name.endswith(".py")]
    # other names are not from the library
    return sorted(name for name in names if name.partition("/")[0].removesuffix(".py") in sys.stdlib_module_names)


def _walk(body: list, in_class: bool) -> Iterator[tuple[str, str, Definition]]:
    """Kind, docstring and node of every class and function in a list of statements, at any depth."""
    for node in body:
        if isinstance(node, Definition):
            is_class = isinstance(node, ast.ClassDef)
            match node.body[0]:
                case ast.Expr(ast.Constant(str() as text)):
                    yield "class" if is_class else "method" if in_class else "function", text, node
            yield from _walk(node.body, is_class)
        else:  # only statements contain definitions: expressions, most of the tree, are skipped
            for field in ("body", "orelse", "handlers", "finalbody", "cases"):
                inner = getattr(node, field, None)
                if isinstance(inner, list):
                    yield from _walk(inner, in_class)
