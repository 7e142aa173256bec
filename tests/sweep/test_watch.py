"""How long it will still take, by clocks that are set by the test."""

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import filelock
import pytest

from rankwise.files import MARKER, claim
from rankwise.runs.standing import FOREIGN
from rankwise.runs.store import Store
from rankwise.settings import Experiment
from rankwise.sweep.watch import Watch
from runs import config, finish, tune
from sweep_runs import runs
from waiting import PATIENCE, wait_for


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def at(folder: Path, step: int, steps: int = 100) -> Path:
    """Bring a run to this step."""
    lines = [{"step": 0, "steps": steps}, {"step": step, "loss": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def checkpoint(folder: Path, step: int, seconds: float) -> None:
    claim(folder, f"checkpoint-{step}")
    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / MARKER).write_text(json.dumps({"files": {}, "carried": {"seconds": seconds}}))


def test_nobody_knows_before_anything_is_known(store: Store) -> None:
    runs(store, None, None)
    look = Watch(store).look()
    assert (look.left, look.total, look.over) == ({}, None, False)
    assert look.head() == "2 runs, 2 pending"


def test_what_runs_have_noted_themselves_is_enough_for_one_look(store: Store) -> None:
    done, stopped, pending = runs(store, None, None, None)
    finish(store, store.config(at(done, 100)), 0.5)  # in 90 s
    checkpoint(at(stopped, 40), 30, 60.0)
    look = Watch(store).look()
    # 60 steps at 2 s; 100 steps at the mean of 0.9 s and 2 s
    assert look.left == {stopped: pytest.approx(120), pending: pytest.approx(145)}
    assert look.total == pytest.approx(265)
    assert look.head() == "3 runs, 1 pending, 1 stopped, 1 done, about 4 min 25 s left"
    assert [row[4] for row in look.rows()] == ["2 min 25 s", "2 min 0 s", ""]


def test_rates_that_were_tried_are_not_all_there_is_to_wait_for(store: Store) -> None:
    finish(store, config(learning_rate=1e-3, tuning=0.1), 0.5)
    look = Watch(store).look()
    assert not look.over  # what they choose for is yet to come
    assert [row[1] for row in look.rows()] == ["0.001 (tried)"]
    tune(store, {1e-3: 0.5}, 1e-3)
    assert Watch(store).look().over


def test_a_run_at_work_is_judged_by_what_is_seen_of_it(store: Store) -> None:
    now = [1000.0]
    first, second, pending = runs(store, None, None, None)
    locks = [filelock.FileLock(folder / "run.lock") for folder in (first, second)]
    for lock in locks:
        lock.acquire()
    watch = Watch(store, lambda: now[0])
    at(first, 20), at(second, 20)
    assert watch.look().left == {}
    now[0] += 10
    at(first, 40)
    look = watch.look()
    assert look.left[first] == pytest.approx(30) and look.left[second] == pytest.approx(40)
    assert look.total == pytest.approx((30 + 40 + 50) / 2)
    now[0] += 20
    at(first, 10)  # begun again from an earlier checkpoint: what was seen before does not count
    assert watch.look().left == {}
    at(first, 20)
    now[0] += 10
    assert watch.look().left[first] == pytest.approx(80)
    for lock in locks:
        lock.release()


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_time_left_is_never_negative_whatever_the_clocks_do(jump: float, store: Store) -> None:
    now = [1000.0]
    (folder,) = runs(store, None)
    watch = Watch(store, lambda: now[0])
    with filelock.FileLock(folder / "run.lock"):
        for step in (10, 20, 120):  # beyond its end, as when the settings were changed
            now[0] += jump
            os.utime(at(folder, step) / "metrics.jsonl", (now[0] + 1e7, now[0] + 1e7))
            look = watch.look()
            assert all(left >= 0 for left in look.left.values())
            assert look.total is None or look.total >= 0


def test_damaged_notes_are_no_notes(store: Store) -> None:
    (folder,) = runs(store, None)
    checkpoint(at(folder, 10), 10, 5.0)
    (folder / "checkpoint-10" / MARKER).write_text('{"car')
    (folder / "checkpoint-tmp").mkdir()
    (folder / "checkpoint-tmp" / MARKER).write_text("{}")
    assert Watch(store).look().left == {}


def status(store: Store, terminal: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rankwise", "status", str(store.folder), "--watch"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    return subprocess.Popen(command, stdout=terminal, stderr=subprocess.PIPE, env=environment)


def test_on_a_terminal_the_table_stays_until_all_is_done(store: Store) -> None:
    first, second = runs(store, None, None)
    finish(store, store.config(first), 0.5)
    ours, theirs = pty.openpty()
    process = status(store, theirs)
    os.close(theirs)
    seen = b""

    def shows(text: bytes) -> bool:
        nonlocal seen
        seen += os.read(ours, 65536)
        return text in seen

    wait_for(lambda: shows(b"2 runs, 1 pending, 1 done"))
    assert process.poll() is None
    finish(store, store.config(second), 0.5)
    wait_for(lambda: shows(b"2 runs, 2 done"))
    read_to_the_end(ours)
    _, log = process.communicate(timeout=PATIENCE)
    os.close(ours)
    assert (process.returncode, log) == (0, b"")


def read_to_the_end(terminal: int) -> None:
    """Until the other end is closed: who writes to a terminal that nobody reads may wait for ever."""
    with suppress(OSError):
        while os.read(terminal, 65536):
            pass


def test_ctrl_c_ends_the_watch(store: Store) -> None:
    runs(store, None)
    ours, theirs = pty.openpty()
    process = status(store, theirs)
    os.close(theirs)
    wait_for(lambda: b"1 pending" in os.read(ours, 65536))
    process.send_signal(signal.SIGINT)
    read_to_the_end(ours)
    _, log = process.communicate(timeout=PATIENCE)
    os.close(ours)
    assert (process.returncode, log) == (130, b"")


def test_without_a_terminal_it_is_said_once(store: Store) -> None:
    runs(store, None)
    process = status(store, subprocess.PIPE)
    out, log = process.communicate(timeout=PATIENCE)
    assert (process.returncode, log) == (0, b"")
    assert out.decode().splitlines()[0] == f"{store.folder}: 1 run, 1 pending"


def test_runs_that_the_present_experiment_does_not_ask_for_are_not_waited_for(store: Store) -> None:
    done, left, asked = runs(store, None, None, None)
    finish(store, store.config(at(done, 100)), 0.5)
    checkpoint(at(left, 40), 30, 60.0)
    checkpoint(at(asked, 40), 30, 60.0)
    assert set(Watch(store).look().left) == {left, asked}  # no experiment is noted: somebody may ask for all
    store.note(Experiment(name="now", base={"task": "cola"}, vary={"seed": [0]}, runs="runs"))
    store.plan([done, asked])
    look = Watch(store).look()
    assert set(look.left) == {asked} and not look.over
    assert FOREIGN in look.rows()[0] + look.rows()[1]
    finish(store, store.config(asked), 0.5)
    look = Watch(store).look()
    assert look.over and look.total is None and "left" not in look.head()
    with filelock.FileLock(left / "run.lock"):  # whoever is at work is waited for
        assert not Watch(store).look().over
