"""Rows of CSV and JSONL as they come, one after another: nothing but the present one is held in memory.

Both are UTF-8, with or without a byte-order mark. CSV has a header line, and commas or, where that has no comma, the
semicolons or tabs of spreadsheets; its fields are text. JSONL has one object per line. Each record keeps the text that
it was read from, so that it can be written again as it was. InputError names the line of what is wrong.
"""

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from rankwise.errors import InputError

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class Record(NamedTuple):
    """A row by its columns, the number of the line on which it starts, and its text with the end of its line."""

    number: int
    row: dict[str, Any]
    text: str


def lines(file: IO[bytes], name: str) -> Iterator[str]:
    """The lines of a file with their ends, without a byte-order mark."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}: line {number} is not text in UTF-8 (byte {error.start} of the line): save it as UTF-8"
            ) from None


class Csv:
    """The rows of a CSV file; `names` are those of its columns, `header` is its first line as it stands there."""

    def __init__(self, text: Iterable[str], name: str) -> None:
        self._name = name
        self._read: list[str] = []
        # a lone carriage return ends a line, too, as the csv module has it
        split = itertools.chain.from_iterable(map(_LINE.findall, text))
        first, quotes = [], 0
        for line in split:  # a quoted name may contain the end of a line
            first.append(line)
            quotes += line.count('"')
            if quotes % 2 == 0 or len(first) > 1_000:
                break
        unquoted = re.sub(r'"[^"]*"', "", "".join(first))
        self.delimiter = next((each for each in _DELIMITERS if each in unquoted), ",")
        self._reader = csv.reader(self._kept(itertools.chain(first, split)), delimiter=self.delimiter, strict=True)
        self.names = self._next() or []
        self.header = self._taken()
        if twice := {each for each in self.names if self.names.count(each) > 1}:
            raise InputError(f"{name}: the header has the column {min(twice)!r} twice: rename one")

    def __iter__(self) -> Iterator[Record]:
        start = self._reader.line_num + 1
        while (fields := self._next()) is not None:
            text = self._taken()
            if fields:  # not an empty line
                if len(fields) != len(self.names):
                    raise InputError(
                        f"{self._name}: line {start} has {len(fields)} fields but the header {len(self.names)}: put "
                        f"fields that contain {_DELIMITERS[self.delimiter]}, quotes or line ends in quotes"
                    )
                yield Record(start, dict(zip(self.names, fields, strict=True)), text)
            start = self._reader.line_num + 1

    def _kept(self, text: Iterator[str]) -> Iterator[str]:
        for line in text:
            self._read.append(line)
            yield line

    def _taken(self) -> str:
        """The text of the row that was read last."""
        text = "".join(self._read)
        self._read.clear()
        return text

    def _next(self) -> list[str] | None:
        limit = csv.field_size_limit(sys.maxsize)  # a field may be an article
        try:
            return next(self._reader, None)
        except csv.Error as error:
            raise InputError(
                f"{self._name}: line {self._reader.line_num} is not valid CSV ({one_line(error)}): correct it"
            ) from error
        finally:
            csv.field_size_limit(limit)


def jsonl(text: Iterable[str], name: str) -> Iterator[Record]:
    """The rows of a JSONL file; blank lines do not count."""
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=json_object)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{name}: line {number} is not JSON ({one_line(error)}): write one object per line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{name}: line {number} is not a JSON object: write one per line, with columns as keys")
        yield Record(number, row, line)


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are unique and whose text is sound; ValueError for others."""
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"it has the key {min(twice)!r} twice")
    json.dumps(pairs, ensure_ascii=False).encode()  # ValueError for half of a surrogate pair
    return dict(pairs)


def one_line(error: Exception) -> str:
    """What an error says, in one line, or its name."""
    return " ".join(str(error).split())[:200] or type(error).__name__
