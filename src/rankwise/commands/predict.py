"""Answers to a user's rows: `rankwise predict`.

From file to file a command that was killed goes on where it was. The answers so far are in `OUT.part`, a line for each
batch of rows; its first line says whose they are. The batches are the same each time, and so are the answers, to the
byte. `OUT` appears when it is whole, and then `OUT.part` is removed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rankwise.adapters.beside import base_digest
from rankwise.commands.ready import Ready
from rankwise.commands.row_files import FORMATS, PIPE, Source, check_there, piped, sink, source
from rankwise.errors import InputError, need, shown
from rankwise.files import ADAPTER, appended, tidy, unfinished
from rankwise.settings import PLACE
from rankwise.tasks import Task
from rankwise.tasks.records import Record, one_line
from rankwise.train.arguments import computing
from rankwise.train.checkpoint_files import file_digest

BATCHES = 4
"""Of rows that are read together: within them rows of like length go through the model together."""


@dataclass(frozen=True)
class Predicted:
    """What was answered: how many rows, and how many of them by an earlier call that did not end."""

    rows: int
    before: int


def predict_rows(ready: Ready, rows: Iterable[Mapping[str, Any] | str]) -> list[dict[str, Any]]:
    """Each of `rows` with its answer; a text alone is what the task's one column would have."""
    columns = [*ready.task.asked.values()]
    found: list[dict[str, Any]] = []
    batch: list[Record] = []
    for number, given in enumerate(rows):
        if isinstance(given, str) and len(columns) != 1:
            raise InputError(f"row {number} is a text, but {ready.task.name} reads {', '.join(columns)}: give mappings")
        batch.append(Record(number, {columns[0]: given} if isinstance(given, str) else dict(given), ""))
    size = _size(ready)
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        questions = [_question(ready.task, record, f"row {record.number}") for record in part]
        found += [{**record.row, **answer} for record, answer in zip(part, _answers(ready, questions), strict=True)]
    return found


def check_files(given: str, out: str, force: bool) -> None:
    """Refuse files that `predict_file` cannot read or may not write, before a model is loaded.

    Raises:
        InputError: a file of an unknown kind, rows that are not there, a file to write that is (without `force`).
    """
    if given != PIPE:
        check_there(given, given)
    if out == PIPE:
        return
    target = Path(out).expanduser()
    if target.suffix not in FORMATS:
        raise InputError(f"{out}: rows are written to .csv, .jsonl or .parquet, or to stdout (-)")
    if target.is_dir():
        raise InputError(f"{out}: is a folder; give another file")
    if target.exists() and given != PIPE and target.samefile(Path(given).expanduser()):
        raise InputError(f"{out}: is the file that the rows come from: give another one")
    if target.exists() and not force:
        raise InputError(f"{out}: is there already; give another file, or --force to replace it")
    if not target.parent.is_dir():
        raise InputError(f"{out}: there is no folder {target.parent}")


def predict_file(ready: Ready, given: str, out: str) -> Predicted:
    """Write the rows of `given`, a file or `-`, with their answers to `out`, a file or `-`, as `check_files` allows.

    Raises:
        InputError: a column or a text that is missing, a column that an answer would overwrite, `out.part` with other
            answers than the first ones to these rows.
    """
    if not ready.task.form:
        ready.task.answer(ready.model, [], ready.processor, 0, 0)  # says that it has none
    if out == PIPE:
        with source(given) as rows:
            kind = "jsonl" if rows.format == "parquet" else rows.format
            return _carry_out(ready, rows, kind, sys.stdout.buffer, iter(()), None)
    with ExitStack() as stack:
        target = Path(out).expanduser()
        if given == PIPE:  # read twice, as any file is
            return _to_file(ready, stack.enter_context(_spooled()), "stdin", target, stack)
        return _to_file(ready, given, given, target, stack)


def _to_file(ready: Ready, given: str, name: str, target: Path, stack: ExitStack) -> Predicted:
    types = target.suffix == ".parquet"
    with source(given, name) as rows:
        schema = _check(ready, rows, types)
    path = target.with_name(f"{target.name}.part")
    part = stack.enter_context(_part(path))
    before = _before(path, part, _whose(ready, given))
    tidy(target.parent)
    with source(given, name) as rows, unfinished(target) as made:
        rows.schema = rows.schema or schema
        with made.open("wb") as stream:
            found = _carry_out(ready, rows, FORMATS[target.suffix], stream, before, part)
            os.fsync(stream.fileno())
        made.replace(target)
    path.unlink()
    return found


@contextmanager
def _spooled() -> Iterator[str]:
    """A file with what comes from stdin: rows are read twice."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"rows.{piped(sys.stdin.buffer)}"
        with file.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        yield str(file)


@contextmanager
def _part(path: Path) -> Iterator[IO[bytes]]:
    """The file of the answers so far, of this process alone."""
    with appended(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is at work on it; wait for it, or stop it") from None
        yield file


def _whose(ready: Ready, given: str) -> dict[str, str]:
    """What decides the answers: the rows, the weights and the settings, as digests."""
    settings = ready.config.model_dump(mode="json", exclude={*PLACE})
    known = json.dumps([settings, [*ready.task.labels]], sort_keys=True)
    files = [ready.folder / name for name in ADAPTER[:3]] if ready.folder else []  # its scales are no parameters
    weights = "".join([base_digest(ready.model), *(file_digest(file) for file in files if file.is_file())])
    parts = {"rows": file_digest(Path(given).expanduser()), "weights": weights, "settings": known}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in parts.items()}


def _before(path: Path, part: IO[bytes], whose: Mapping[str, str]) -> Iterator[list[Any]]:
    """The answers of each batch that `part` holds already; what was cut off at its end is removed first.

    InputError, and nothing is removed, where they are other answers, or where it is some other file.
    """
    head = json.dumps(whose).encode() + b"\n"
    whole = rows = 0
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                content = None
            if content is None:
                break
            if not whole and content != whose:
                other = next(
                    (name for name in whose if isinstance(content, dict) and content.get(name) != whose[name]), ""
                )
                raise InputError(
                    f"{path}: holds answers made with other {other or 'rows'}; delete it, or give another --out"
                )
            rows += len(content) if whole else 0
            whole += len(line)
    with path.open("rb") as file:
        begun = whole or head.startswith(file.read(len(head) + 1))
    if not begun:
        raise InputError(f"{path}: is where the answers so far are kept, but holds something else: move it away")
    os.truncate(path, whole)
    if not whole:
        part.write(head)
        part.flush()
    if rows:
        print(shown(f"{path}: goes on after row {rows:,}"), file=sys.stderr)
    return _stored(path, whole)


def _stored(path: Path, whole: int) -> Iterator[list[Any]]:
    with path.open("rb") as file:
        file.readline()
        while file.tell() < whole:
            yield json.loads(file.readline())


def _carry_out(
    ready: Ready, rows: Source, kind: str, stream: IO[bytes], before: Iterator[list[Any]], part: IO[bytes] | None
) -> Predicted:
    """Write all rows with their answers: those in `before` for the first rows, new ones, kept in `part`, for others."""
    task, count, known = ready.task, 0, 0
    _check_columns(task, rows.columns, rows.name)
    written = sink(rows, kind, task.added, stream)
    for batch in rows.batches(_size(ready)):
        answers = next(before, None)
        if answers is None:
            questions = [_question(task, record, rows.where(record)) for record in batch]
            answers = [[each[name] for name in task.added] for each in _answers(ready, questions)]
            if part is not None:
                part.write(json.dumps(answers).encode() + b"\n")
                part.flush()
        else:
            known += len(batch)
        written.write(batch, [dict(zip(task.added, values, strict=True)) for values in answers])
        if part is None:
            stream.flush()
        count += len(batch)
    if not count:
        raise InputError(f"{rows.name}: has no rows")
    written.close()
    return Predicted(count, known)


def _size(ready: Ready) -> int:
    return ready.config.batch_size * (BATCHES if ready.task.family == "classification" else 1)


def _answers(ready: Ready, questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    config = ready.config
    with computing(config):
        return ready.task.answer(ready.model, questions, ready.processor, config.max_length, config.batch_size)


def _question(task: Task, record: Record, where: str) -> dict[str, Any]:
    _check_columns(task, [*record.row], where)
    return task.question(record.row, where)


def _check_columns(task: Task, names: Sequence[str], where: str) -> None:
    if twice := [name for name in task.added if name in names]:
        raise InputError(
            f"{where}: has a column {twice[0]!r} already, which the answer would overwrite: rename it or leave it out"
        )


def _check(ready: Ready, rows: Source, types: bool) -> Any:
    """Refuse a row that cannot be answered before hours are spent on others.

    With `types` the schema of rows in JSONL, where a column may have whole numbers in some rows and others in more.
    """
    schema, seen = None, False
    _check_columns(ready.task, rows.columns, rows.name)
    for batch in rows.batches(_size(ready)):
        seen = True
        for record in batch:
            _question(ready.task, record, rows.where(record))
        if types and rows.format == "jsonl":
            schema = _widened(schema, batch, rows)
    if not seen:
        raise InputError(f"{rows.name}: has no rows")
    return schema


def _widened(schema: Any, batch: Sequence[Record], rows: Source) -> Any:
    pa = need("pyarrow", "bench")
    names = dict.fromkeys(name for record in batch for name in record.row)
    try:
        own = pa.table({name: [record.row.get(name) for record in batch] for name in names}).schema
        return own if schema is None else pa.unify_schemas([schema, own], promote_options="permissive")
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(
            f"{rows.where(batch[0])} and below: a column has several types ({one_line(error)}): write .jsonl"
        ) from error
