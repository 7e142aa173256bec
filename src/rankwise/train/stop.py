"""How a run is asked to stop: SIGTERM, Ctrl-C, or the end of the process that launched it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rankwise.runs.processes import launched

STOPPED = 75  # EX_TEMPFAIL: start the same command again and it goes on
INTERRUPTED = 130
GRACE = 10.0  # seconds for the last step and its checkpoint once the parent is gone
POLL = 0.5  # seconds


class Stop:
    """Whether SIGTERM or Ctrl-C has come: only noted while `patient`, for the loop to act on; else it ends the process.

    A second Ctrl-C ends it in any case.
    """

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False
        """Whether any process of the run has been asked, as all of them know it since their last step."""
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
def stoppable() -> Iterator[Stop]:
    """Answer SIGTERM with exit code 75 and Ctrl-C with 130 while the block runs.

    Signals reach only the main thread: elsewhere a no-op.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_parent() -> None:
    """End this process soon after the parent named in RANKWISE_PARENT (a process id) is gone; without it, do nothing.

    A killed sweep so leaves no worker behind, and the worker still writes its checkpoint if it can within `GRACE`.
    One of several processes follows what has launched it.
    """
    parent = str(os.getppid()) if launched() > 1 else os.environ.get("RANKWISE_PARENT", "")
    if parent.isdigit():
        threading.Thread(target=_watch, args=(int(parent),), name="follow-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(STOPPED)
