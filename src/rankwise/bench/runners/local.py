"""Runs as processes of this machine, its cores divided among them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rankwise.bench.runners.base import Ended, Runner
from rankwise.runs.files import unwritable

# Everything that starts threads in a run: OpenMP and MKL in torch, OpenBLAS in numpy, rayon in the tokenizers.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs() -> int:
    """One run at a time on a GPU, which one run fills; else one per core."""
    gpu = Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    return 1 if gpu else cores()


class Local(Runner, name="local"):
    """One process per run on this machine."""

    def __init__(self, jobs: int, command: Sequence[str] = (sys.executable, "-m", "rankwise", "train")) -> None:
        """Args:
        jobs: processes at once; each gets cores // jobs threads.
        command: what carries out a run; its folder is put behind it.
        """
        super().__init__(jobs)
        self.command = tuple(command)
        self._log_from: dict[Path, int] = {}
        self._live: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path) -> None:
        try:
            with (folder / "log.txt").open("ab") as log:
                self._log_from[folder] = log.tell()
                # A session of its own: Ctrl-C at the terminal reaches the sweep alone, which then asks the run to stop.
                self._live[folder] = subprocess.Popen(
                    [*self.command, str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment(),
                    start_new_session=True,
                )
        except OSError as error:
            raise unwritable(folder, error) from None

    def environment(self) -> dict[str, str]:
        """What a run's process finds in its environment: its parent, and its share of the cores."""
        share = max(1, cores() // self.jobs)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads = str(min(share, int(asked)) if asked.isdigit() and int(asked) else share)
        return {
            **os.environ,
            **dict.fromkeys(THREADS, threads),
            "TOKENIZERS_PARALLELISM": "false" if threads == "1" else "true",
            "RANKWISE_PARENT": str(os.getpid()),
        }

    def running(self) -> list[Path]:
        return list(self._live)

    def ended(self) -> list[Ended]:
        over = [
            Ended(folder, code, self._log_from[folder])
            for folder, process in self._live.items()
            if (code := process.poll()) is not None
        ]
        for each in over:
            del self._live[each.folder]
        return over

    def stop(self, grace: float) -> None:
        for process in self._live.values():
            process.terminate()
        until = time.monotonic() + grace
        try:
            with suppress(subprocess.TimeoutExpired):
                for process in self._live.values():
                    process.wait(max(0.0, until - time.monotonic()))
        finally:
            # also when a second Ctrl-C cuts the wait short
            for process in self._live.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
