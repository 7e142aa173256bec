"""Files that are written whole or not at all, and lines that a killed process may have left broken."""

import json
import os
import tempfile
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from rankwise.errors import InputError

MARKER = "complete.json"
"""Last file of a checkpoint: the digests of all others, and what the run carries over a restart."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` so that whoever looks, even after a power cut, finds the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some network file systems cannot
        flush(path.parent)


def flush(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines up to the first broken one, which a killed process may have left; [] for no file."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else ():
        try:
            line = json.loads(text) if text.endswith("\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


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
    reason = (error.strerror or str(error)).lower()
    return InputError(f"{folder}: cannot be written to: {reason}; choose another folder with runs=DIR")
