"""How a process is asked to stop: SIGTERM, Ctrl-C, or the end of the process that launched it."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from rankwise.errors import INTERRUPTED, STOPPED
from rankwise.processes.launched import launched

GRACE = 10.0  # seconds for the last step and its checkpoint once the parent is gone
POLL = 0.5  # seconds


class Stop:
    """Whether SIGTERM or Ctrl-C has come: only noted while `patient`, for the loop to act on; else it ends the process.

    A second Ctrl-C ends it in any case.
    """

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False
        """Whether any process of the run has been asked, as all of them have known since their last step."""
        self.code = STOPPED
        """What to exit with."""
        self._patient = False

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Around the training loop, which finishes its step and writes a checkpoint first."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def on_signal(self, number: int, *_: object) -> None:
        interrupted = number == signal.SIGINT
        again, self.asked = self.asked, True
        self.code = INTERRUPTED if interrupted else STOPPED
        if not self._patient or (interrupted and again):
            raise SystemExit(self.code)


@contextmanager
def answering(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Answer signals by `handlers` (signal number -> handler) while the block runs, and afterwards as before.

    Signals reach only the main thread: elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Answer SIGTERM with exit code 75 and Ctrl-C with 130 while the block runs."""
    stop = Stop()
    with answering(dict.fromkeys((signal.SIGTERM, signal.SIGINT), stop.on_signal)):
        yield stop


def this_process() -> str:
    """The value of RANKWISE_PARENT by which others find this process: its id, and where that id means something."""
    return f"{os.getpid()}:{_ids_of()}"


def _ids_of() -> str:
    """Whose process ids this process has: a machine's since its start, or a container's. "" if nothing says it."""
    try:  # outside of containers the namespace's number is the same on all machines
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def follow_parent() -> None:
    """End this process soon after the sweep that RANKWISE_PARENT names is gone, whatever has been started in between.

    So a killed sweep leaves no worker running, and the worker still writes its checkpoint if it can within `GRACE`.
    One of several processes also follows its launcher. From another machine, or a container with process ids of
    its own, the sweep cannot be seen, and is not followed.
    """
    sweep, _, ids_of = os.environ.get("RANKWISE_PARENT", "").partition(":")
    seen = sweep.isdecimal() and ids_of == _ids_of()
    shared = launched() > 1
    if seen or shared:
        followed = int(sweep) if seen else None, os.getppid() if shared else None
        threading.Thread(target=_watch, args=followed, name="follow-parent", daemon=True).start()


def _watch(sweep: int | None, launcher: int | None) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(sweep)  # this one without a sweep; another that gets its number later does not pass
        while launcher in (None, os.getppid()) and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(STOPPED)
