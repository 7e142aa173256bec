"""Files of a user's rows, read batch by batch, and the same rows written again with their answers.

CSV, JSONL and parquet; `-` is stdin or stdout. Between files of one format a row comes out as it went in, to the byte
in CSV and JSONL, with the answers at its end. Only a batch of rows is in memory.
"""

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from rankwise.errors import InputError, need
from rankwise.files import check_regular, opened, similar
from rankwise.tasks.records import Csv, Record, jsonl, lines, one_line

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
PIPE = "-"
GROUP = 16_384
"""Rows of parquet that are written together."""


@dataclass
class Source:
    """Rows of a user's.

    Attributes:
        name: in messages.
        format: csv, jsonl or parquet.
        header: of CSV, the reader that has its names, delimiter and first line.
        schema: of parquet, or of JSONL once all rows were seen; None if that is not known.
        marked: whether the file begins with a byte-order mark.
    """

    name: str
    format: str
    file: Any
    header: Csv | None = None
    schema: Any = None
    marked: bool = False
    _records: Iterator[Record] = field(default_factory=lambda: iter(()))

    def batches(self, size: int) -> Iterator[list[Record]]:
        """All rows, `size` at a time."""
        if self.format != "parquet":
            while batch := [*itertools.islice(self._records, size)]:
                yield batch
            return
        first = 0
        try:
            for batch in self.file.iter_batches(batch_size=size):
                rows = batch.to_pylist()
                yield [Record(first + place, row, "") for place, row in enumerate(rows)]
                first += len(rows)
        except (ValueError, OSError) as error:  # pyarrow's errors are of these kinds
            raise InputError(f"{self.name} cannot be read as parquet ({one_line(error)}): write it again") from error

    def where(self, record: Record) -> str:
        """The name of a row in messages."""
        return f"{self.name}, {'row' if self.format == 'parquet' else 'line'} {record.number}"

    @property
    def columns(self) -> Sequence[str]:
        """The columns that all rows have; none for JSONL, where each row has its own."""
        return self.header.names if self.header else self.schema.names if self.format == "parquet" else ()


def check_there(given: str, name: str) -> Path:
    """The path of a file of rows. InputError where there is none, or of another kind."""
    path = Path(given).expanduser()
    if path.suffix not in FORMATS:
        raise InputError(
            f"{name}: rows are read from .csv, .jsonl (one object per line) or .parquet, or from stdin (-)"
        )
    try:
        return check_regular(path)
    except FileNotFoundError:
        raise InputError(f"{name}: there is no such file{similar(path)}") from None


def piped(stream: Any) -> str:
    """The format of rows that come from stdin, of which nothing is taken."""
    start = stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return "jsonl" if start[:1] == b"{" else "csv"


@contextmanager
def source(given: str, name: str = "") -> Iterator[Source]:
    """The rows of a file, or of stdin; `name` is what messages call it. InputError for what is not a file of rows."""
    if given == PIPE:
        yield _text("stdin", piped(sys.stdin.buffer), sys.stdin.buffer)
        return
    name = name or given
    path = check_there(given, name)
    if path.suffix == ".parquet":
        pq = need("pyarrow.parquet", "bench")
        try:
            file = pq.ParquetFile(path)
        except (ValueError, OSError) as error:
            raise InputError(f"{name} cannot be read as parquet ({one_line(error)}): write it again") from error
        with file:
            yield Source(name, "parquet", file, schema=file.schema_arrow)
        return
    with opened(path) as stream:
        yield _text(name, FORMATS[path.suffix], stream)


def _text(name: str, kind: str, stream: Any) -> Source:
    marked = stream.peek(3).startswith(b"\xef\xbb\xbf")
    text = lines(stream, name)
    header = Csv(text, name) if kind == "csv" else None
    records = iter(header) if header is not None else jsonl(text, name)
    return Source(name, kind, stream, header, None, marked, records)


class Sink(Protocol):
    """Where rows are written with their answers."""

    def write(self, records: Sequence[Record], answers: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


def sink(rows: Source, kind: str, added: Sequence[str], stream: IO[bytes]) -> Sink:
    """What writes `rows` in the format `kind`, each with the columns `added`, to `stream`."""
    kinds: dict[str, Any] = {"csv": _CsvSink, "jsonl": _JsonlSink, "parquet": _ParquetSink}
    made: Sink = kinds[kind](rows, added, stream)
    return made


class _CsvSink:
    def __init__(self, rows: Source, added: Sequence[str], stream: IO[bytes]) -> None:
        self._rows, self._added, self._stream = rows, added, stream
        self._names = list(rows.columns)
        self._delimiter = rows.header.delimiter if rows.header else ","
        ends = (end for end in ("\r\n", "\r") if rows.header and rows.header.header.endswith(end))
        self._end = next(ends, "\n")
        self._begun = False

    def _begin(self, record: Record) -> None:
        """Write the header; the columns of JSONL are those of its first row."""
        self._begun, self._names = True, self._names or list(record.row)
        mark = "\ufeff" if self._rows.marked and self._rows.header else ""
        text = self._rows.header.header if self._rows.header else None
        self._put(mark, text, self._names, self._added)

    def write(self, records: Sequence[Record], answers: Sequence[Mapping[str, Any]]) -> None:
        if not self._begun:
            self._begin(records[0])
        for record, answer in zip(records, answers, strict=True):
            if other := [name for name in record.row if name not in self._names]:
                raise InputError(
                    f"{self._rows.where(record)}: has the column {other[0]!r}, which the first row does not "
                    "have, and CSV has one header: write .jsonl"
                )
            cells = [_cell(record.row.get(name), name, self._rows.where(record)) for name in self._names]
            own = [_cell(answer[name], name, "") for name in self._added]
            self._put("", record.text if self._rows.header else None, cells, own)

    def _put(self, start: str, text: str | None, cells: Sequence[str], own: Sequence[str]) -> None:
        out = io.StringIO(newline="")
        # so that either end of a line inside a cell is put in quotes
        writer = csv.writer(out, delimiter=self._delimiter, lineterminator="\r\n")
        writer.writerow([*([] if text is not None else cells), *own])
        kept = "" if text is None else text.rstrip("\r\n") + self._delimiter
        self._stream.write((start + kept + out.getvalue().removesuffix("\r\n") + self._end).encode())

    def close(self) -> None:
        self._stream.flush()


def _cell(value: Any, name: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        raise InputError(f"{where}: {name!r} holds bytes, not text: write .parquet")
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


class _JsonlSink:
    def __init__(self, rows: Source, added: Sequence[str], stream: IO[bytes]) -> None:
        self._rows, self._stream = rows, stream

    def write(self, records: Sequence[Record], answers: Sequence[Mapping[str, Any]]) -> None:
        for record, answer in zip(records, answers, strict=True):
            own = json.dumps(answer, ensure_ascii=False)
            if self._rows.format == "jsonl":  # numbers and escapes stay as they were typed
                text = f"{record.text.strip()[:-1].rstrip()}, {own[1:]}"
            else:
                text = json.dumps({**record.row, **answer}, ensure_ascii=False, default=self._text)
            self._stream.write(f"{text}\n".encode())

    def _text(self, value: Any) -> str:
        return _cell(value, "a column", self._rows.name)

    def close(self) -> None:
        self._stream.flush()


class _ParquetSink:
    def __init__(self, rows: Source, added: Sequence[str], stream: IO[bytes]) -> None:
        pa = need("pyarrow", "bench")
        if rows.schema is None and rows.header is None:
            raise InputError("parquet needs the types of all columns, which a pipe does not tell: write .jsonl")
        self._own = rows.schema or pa.schema([(name, pa.string()) for name in rows.columns])
        self._added, self._stream = added, stream
        self._writer: Any = None
        self._rows: list[dict[str, Any]] = []
        self._answers: list[Mapping[str, Any]] = []

    def write(self, records: Sequence[Record], answers: Sequence[Mapping[str, Any]]) -> None:
        self._rows += [record.row for record in records]
        self._answers += answers
        if len(self._rows) >= GROUP:
            self._flush()

    def _flush(self) -> None:
        pa, pq = need("pyarrow", "bench"), need("pyarrow.parquet", "bench")
        table = pa.Table.from_pylist(self._rows, schema=self._own)
        for name in self._added:
            values = [answer[name] for answer in self._answers]
            table = table.append_column(
                name, pa.array(values, pa.string() if isinstance(values[0], str) else pa.float64())
            )
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._stream, table.schema)
        self._writer.write_table(table)
        self._rows, self._answers = [], []

    def close(self) -> None:
        if self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        self._stream.flush()
