"""What a run does when memory runs out: it processes half as many rows at once."""

import json
import math
import sys
from pathlib import Path

from rankwise.files import read_json, write_whole
from rankwise.processes import together
from rankwise.runs.store import MEMORY
from rankwise.settings import RunConfig


def rows_at_once(folder: Path, most: int) -> int:
    """Rows that each process takes at once: at most `most`, or fewer if memory has run out before."""
    try:
        return min(most, max(1, int(read_json(folder / MEMORY)["rows"])))
    except (OSError, ValueError, KeyError, TypeError):
        return most


def halve(folder: Path, config: RunConfig, rows: int, reason: str) -> None:
    """Record and report that from now on half as many rows are processed at once; OutOfMemory for one row."""
    what = "pack" if config.packing else "row"
    if rows == 1:
        raise together.OutOfMemory(
            f"out of memory even with one {what} at a time ({reason}): lower max_length, or use a smaller model or a "
            "machine with more memory"
        )
    write_whole(folder / MEMORY, json.dumps({"rows": rows // 2}) + "\n")
    passes = "" if config.packing else f", {math.ceil(config.batch_size / (rows // 2))} times per step"
    print(
        f"out of memory with {rows} {what}s at once; going on from the last checkpoint with {rows // 2} at once"
        f"{passes}; a step still has {config.batch_size} rows",
        file=sys.stderr,
    )
