"""Runs as forks of a process that has imported what they need. `rankwise.warm` is that process."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rankwise.processes import forked
from rankwise.processes.forked import Forked


class Parent:
    """The process that runs are forked from. The first of them wait until its imports are done.

    Each finds in its environment what this process was started with, as libraries have read it when they were imported.
    """

    def __init__(self, first: Path, environment: Mapping[str, str]) -> None:
        """`first` is the folder of the first of these runs."""
        self._started_with = dict(environment), Path.cwd()
        self._orders, orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with orders, os.fdopen(os.memfd_create("said"), "wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rankwise.warm", str(first)],
                stdin=orders.fileno(),
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def fork(self, folder: Path, log: int, environment: Mapping[str, str]) -> Forked | None:
        """The run in `folder`, its output to the descriptor `log`; None where it needs a process of its own."""
        if (environment, Path.cwd()) != self._started_with:
            return None
        try:
            return forked.order(self._orders, os.fsencode(folder), [log])
        except OSError:  # it has ended, or there are too many descriptors on their way to it
            return None

    def kill(self) -> None:
        """End it. What has been forked goes on, and what has not never begins."""
        self._process.kill()
        self._process.wait()
        self._orders.close()


def possible() -> bool:
    """Whether processes can be forked here, and followed: only on Linux."""
    if sys.platform != "linux":
        return False
    try:
        for descriptor in (os.pidfd_open(os.getpid()), os.memfd_create("said")):
            os.close(descriptor)
    except OSError:  # a kernel before 5.3, or a sandbox
        return False
    except AttributeError:  # a Python that was built on an older system, as conda's may be
        return False
    return hasattr(signal, "pidfd_send_signal")
