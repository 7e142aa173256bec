"""Lines that grow and are cut back to a step, and checkpoints told complete from broken."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from rankwise.files import MARKER, appended, opened, read_json, read_lines, write_whole


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON object as a line."""
    with appended(path) as file:
        file.write((json.dumps(line, allow_nan=False) + "\n").encode())


def cut_lines(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`; of all steps when it is negative."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


def mark_complete(checkpoint: Path, carried: dict[str, Any]) -> None:
    """Declare a checkpoint folder complete, with what the run `carried` so far."""
    write_whole(checkpoint / MARKER, json.dumps({"files": _digests(checkpoint), "carried": carried}, indent=1))


def last_complete(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run folder whose files are all as they were marked, and what was carried in it.

    Every checkpoint newer than it is removed: half-written or damaged, it would be written again anyway.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            marker = read_json(checkpoint / MARKER)
            if marker["files"] == _digests(checkpoint):
                return checkpoint, marker["carried"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(checkpoint)
    return None


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def _digests(checkpoint: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MARKER:
            with opened(path) as file:
                digests[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
