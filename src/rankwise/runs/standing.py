"""How a run stands: its state, how far it has come, and what went wrong with it."""

import fcntl
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankwise.errors import InputError
from rankwise.files import MARKER, checkpoints, opened, read_json

State = Literal["pending", "running", "stopped", "failed", "done", "damaged"]


@dataclass(frozen=True)
class Standing:
    """How one run stands."""

    folder: Path
    learning_rate: float | None
    """None where its `run.yaml` is damaged."""
    tries: bool
    """Whether it only tries this rate."""
    planned: bool
    """Whether the experiment in the folder asks for it; True where none is noted."""
    state: State
    """`damaged`, where no process is at work, for a `run.yaml` or `result.json` that is not what was written."""
    step: int
    """Optimizer steps done."""
    steps: int | None
    """Steps of the whole run, where it has come far enough to know."""
    pace: float | None
    """Seconds per step, as the run measured them up to its end or its newest checkpoint; None before that."""
    error: str
    """First line of its error, when it failed, or what is damaged; of a run that is done, too."""


def pace(folder: Path, result: Mapping[str, Any] | None, steps: int | None) -> float | None:
    """Seconds per step of a run with this `result`, or without one; see `Standing`."""
    try:
        if result is not None:
            return float(result["cost"]["seconds"]) / steps if steps else None
        newest = next(each / MARKER for each in checkpoints(folder) if (each / MARKER).is_file())
        pace = float(read_json(newest)["carried"]["seconds"]) / int(newest.parent.name.rpartition("-")[2])
        return pace if 0 <= pace < math.inf else None
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, StopIteration):  # there is none any more
        return None


def held(path: Path) -> bool:
    """Whether a live process holds the lock; the file itself stays behind when one is gone."""
    try:
        with opened(path) as file:
            # Shared, for the moment of the look: two that look at once do not take each other for the run.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except (OSError, InputError):
        return False  # no such file: nobody has begun
