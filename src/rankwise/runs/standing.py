"""How a run stands: its state, its progress, and what went wrong."""

import fcntl
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankwise.errors import InputError
from rankwise.files import MARKER, checkpoints, opened, read_json
from rankwise.runs.result import Result

State = Literal["pending", "running", "stopped", "failed", "done", "damaged"]
FOREIGN = "not part of the folder's current experiment"
"""What is said of a run that is not `planned`."""


@dataclass(frozen=True)
class Standing:
    """How one run stands."""

    folder: Path
    learning_rate: float | None
    """None where its `run.yaml` is damaged."""
    tries: bool
    """Whether it only tries this rate."""
    planned: bool
    """Whether the folder's experiment asks for it; True if the folder records no experiment."""
    state: State
    """`damaged` if no process is running and `run.yaml` or `result.json` is not what was written."""
    step: int
    """Optimizer steps done."""
    steps: int | None
    """Steps of the whole run; None before it knows."""
    pace: float | None
    """Seconds per step, as the run measured them up to its end or its newest checkpoint; None before that."""
    error: str
    """First line of its error, if it failed; or what is damaged, also in a finished run."""


def pace(folder: Path, result: Result | None, steps: int | None) -> float | None:
    """Seconds per step of a run with this `result`, or without one; see `Standing`."""
    try:
        if result is not None:
            return result.cost.seconds / steps if steps else None
        newest = next(each / MARKER for each in checkpoints(folder) if (each / MARKER).is_file())
        pace = float(read_json(newest)["carried"]["seconds"]) / int(newest.parent.name.rpartition("-")[2])
        return pace if 0 <= pace < math.inf else None
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, StopIteration):  # it was deleted in the meantime
        return None


def held(path: Path) -> bool:
    """Whether a live process holds the lock; the file stays after the process."""
    try:
        with opened(path) as file:
            # Shared, so that two that look at once do not take each other for the run.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except (OSError, InputError):
        return False  # no such file: the run has not started
