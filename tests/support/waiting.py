"""Waiting for what other processes do, and finding them."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE = 300  # seconds, enough for a busy machine


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)


def reached(folder: Path, step: int) -> bool:
    """Whether the line of this step is in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def writers(place: Path) -> list[int]:
    """The processes whose standard output is this file, or a file in this folder."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # it has ended
            if output.readlink().is_relative_to(place):
                found.append(int(output.parts[2]))
    return found


def alive(process: int) -> bool:
    """Whether a process runs; a zombie does not.

    It runs as long as any of its threads, each of which may be the last to end and to release locks.
    """
    try:
        threads = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/stat")]
    except OSError:  # one has ended in between
        return alive(process)
    return any(text.rpartition(")")[2].split()[0] not in "ZX" for text in threads)
