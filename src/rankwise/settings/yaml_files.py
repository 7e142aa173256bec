"""YAML as people write it, read with limits on how much it may mean."""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rankwise.errors import InputError, nearest
from rankwise.files import read_bytes

# Of YAML. What means more than this is no configuration, and would take minutes to read.
LONGEST = 1_000_000  # characters
DEEPEST = 50  # lists and mappings within each other
MOST_VALUES = 50_000  # what aliases stand for counted as often as they do
LONGEST_NUMBER = 400  # characters; a float has no more


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-3 is a number, a key given twice is an error, and so is what means too much.

    Whatever is wrong is a `yaml.YAMLError` that knows its line.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[yaml.Node, int] = {}
        """How many values each node that is complete stands for."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        begun = self._values
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEEPEST} levels", mark)
        self._values += 1
        node = super().compose_node(parent, index)
        if alias and node not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias stands within what it stands for", mark)
        if node is not None:
            self._values += self._sizes.get(node, 1) - 1 if alias else 0
            self._sizes.setdefault(node, self._values - begun)
        if self._values > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES:,} values", mark)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > LONGEST_NUMBER:
            problem = f"a number of {len(node.value):,} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # of what kind depends on the value: int("x"), a month 13, base64
            problem = f"{quoted(node.value)} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key {quoted(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """The other way: a word that `_Loader` would read as a number, such as the id 1285e1020756, is put in quotes."""


# YAML 1.1 asks for a dot in a float, so that SafeLoader reads the learning rate 1e-3 as a word.
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """A text whose ends of lines YAML would read as line feeds is put in double quotes, which spell them out."""
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, '"' if re.search("[\x85\u2028\u2029]", text) else None
    )


_Dumper.add_representer(str, _text)


def as_yaml(content: Mapping[str, Any]) -> str:
    """`content` in YAML, which `parse_yaml` reads as just that."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def in_line(value: Any) -> str:
    """The same for one value, on one line."""
    options: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True}
    text = yaml.dump(value, Dumper=_Dumper, width=sys.maxsize, **options).removesuffix("\n...\n").strip("\n")
    if "\n" not in text:
        return text
    return yaml.dump(value, Dumper=_Dumper, width=sys.maxsize, default_style='"', **options).strip("\n")


def parse_yaml(text: str) -> Any:
    """The value of a piece of YAML, numbers like 1e-3 included: None, bool, int, float, str, lists and mappings.

    Raises InputError, one line, where it is broken, means too much, or holds anything else.
    """
    if len(text) > LONGEST:
        raise InputError(f"{len(text):,} characters of YAML: no configuration has more than {LONGEST:,}")
    try:
        value = yaml.load(text, Loader=_Loader)
    except Exception as error:  # a YAMLError, or whatever its constructors come upon
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{line}not valid YAML: {' '.join(str(problem).split())}") from None
    return plain_data(value)


def plain_data(value: Any, where: str = "") -> Any:
    """A copy of `value`, with dates as text. InputError for a text or a key that no file and no name can hold."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, datetime.date):  # a time of day included
        return str(value)
    if isinstance(value, str):
        if "\0" in value or not _encodable(value):
            raise InputError(f"{where}{quoted(value)} holds a character that no text may have: leave it out")
        return value
    if isinstance(value, list):
        return [plain_data(each, where) for each in value]
    if not isinstance(value, dict):
        raise InputError(f"{where}{quoted(value)} is a {type(value).__name__}: expected text, numbers, lists or keys")
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"{where}the key {quoted(key)} is no text: put it in quotes")
        if not _encodable(key) or not key.isprintable() or len(key) > LONGEST_NUMBER:
            raise InputError(f"{where}{quoted(key)} is no key: a key is one line of printable text, and not a long one")
    return {key: plain_data(each, f"{key}: ") for key, each in value.items()}


def _encodable(text: str) -> bool:
    """Whether `text` can be written in UTF-8, which halves of surrogate pairs cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def quoted(value: Any) -> str:
    """`value` for a message: on one line, and not much of it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}…"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError, one line, for a file that is missing, unreadable or no mapping."""
    try:
        text = read_bytes(path).decode()
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"{path}: there is no such file{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    try:
        data = parse_yaml(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if data is None:
        raise InputError(f"{path}: is empty; the least it needs is `task: NAME`")
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected `key: value` lines, found a {type(data).__name__}")
    return data
