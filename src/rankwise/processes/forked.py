"""Processes that one process forks on order from another one. Linux only.

An order is a message with descriptors, over a socket; the last of these is a socket of its own, by which the forked
process says that it is there, and the one that forks it how it ended. So whoever has given the order can wait for a
process that is no child of its own, signal it without mistaking another one for it, and follow it to its end even when
the one that has forked it is killed.
"""

import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

LONGEST = 1 << 20
"""Bytes of an order."""
STREAMS = 3
"""The most descriptors that come with an order."""


class Forked:
    """What `order` has asked for, followed as `subprocess.Popen` follows a child."""

    def __init__(self, status: socket.socket) -> None:
        self.returncode: int | None = None
        """As of `Popen`; -9 where no one is left who knows."""
        self.lost = False
        """Whether the process that forks has ended before this one has."""
        self._status, self._process = status, -1
        self._pid: int | None = None

    @property
    def pid(self) -> int:
        """Waits until it has been forked, as `begun` does."""
        assert self.begun() and self._pid is not None, "was never forked"
        return self._pid

    @property
    def waiting(self) -> bool:
        """Whether it has yet to be forked, as far as is known."""
        return self.poll() is None and self._pid is None

    def poll(self) -> int | None:
        """Its exit code, None while it runs or has yet to be forked."""
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if (code := self._look(timeout)) is None:
            raise subprocess.TimeoutExpired(f"process {self._pid}", timeout or 0.0)
        return code

    def begun(self) -> bool:
        """Whether it has been forked, once that is known."""
        while self._pid is None and self.returncode is None:
            self._read()
        return self._pid is not None

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self._pid is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, number)

    def _look(self, timeout: float | None) -> int | None:
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._process if self.lost else self._status, selectors.EVENT_READ)
                if not ready.select(None if until is None else max(0.0, until - time.monotonic())):
                    return None
            self._read()
        return self.returncode

    def _read(self) -> None:
        """Take in the next thing that is known of it."""
        message, descriptors = b"", list[int]()
        if not self.lost:
            with suppress(ConnectionResetError):
                message, descriptors, *_ = socket.recv_fds(self._status, 32, 1)
        if descriptors:
            self._pid, self._process = int(message), descriptors[0]
        elif message:
            self._end(os.waitstatus_to_exitcode(int(message)))
        else:
            if self._pid is None or self.lost:
                self._end(-signal.SIGKILL)
            self.lost = True

    def _end(self, code: int) -> None:
        self.returncode = code
        self._status.close()
        if self._pid is not None:
            os.close(self._process)


def order(orders: socket.socket, text: bytes, streams: Sequence[int]) -> Forked:
    """Ask for a process that finds `text` and `streams`. Raises OSError where no one takes orders any more."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        try:
            socket.send_fds(orders, [text], [*streams, other.fileno()])
        except BaseException:
            own.close()
            raise
    return Forked(own)


def serve(orders: socket.socket, owner: int) -> tuple[bytes, list[int], socket.socket]:
    """Fork for each order, until the process `owner` is over or no one is left to give any: this one ends then.

    Returns in each forked process: what `order` has sent, and what `announce` needs.

    Args:
        owner: a descriptor of `os.pidfd_open`.
    """
    running: dict[int, tuple[int, socket.socket]] = {}
    ready = selectors.DefaultSelector()
    ready.register(orders, selectors.EVENT_READ)
    ready.register(owner, selectors.EVENT_READ)
    while True:
        for key, _ in ready.select():
            if key.fileobj == owner:
                os._exit(0)
            if key.fileobj is not orders:
                ready.unregister(key.fd)
                os.close(key.fd)
                pid, status = running.pop(key.fd)
                code = os.waitpid(pid, 0)[1]
                with status, suppress(OSError):  # no one waits for it
                    status.send(str(code).encode())
                continue
            text, descriptors, *_ = socket.recv_fds(orders, LONGEST, STREAMS + 1)
            if not descriptors:
                os._exit(0)
            status = socket.socket(fileno=descriptors.pop())
            try:
                pid = os.fork()
            except OSError:  # too many processes, or no memory: `Forked.lost`
                status.close()
            else:
                if not pid:
                    ready.close()
                    orders.close()
                    os.close(owner)
                    for process, (_, other) in running.items():
                        os.close(process)
                        other.close()
                    return text, descriptors, status
                process = os.pidfd_open(pid)
                ready.register(process, selectors.EVENT_READ)
                running[process] = pid, status
            for descriptor in descriptors:
                os.close(descriptor)


def announce(status: socket.socket) -> None:
    """Say in a forked process that it is there. It ends where that interests no one."""
    own = os.pidfd_open(os.getpid())
    try:
        socket.send_fds(status, [str(os.getpid()).encode()], [own])
    except OSError:
        os._exit(0)
    os.close(own)
    status.close()
