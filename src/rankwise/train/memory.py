"""What a run does where memory runs out: it takes half as many rows at once."""

import json
import math
import sys
from pathlib import Path

from rankwise.files import read_json, write_whole
from rankwise.processes import together
from rankwise.runs.store import MEMORY
from rankwise.settings import RunConfig


def rows_at_once(folder: Path, most: int) -> int:
    """Rows that each process takes at once: a share of the batch, or fewer where memory has run out before."""
    try:
        return min(most, max(1, int(read_json(folder / MEMORY)["rows"])))
    except (OSError, ValueError, KeyError, TypeError):
        return most


def halve(folder: Path, config: RunConfig, rows: int, reason: str) -> None:
    """Note that half as many rows fit into memory, and say so. OutOfMemory where there is nothing to halve."""
    if rows == 1:
        raise together.OutOfMemory(
            f"out of memory even with one row at a time ({reason}): lower max_length, or take a smaller model or more "
            "memory"
        )
    write_whole(folder / MEMORY, json.dumps({"rows": rows // 2}) + "\n")
    print(
        f"out of memory with {rows} rows at once; going on from the last checkpoint with {rows // 2} at once, "
        f"{math.ceil(config.batch_size / (rows // 2))} times a step: a step sees the same {config.batch_size} rows",
        file=sys.stderr,
    )
