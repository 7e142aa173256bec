"""Files that are written whole or not at all, and read with care: anything may lie where a file should be."""

import errno
import fcntl
import gc
import io
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from rankwise.errors import InputError, nearest

T = TypeVar("T")

MARKER = "complete.json"
"""Last file of a checkpoint: the digests of all others, and what the run carries over a restart."""
MOST = 64 * 1024**2
"""Bytes of a text that is read whole."""
MOST_LINES = 1024**3
"""Bytes of a file of lines: a long search in a large model writes hundreds of megabytes."""
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
WRITTEN = "written.json"
"""In a run folder: the names of what the run has made there and may delete, a checkpoint or a model."""
USE = "use.json"
"""Beside an adapter: what must be known to use it."""
TOKENIZER = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""Files of a tokenizer."""
ADAPTER = ("adapter_config.json", "rankwise.json", "adapter_model.safetensors", "README.md", USE, *TOKENIZER)
"""Files of a saved adapter: PEFT's configuration, our description of the method, the weights, the card, and the rest of
what is needed to use it."""
CHECKPOINT = re.compile(r"checkpoint-[0-9]{1,15}")
"""Names of checkpoints."""
EVENTS = "tensorboard"
"""In a run folder: the folder of the event files that a run writes for TensorBoard."""
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.rankwise", re.DOTALL)
"""Names of what `unfinished` makes."""


@contextmanager
def unfinished(path: Path, folder: bool = False) -> Iterator[Path]:
    """An empty file, or folder, beside `path`, to be filled and renamed to it; what is not renamed is removed.

    Its maker holds a lock on it, by which `tidy` knows it from what a killed process has left. Its mode is that of
    any new file, as the umask has it. Raises OSError where it cannot be made.
    """
    lock = None
    while lock is None:  # else another process has tidied up before it was locked
        made = path.parent / f".{path.name}.{secrets.token_hex(4)}.rankwise"
        if folder:
            made.mkdir()
        else:
            os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        lock = _hold(made)
    try:
        yield made
    finally:
        if os.path.lexists(made):
            _remove(made)
        os.close(lock)


def replace_folder(folder: Path, new: Path) -> None:
    """Put the complete folder `new` in the place of `folder`; its files get the mode of any new file."""
    as_new(new)
    if folder.exists():
        shutil.rmtree(folder)
    new.rename(folder)


def tidy(folder: Path) -> None:
    """Remove what killed processes have left unfinished in `folder`; what a live one is at work on stays."""
    with suppress(OSError):
        for path in [entry for entry in folder.iterdir() if _UNFINISHED.fullmatch(entry.name)]:
            with suppress(OSError):
                lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(path)
                finally:
                    os.close(lock)


def _hold(path: Path) -> int | None:
    """A handle that keeps `tidy` off `path`; None where it was faster."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # some network file systems cannot, and there `tidy` cannot either
        fcntl.flock(handle, fcntl.LOCK_SH)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    os.close(handle)
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def uncollected() -> Iterator[None]:
    """Around the parsing of many sources, whose trees the garbage collector walks again and again for nothing."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` so that a reader finds the old file or the new one, even after a power cut."""
    with unfinished(path) as made:
        with made.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    with suppress(OSError):  # some network file systems cannot
        flush(path.parent)


def write_new(path: Path, text: str, other: str) -> None:
    """Write a file of the user's. InputError, which tells of an `other` name, if it is there already or cannot be."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: is there already; give another name, {other}")
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {_reason(error)}; give another name, {other}") from None


def flush(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def appended(path: Path, create: bool = True) -> io.BufferedWriter:
    """A regular file, opened to be written to at its end; with `create` it is made if there is none.

    Raises OSError where it cannot be made or is not there, InputError where it is something else.
    """
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | (os.O_CREAT if create else 0)
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if os.path.lexists(path):
            raise InputError(f"{path}: cannot be written to: {_reason(error)}; move it away") from None
        raise
    return os.fdopen(_regular(path, handle), "ab")


def opened(path: Path) -> io.BufferedReader:
    """A regular file, opened to be read; to open anything else, such as a pipe, might take for ever.

    Raises FileNotFoundError where there is none, InputError, one line, where it is something else or cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise InputError(f"{path}: cannot be read: {_reason(error)}") from None
    return os.fdopen(_regular(path, handle), "rb")


def _regular(path: Path, handle: int) -> int:
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise InputError(f"{path}: is {KINDS.get(kind, 'something else')} where a file should be; move it away")
    return handle


def read_bytes(path: Path, most: int = MOST) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises as `opened` does."""
    with opened(path) as file:
        try:
            content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)  # allocates as much as it is asked for
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {_reason(error)}") from None
    if len(content) > most:
        raise InputError(f"{path}: is larger than {most:,} bytes, which no such file should be; move it away")
    return content


def read_text(path: Path, most: int = MOST) -> str:
    """The text of a regular file, as `read_bytes`; what is no UTF-8 in it is replaced."""
    return read_bytes(path, most).decode(errors="replace").replace("\r\n", "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises as `opened` does, and InputError where it is broken."""
    try:
        return json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged: not valid JSON: {error}") from None


_remembered: dict[tuple[Path, Callable[[Path], Any]], tuple[tuple[int, ...], Any]] = {}
_SETTLED = 2 * 10**9
"""Nanoseconds after a change in which another one may leave no trace in the times of a file."""


def remembered(read: Callable[[Path], T], path: Path) -> T:
    """`read(path)`, which is not called again before the file has changed. Its result must not be changed."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return read(path)
    stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    known, value = _remembered.get((path, read), (None, None))
    if known == stamp:
        return cast("T", value)
    value = read(path)
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _SETTLED:
        _remembered[path, read] = stamp, value
    return value


def check_regular(path: Path) -> Path:
    """`path`, for a library that opens it itself. Raises as `opened` does."""
    opened(path).close()
    return path


def check_files(folder: Path) -> Path:
    """`folder`, for a library that opens what lies in it. Raises InputError for what is neither file nor folder."""
    for path in folder.iterdir():
        if path.exists() and not path.is_dir():
            check_regular(path)
    return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines up to the first broken one, which a killed process may have left; [] for no file.

    Raises InputError as `opened` does.
    """
    lines: list[dict[str, Any]] = []
    try:
        content = read_text(path, MOST_LINES)
    except FileNotFoundError:
        return lines
    for text in content.split("\n")[:-1]:  # what has no end of a line has been cut off
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def similar(path: Path) -> str:
    """`nearest` for a path that is not there, among what lies in its folder."""
    try:
        return nearest(path.name, sorted({each.name for each in path.parent.iterdir()} - {path.name}))
    except OSError:
        return ""


def written(folder: Path) -> set[str]:
    """The names in a run folder that are the run's own, as `claim` has noted them; none if that is not known."""
    try:
        found = read_json(folder / WRITTEN)
    except (OSError, InputError):
        return set()
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def claim(folder: Path, name: str) -> None:
    """Note, before it is made, that what is called `name` in a run folder is the run's own, which it may delete.

    Raises InputError if something else is in its place.
    """
    if name in (names := written(folder)):
        return
    if os.path.lexists(folder / name):
        raise InputError(f"{folder / name} was not written by this run, which needs the name: move it away")
    write_whole(folder / WRITTEN, json.dumps(sorted({*names, name})) + "\n")


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint that `claim` has noted, but what others have put into it since it was complete."""
    try:
        ours = set(read_json(checkpoint / MARKER)["files"]) | {MARKER}
    except (OSError, ValueError, KeyError, TypeError):  # it was never complete
        shutil.rmtree(checkpoint, ignore_errors=True)
    else:
        for path in sorted(checkpoint.rglob("*"), reverse=True):  # what is in a folder before the folder
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                elif str(path.relative_to(checkpoint)) in ours:
                    path.unlink()
        with suppress(OSError):
            checkpoint.rmdir()
    left = written(checkpoint.parent) - {checkpoint.name}
    if left:
        write_whole(checkpoint.parent / WRITTEN, json.dumps(sorted(left)) + "\n")
    else:
        (checkpoint.parent / WRITTEN).unlink(missing_ok=True)


def remove_events(folder: Path) -> None:
    """Delete the event files that a run has written for TensorBoard, and their folder if nothing else is in it."""
    if EVENTS in written(folder) and not (folder / EVENTS).is_symlink():
        for path in (folder / EVENTS).glob("events.out.tfevents.*"):
            path.unlink()
        with suppress(OSError):
            (folder / EVENTS).rmdir()


def checkpoints(folder: Path) -> list[Path]:
    """The run's own checkpoints, complete or not, the newest first."""
    steps = {int(name.rpartition("-")[2]): name for name in written(folder) if CHECKPOINT.fullmatch(name)}
    return [folder / name for _, name in sorted(steps.items(), reverse=True)]


def as_new(folder: Path) -> None:
    """Give all files in a folder just made the mode of any new file: libraries write some for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Around what torch writes in `folder`: OSError, as for any other file, where the disk is full."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("unexpected pos", "failed writing")):
            raise
        full = shutil.disk_usage(folder).free < 64 * 1024**2
        reason = os.strerror(errno.ENOSPC) if full else "not written whole: is the disk, or a quota, full?"
        raise OSError(errno.ENOSPC, reason, str(folder)) from error


def check_replaceable(folder: Path, own: Set[str], what: str) -> None:
    """Raise InputError where `folder` is a file, or holds an entry whose name is not in `own`: it would be lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give a new or an empty folder")
    if strange := sorted({entry.name for entry in folder.iterdir()} - own):
        raise InputError(f"{folder} holds {strange[0]}, which is no part of {what}; give a new or an empty folder")


def unwritable(folder: Path, error: OSError) -> InputError:
    """The error to raise where a folder the user named cannot be written to."""
    return InputError(f"{folder}: cannot be written to: {_reason(error)}; choose another folder with runs=DIR")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
