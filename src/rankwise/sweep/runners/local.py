"""Runs as processes of this machine, its cores divided among them."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rankwise.errors import InputError
from rankwise.files import appended, unwritable
from rankwise.processes.forked import Forked
from rankwise.sweep.runners.base import Ended, Runner
from rankwise.sweep.runners.process import end, environment, launch, logged
from rankwise.sweep.runners.warm import Parent, possible

LOST = "the process that it was forked from has ended"


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs() -> int:
    """One run at a time on a GPU, which one run fills; else one per core."""
    gpu = Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    return 1 if gpu else cores()


@dataclass(eq=False)
class Local(Runner, name="local"):
    """One process per run on this machine, each with its share of the cores.

    Attributes:
        jobs: runs carried out at once; one per core, or one on a GPU, when absent.
    """

    _live: dict[Path, subprocess.Popen[bytes] | Forked] = field(default_factory=dict, init=False)
    _log_from: dict[Path, int] = field(default_factory=dict, init=False)
    _parent: Parent | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.jobs = self.jobs or default_jobs()

    def start(self, folder: Path) -> None:
        self._log_from[folder] = logged(folder)
        try:
            environment = self.environment()
            self._live[folder] = self._fork(folder, environment) or launch(folder, self.command, environment)
        except OSError as error:
            if error.filename == self.command[0]:
                raise InputError(f"{self.command[0]}: cannot be started: {str(error.strerror).lower()}") from None
            raise unwritable(folder, error) from None

    def _fork(self, folder: Path, environment: Mapping[str, str]) -> Forked | None:
        """None where the run needs a process of its own. Raises OSError if nothing can be written."""
        if self.command != Runner.command or not possible():
            return None
        with appended(folder / "log.txt") as log:
            self._parent = self._parent or Parent(folder, environment)
            return self._parent.fork(folder, log.fileno(), environment)

    def environment(self) -> dict[str, str]:
        """What a run's process finds in its environment: its parent, and its share of the cores."""
        return environment(max(1, cores() // (self.jobs or 1)))

    def running(self) -> list[Path]:
        return list(self._live)

    def ended(self) -> list[Ended]:
        over = [
            Ended(folder, code, self._log_from[folder], LOST if isinstance(process, Forked) and process.lost else "")
            for folder, process in self._live.items()
            if (code := process.poll()) is not None
        ]
        for each in over:
            del self._live[each.folder]
        return over

    def stop(self, grace: float) -> None:
        forked = [process for process in self._live.values() if isinstance(process, Forked)]
        if self._parent and any(process.waiting for process in forked):
            self._parent.kill()
        end([each for each in self._live.values() if not isinstance(each, Forked) or each.begun()], grace)

    def close(self) -> None:
        if self._parent:
            self._parent.kill()
        self._parent = None
