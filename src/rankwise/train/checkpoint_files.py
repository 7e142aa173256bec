"""The files of a run that grow by lines, and checkpoints: which are complete, and what they cover."""

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
"""Files of a run that grow by lines. Results are computed from them, so a checkpoint covers the lines up to it."""


def append_line(path: Path, line: dict[str, Any], create: bool = True) -> None:
    """Add one JSON object as a line; `create` as for `appended`."""
    with appended(path, create) as file:
        file.write((json.dumps(line, allow_nan=False) + "\n").encode())


def mark_complete(checkpoint: Path, carried: dict[str, Any]) -> None:
    """Mark a checkpoint folder as complete, with what it `carried` besides the state and the run's lines so far."""
    lines = {name: _extent(_bytes(checkpoint.parent / name)) for name in LINES}
    content = {"files": _digests(checkpoint), "lines": lines, "carried": carried}
    write_whole(checkpoint / MARKER, json.dumps({**content, "digest": _digest(content)}, indent=1))


def last_complete(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run folder that is unchanged since it was marked, and what it carried.

    Its files and the run's lines up to it must be unchanged; lines that were added later do not matter. Newer
    checkpoints are removed, since the run will write them again; stderr says what has changed in those that were
    complete.
    """
    damaged = []
    newest = None
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
                newest = checkpoint, marker["carried"]
                break
        if changed:
            damaged.append(f"{checkpoint.name} cannot be used, since {changed} has changed")
        remove_checkpoint(checkpoint)
    if damaged:
        start = f"going on from {newest[0].name}" if newest else "starting again"
        print(f"{folder}: {'; '.join(damaged)}; {start}", file=sys.stderr)
    return newest


def cut_back(folder: Path, checkpoint: Path | None) -> None:
    """Cut the lines of a run back to those that a complete checkpoint covers; to none without a checkpoint."""
    covered = read_json(checkpoint / MARKER)["lines"] if checkpoint else {}
    for name in LINES:
        content = _bytes(folder / name)[: covered[name]["bytes"]] if name in covered else b""
        write_whole(folder / name, content)


def _changed(checkpoint: Path, marker: Any) -> str:
    """A file covered by a checkpoint that has changed, or an empty string."""
    if not isinstance(marker, dict) or marker.pop("digest", "") != _digest(marker):
        return MARKER
    now, then = _digests(checkpoint), marker["files"]
    if different := sorted(name for name in now | then if now.get(name) != then.get(name)):
        return different[0]
    for name, extent in marker["lines"].items():
        if extent != _extent(_bytes(checkpoint.parent / name)[: extent["bytes"]]):
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


def _extent(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(checkpoint)): file_digest(path) for path in files}
