"""A run's process on the machine that carries it out: this one, or a node of a cluster."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

from rankwise.errors import STOPPED, InputError
from rankwise.files import appended, read_json, write_whole
from rankwise.processes.forked import Forked
from rankwise.processes.stop import answering, this_process

# Everything that starts threads in a run: OpenMP and MKL in torch, OpenBLAS in numpy, rayon in the tokenizers.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
SENT = "sent.json"
"""In a run folder: the order it was sent to a node with last."""
TOKEN = ".sent-"
"""How the names of the files of `Order.token` begin."""
PASSED = ("RANKWISE_", "HF_")
"""How the environment variables begin that a run on a node takes over from the sweep."""
PATIENCE = 60.0
"""Seconds until a new file has come through a network file system's caches."""
POLL = 0.1  # seconds
UNSEEN = "cannot see this folder; all nodes need one file system, choose it with runs=DIR"


def environment(threads: int) -> dict[str, str]:
    """What a run's process finds in its environment: its parent, and at most `threads` threads."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    count = str(min(threads, int(limit)) if limit.isdigit() and int(limit) else threads)
    return {
        **os.environ,
        **dict.fromkeys(THREADS, count),
        "TOKENIZERS_PARALLELISM": "false" if count == "1" else "true",
        "RANKWISE_PARENT": this_process(),
    }


def launch(folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start `command` on the run, its output appended to log.txt.

    Raises OSError if it cannot be started, InputError if nothing can be written.
    """
    with appended(folder / "log.txt") as log:
        # A session of its own: Ctrl-C at the terminal reaches the sweep alone, which then asks the run to stop.
        return subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def logged(folder: Path) -> int:
    """Bytes in the run's log.txt."""
    try:
        return (folder / "log.txt").stat().st_size
    except OSError:
        return 0


def end(processes: Sequence[subprocess.Popen[bytes] | Forked], grace: float) -> None:
    """Ask for a checkpoint by SIGTERM, wait up to `grace` seconds in all, and kill what is left with its children."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + grace
    try:
        with suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Order:
    """A run to be carried out on a node of a cluster; `carry` does it."""

    folder: Path
    command: tuple[str, ...]
    threads: int
    grace: float
    """Seconds between the signal to end and the kill."""
    patience: float = PATIENCE
    mark: str = field(default_factory=lambda: uuid4().hex[:12])
    more: dict[str, str] = field(default_factory=dict)
    """Environment variables of the run besides those that a node has and those of `PASSED`."""
    passed: dict[str, str] = field(
        default_factory=lambda: {
            name: value
            for name, value in os.environ.items()
            if name.startswith(PASSED) and name != "RANKWISE_PARENT"  # the process that the sweep itself follows
        }
    )

    @property
    def token(self) -> Path:
        """A file of only this order: a node that finds it sees the same folder as the sweep."""
        return self.folder / f"{TOKEN}{self.mark}"


@dataclass(frozen=True)
class Over:
    """What a node reports of a run whose process is over."""

    node: str
    code: int = 0
    signal: int = 0
    """The signal that asked the node to end it, 0 for none."""
    problem: str = ""
    """Why the node cannot carry out runs in this folder, a few words."""


def send(order: Order, index: int | None = None) -> None:
    """Note in the run folder that it goes to a node with this order, as number `index` of several. Raises OSError."""
    write_whole(order.folder / SENT, json.dumps({"mark": order.mark, "index": index}) + "\n")
    order.token.touch()


def sent(folder: Path) -> dict[str, Any]:
    """What `send` noted last; {} for nothing that can be read."""
    try:
        noted = read_json(folder / SENT)
    except (OSError, InputError):
        return {}
    return noted if isinstance(noted, dict) else {}


def carry(order: Order) -> Over:
    """Carry out the run on this node, and pass on to it what asks this process to end.

    That is SIGUSR2 before SLURM's time limit, else SIGTERM, or the KeyboardInterrupt by which Ray cancels a task.
    """
    node = socket.gethostname()
    until = time.monotonic() + order.patience
    with _asked() as asked:
        while not order.token.exists():
            if time.monotonic() >= until or asked.number:
                return Over(node, STOPPED, asked.number, "" if asked.number else UNSEEN)
            time.sleep(POLL)
        try:
            process = launch(order.folder, order.command, {**environment(order.threads), **order.passed, **order.more})
        except OSError as error:
            return Over(node, problem=f"cannot start {order.command[0]} in this folder: {error.strerror or error}")
        except InputError as error:
            return Over(node, problem=f"cannot write there: {error}")
        asked.listen()
        try:
            while process.poll() is None and not asked.number:
                time.sleep(POLL)
        finally:
            if process.returncode is None:
                end([process], order.grace)
    if process.returncode == 0:
        order.token.unlink(missing_ok=True)
    return Over(node, process.returncode, asked.number)


class _Asked:
    """The signal that asked this process to end."""

    number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def listen(self) -> None:
        """Note SIGUSR2 as well. A process started before ignores it: SLURM sends it to the whole job."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR2, self.note)


@contextmanager
def _asked() -> Iterator[_Asked]:
    """Note the signals that ask this process to end while the block runs, and pass them to its own handlers after."""
    asked = _Asked()
    handlers: dict[int, Any] = {signal.SIGTERM: asked.note, signal.SIGINT: asked.note, signal.SIGUSR2: signal.SIG_IGN}
    try:
        with answering(handlers):
            yield asked
    finally:
        if asked.number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(asked.number)
