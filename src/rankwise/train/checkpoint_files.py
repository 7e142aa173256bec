"""Lines that grow and are cut back to a checkpoint, and checkpoints told complete from broken."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from rankwise.errors import InputError
from rankwise.files import (
    MARKER,
    MOST_LINES,
    appended,
    checkpoints,
    opened,
    read_bytes,
    read_json,
    remove_checkpoint,
    write_whole,
)

LINES = ("metrics.jsonl", "ranks.jsonl")
"""Files of a run that grow by lines. A result is computed from them, so a checkpoint covers them as far as they go."""


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON object as a line."""
    with appended(path) as file:
        file.write((json.dumps(line, allow_nan=False) + "\n").encode())


def mark_complete(checkpoint: Path, carried: dict[str, Any]) -> None:
    """Declare a checkpoint folder complete, with what the run `carried` so far and its lines up to now."""
    lines = {name: _covered(_bytes(checkpoint.parent / name)) for name in LINES}
    content = {"files": _digests(checkpoint), "lines": lines, "carried": carried}
    write_whole(checkpoint / MARKER, json.dumps({**content, "digest": _digest(content)}, indent=1))


def last_complete(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run folder that is as it was marked, and what was carried in it.

    So have to be its files and the run's lines up to it; what was appended later does not count. Every newer one of its
    checkpoints is removed, as it would be written again anyway; of one that was complete once, stderr says what is
    wrong with it.
    """
    wrong = []
    found = None
    for checkpoint in checkpoints(folder):
        try:
            marker = read_json(checkpoint / MARKER)
        except FileNotFoundError:  # it was never complete
            changed = ""
        except InputError:
            changed = MARKER
        else:
            changed = _changed(checkpoint, marker)
            if not changed:
                found = checkpoint, marker["carried"]
                break
        if changed:
            wrong.append(f"{checkpoint.name} does not count, for {changed} is not what it was")
        remove_checkpoint(checkpoint)
    if wrong:
        onwards = f"going on from {found[0].name}" if found else "beginning anew"
        print(f"{folder}: {'; '.join(wrong)}; {onwards}", file=sys.stderr)
    return found


def cut_back(folder: Path, checkpoint: Path | None) -> None:
    """Bring the lines of a run back to what they were at a complete checkpoint, or to none."""
    covered = read_json(checkpoint / MARKER)["lines"] if checkpoint else {}
    for name in LINES:
        content = _bytes(folder / name)[: covered[name]["bytes"]] if name in covered else b""
        write_whole(folder / name, content)


def _changed(checkpoint: Path, marker: Any) -> str:
    """The first of what a checkpoint covers that is not as it was, or an empty string."""
    if not isinstance(marker, dict) or marker.pop("digest", "") != _digest(marker):
        return MARKER
    now, then = _digests(checkpoint), marker["files"]
    if different := sorted(name for name in now | then if now.get(name) != then.get(name)):
        return different[0]
    for name, covered in marker["lines"].items():
        if covered != _covered(_bytes(checkpoint.parent / name)[: covered["bytes"]]):
            return name
    return ""


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, MOST_LINES)
    except FileNotFoundError:
        return b""


def _covered(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(checkpoint)): file_digest(path) for path in files}
