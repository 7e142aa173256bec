"""Processes forked on order: followed to their end, whatever becomes of the one that forks them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankwise.processes import forked
from rankwise.processes.forked import Forked
from rankwise.sweep.runners.process import end
from waiting import PATIENCE, alive, wait_for

FORKING = """
import os, socket, sys, time
from rankwise.processes import forked
time.sleep(float(sys.argv[1]))
text, streams, status = forked.serve(socket.socket(fileno=os.dup(0)), os.pidfd_open(int(sys.argv[2])))
os.setsid()
os.dup2(streams[0], 1)
forked.announce(status)
exec(text)
"""


STUCK = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
open({!r}, "w").write(str(child.pid) + "\\n")
time.sleep(600)
"""


class Parent:
    def __init__(self, sleeps: float = 0.0, owner: int | None = None) -> None:
        self.orders, orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with orders:
            command = [sys.executable, "-c", FORKING, str(sleeps), str(owner or os.getpid())]
            self.process = subprocess.Popen(command, stdin=orders.fileno())

    def fork(self, code: str, out: int = 2) -> Forked:
        return forked.order(self.orders, code.encode(), [out])


@pytest.fixture
def parent() -> Iterator[Parent]:
    parent = Parent()
    yield parent
    parent.orders.close()
    assert parent.process.wait(PATIENCE) == 0  # no one is left to give orders


def test_how_it_ends_is_known_as_of_a_child(parent: Parent, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        ends = [
            parent.fork("print('it writes', flush=True)", out.fileno()),
            parent.fork("sys.exit(3)"),
            parent.fork("os.kill(os.getpid(), 9)"),
            parent.fork("1 / 0"),
        ]
    assert [each.wait(PATIENCE) for each in ends] == [0, 3, -9, 1]
    assert [each.poll() for each in ends] == [0, 3, -9, 1] and not any(each.lost for each in ends)
    assert (tmp_path / "out").read_text() == "it writes\n"
    assert len({each.pid for each in ends}) == 4


def test_it_is_waited_for_and_signalled(parent: Parent) -> None:
    sleeper = parent.fork("time.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.01)
    assert sleeper.begun() and not sleeper.waiting and os.getpgid(sleeper.pid) == sleeper.pid
    sleeper.terminate()
    assert sleeper.wait(PATIENCE) == -signal.SIGTERM
    sleeper.terminate()  # is over, and its number another's perhaps


def test_one_that_will_not_end_is_killed_with_its_children(parent: Parent, tmp_path: Path) -> None:
    stuck = parent.fork(STUCK.format(str(tmp_path / "child")))
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().endswith("\n"))
    end([stuck], grace=0.1)
    assert stuck.poll() == -signal.SIGKILL
    wait_for(lambda: not alive(int((tmp_path / "child").read_text())))


def test_it_goes_on_without_the_process_that_forked_it(tmp_path: Path) -> None:
    parent = Parent()
    ready, go = tmp_path / "ready", tmp_path / "go"
    code = f"open({str(ready)!r}, 'w').close()\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nsys.exit(3)"
    one, other = parent.fork(code), parent.fork("time.sleep(600)")
    wait_for(ready.exists)
    assert other.begun()  # an order that has not would be lost with the parent
    parent.process.kill()
    parent.process.wait()
    assert (one.poll(), other.poll()) == (None, None)
    other.terminate()
    go.touch()
    for each in (one, other):
        each.wait(PATIENCE)
        assert each.lost and not alive(each.pid)
    with pytest.raises(OSError):
        parent.fork("")
    parent.orders.close()


def test_an_order_that_is_not_come_to_never_begins(tmp_path: Path) -> None:
    parent = Parent(sleeps=600)
    order = parent.fork(f"open({str(tmp_path / 'begun')!r}, 'w').close()")
    assert order.poll() is None and order.waiting
    parent.process.kill()
    parent.process.wait()
    assert not order.begun() and order.lost and order.wait(0) == -signal.SIGKILL
    assert not (tmp_path / "begun").exists()
    parent.orders.close()


def test_the_process_that_forks_ends_with_its_owner_and_not_what_it_has_forked() -> None:
    owner = subprocess.Popen(["sleep", "600"])
    parent = Parent(owner=owner.pid)
    sleeper = parent.fork("time.sleep(600)")
    assert sleeper.begun()
    owner.kill()
    owner.wait()
    assert parent.process.wait(PATIENCE) == 0
    time.sleep(0.1)
    assert sleeper.poll() is None and alive(sleeper.pid)
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait(PATIENCE)
    parent.orders.close()


def test_what_no_one_waits_for_any_more_does_not_begin(tmp_path: Path) -> None:
    parent = Parent(sleeps=0.3)
    first = parent.fork(f"open({str(tmp_path / 'begun')!r}, 'w').close()")
    first._status.close()
    assert parent.fork("").wait(PATIENCE) == 0
    assert not (tmp_path / "begun").exists()
    parent.orders.close()
    assert parent.process.wait(PATIENCE) == 0
