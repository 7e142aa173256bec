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
from rankwise.processes.stop import answering, this_process

# Everything that starts threads in a run: OpenMP and MKL in torch, OpenBLAS in numpy, rayon in the tokenizers.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
SENT = "sent.json"
"""In a run folder: which order it was sent away with last."""
TOKEN = ".sent-"
"""How the names of the files begin that `Order.token` means."""
PASSED = ("RANKWISE_", "HF_")
"""How the environment variables begin that a run finds on a node as they are where the sweep is."""
PATIENCE = 60.0
"""Seconds until a new file has come through a network file system's caches."""
POLL = 0.1  # seconds
UNSEEN = "cannot see this folder; all nodes need one file system, choose it with runs=DIR"


def environment(threads: int) -> dict[str, str]:
    """What a run's process finds in its environment: its parent, and at most `threads` threads."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    count = str(min(threads, int(asked)) if asked.isdigit() and int(asked) else threads)
    return {
        **os.environ,
        **dict.fromkeys(THREADS, count),
        "TOKENIZERS_PARALLELISM": "false" if count == "1" else "true",
        "RANKWISE_PARENT": this_process(),
    }


def launch(folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start `command` on the run, its output behind what is in log.txt.

    Raises OSError where it cannot be started, InputError where nothing can be written.
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


def end(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Ask for a checkpoint by SIGTERM, wait up to `grace` seconds in all, and kill what is left with its children."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + grace
    try:
        with suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        # also when a second Ctrl-C cuts the wait short
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
    """Environment variables of the run beside those that a node has and those of `PASSED`."""
    passed: dict[str, str] = field(
        default_factory=lambda: {
            name: value
            for name, value in os.environ.items()
            if name.startswith(PASSED) and name != "RANKWISE_PARENT"  # whom the sweep itself follows
        }
    )

    @property
    def token(self) -> Path:
        """A file of this order alone: a node that finds it sees the same folder, whoever else sends it somewhere."""
        return self.folder / f"{TOKEN}{self.mark}"


@dataclass(frozen=True)
class Over:
    """What a node says of a run whose process is over."""

    node: str
    code: int = 0
    told: int = 0
    """The signal by which the node was told to end it, 0 for none."""
    problem: str = ""
    """Why the node cannot carry out runs in this folder, a few words."""


def send(order: Order, index: int | None = None) -> None:
    """Note in the run folder that it goes to a node with this order, as number `index` of several. Raises OSError."""
    write_whole(order.folder / SENT, json.dumps({"mark": order.mark, "index": index}) + "\n")
    order.token.touch()


def sent(folder: Path) -> dict[str, Any]:
    """What `send` noted last; {} for nothing that can be read."""
    try:
        found = read_json(folder / SENT)
    except (OSError, InputError):
        return {}
    return found if isinstance(found, dict) else {}


def carry(order: Order) -> Over:
    """Carry out the run on this node, and pass on to it whatever tells this process to end.

    Before SLURM's time limit that is SIGUSR2, else SIGTERM, or the KeyboardInterrupt by which Ray cancels a task.
    """
    node = socket.gethostname()
    until = time.monotonic() + order.patience
    with _told() as told:
        while not order.token.exists():
            if time.monotonic() >= until or told.number:
                return Over(node, STOPPED, told.number, "" if told.number else UNSEEN)
            time.sleep(POLL)
        try:
            process = launch(order.folder, order.command, {**environment(order.threads), **order.passed, **order.more})
        except OSError as error:
            return Over(node, problem=f"cannot start {order.command[0]} in this folder: {error.strerror or error}")
        except InputError as error:
            return Over(node, problem=f"cannot write there: {error}")
        told.listen()
        try:
            while process.poll() is None and not told.number:
                time.sleep(POLL)
        finally:
            if process.returncode is None:
                end([process], order.grace)
    if process.returncode == 0:
        order.token.unlink(missing_ok=True)
    return Over(node, process.returncode, told.number)


class _Told:
    """The signal that told this process to end."""

    number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def listen(self) -> None:
        """Note SIGUSR2 as well. A process started before ignores it: SLURM sends it to the whole job."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR2, self.note)


@contextmanager
def _told() -> Iterator[_Told]:
    """Note what tells this process to end while the block runs; after it the process's own handlers hear of it, too."""
    told = _Told()
    handlers: dict[int, Any] = {signal.SIGTERM: told.note, signal.SIGINT: told.note, signal.SIGUSR2: signal.SIG_IGN}
    try:
        with answering(handlers):
            yield told
    finally:
        if told.number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(told.number)
