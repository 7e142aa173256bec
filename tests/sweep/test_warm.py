"""Runs forked from a process that has imported what they need: what they leave, and what becomes of them.

Except in the large tests that process is forked itself, from the one of the tests.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import rankwise
import warm
from rankwise.runs.store import Store
from rankwise.sweep.compare import carry_out
from rankwise.sweep.runners.local import LOST, Local
from rankwise.sweep.runners.warm import Parent, possible
from runs import SIMPLEX, lines, make
from waiting import PATIENCE, alive, reached, wait_for, writers

pytestmark = pytest.mark.skipif(not possible(), reason="processes are forked on Linux alone")
FRESH = ("env", sys.executable, "-m", "rankwise", "train")
"""Another command than the default, with which a run is a process of its own."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    monkeypatch.setattr(subprocess, "Popen", warm.Popen)
    local = Local(2)
    yield local
    local.stop(0)
    local.close()


def is_forked(process: int) -> bool:
    """Whether a run is not a process of the command `rankwise train`."""
    return b"\0train\0" not in Path(f"/proc/{process}/cmdline").read_bytes()


def carried_out(local: Local, *folders: Path) -> None:
    """Carry out these runs, all of which succeed."""
    for folder in folders:
        local.start(folder)
    wait_for(lambda: all(process.poll() is not None for process in local._live.values()))
    assert {each.folder: (each.code, each.lost) for each in local.ended()} == dict.fromkeys(folders, (0, ""))


def assert_same(folder: Path, other: Path) -> None:
    """All that two runs leave is the same, except for what they cost."""
    names = [
        {str(each.relative_to(one)) for each in one.rglob("*") if each.is_file()} - {"log.txt"}
        for one in (folder, other)
    ]
    assert names[0] == names[1]
    for name in names[0] - {"result.json"}:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    results = [json.loads((one / "result.json").read_text()) for one in (folder, other)]
    for result in results:
        del result["cost"]
    assert results[0] == results[1]


def test_runs_are_forked_and_leave_what_a_process_of_its_own_does(local: Local, tmp_path: Path) -> None:
    one, two, alone = (make(tmp_path / name / "run", method=SIMPLEX) for name in ("one", "two", "alone"))
    local.start(one)
    process = local._live[one]
    assert process.begun() and is_forked(process.pid) and os.getsid(process.pid) == process.pid
    wait_for(lambda: process.poll() is not None)
    assert [(each.folder, each.code, each.lost) for each in local.ended()] == [(one, 0, "")]
    carried_out(local, two)
    warm.run([sys.executable, "-m", "rankwise", "train", str(alone)], stdout=subprocess.DEVNULL, check=True)
    assert_same(one, alone)
    assert_same(two, alone)
    assert "simplex-lora rank=4" in (one / "log.txt").read_text()


@pytest.mark.large
@pytest.mark.parametrize("threads", ["1", "2"])
def test_it_is_the_same_without_the_process_of_the_tests(
    threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr("rankwise.sweep.runners.local.cores", lambda: 2)
    folders = [make(tmp_path / name / "run", model=None, max_steps=4) for name in ("one", "two", "alone")]
    warmly, fresh = Local(1), Local(1, command=FRESH)
    carried_out(warmly, folders[0])
    carried_out(warmly, folders[1])
    warmly.close()
    carried_out(fresh, folders[2])
    for folder in folders[:2]:
        assert_same(folder, folders[2])
    assert json.loads((folders[0] / "env.json").read_text())["threads"] == int(threads)


def test_what_a_run_is_refused_for_is_in_its_log_and_its_code(local: Local, tmp_path: Path) -> None:
    wrong, right = make(tmp_path / "wrong", method={"name": "lora", "rank": 10**6}), make(tmp_path / "right")
    local.start(wrong)
    local.start(right)
    wait_for(lambda: all(process.poll() is not None for process in local._live.values()))
    assert {each.folder: each.code for each in local.ended()} == {wrong: 2, right: 0}
    assert (wrong / "log.txt").read_text().startswith("rankwise: ")


@pytest.mark.parametrize("missing", ["os.pidfd_open", "os.memfd_create", "signal.pidfd_send_signal"])
def test_a_python_that_was_built_on_an_older_system_forks_nothing(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(missing)
    assert not possible() and Local(1)._fork(tmp_path, {}) is None


@pytest.mark.large
def test_what_runs_draw_by_chance_differs(local: Local, tmp_path: Path) -> None:
    """Else two runs would read each other's files in the cache of `datasets`."""
    (tmp_path / "drawing.py").write_text(
        "import random, numpy\nfrom datasets.fingerprint import generate_random_fingerprint\n"
        "print(f'drawn {random.random()} {numpy.random.random()} {generate_random_fingerprint()}')\n"
    )
    folders = [make(tmp_path / name, max_steps=2, plugins=[str(tmp_path / "drawing.py")]) for name in ("one", "two")]
    carried_out(local, *folders)
    drawn = [
        line.split()[1:]
        for folder in folders
        for line in (folder / "log.txt").read_text().splitlines()
        if line.startswith("drawn ")
    ]
    assert len(drawn) == 2 and all(one != other for one, other in zip(*drawn, strict=True))


@pytest.mark.large
def test_a_killed_parent_takes_no_run_with_it(local: Local, tmp_path: Path) -> None:
    """The runs that it has forked go on, those that it has not are processes of their own."""
    folders = [
        make(tmp_path / name, max_steps=steps, seed=place)
        for place, (name, steps) in enumerate({"a": 80, "b": 80, "c": 2}.items())
    ]
    parents = list[int]()

    class Killing(Local):
        def ended(self):
            if self._parent and not parents and all(reached(folder, 2) for folder in folders[:2]):
                parents.append(self._parent._process.pid)
                os.kill(parents[0], signal.SIGKILL)
                os.kill(self._live[folders[1]].pid, signal.SIGKILL)
            return super().ended()

    console = io.StringIO()
    outcome = carry_out(Store(tmp_path), folders, Killing(2), Console(file=console, width=200))
    assert parents and not alive(parents[0])
    assert sorted(outcome.done) == folders, console.getvalue()
    assert console.getvalue().count(f"{LOST}; started again") == 1  # b alone, which was killed too
    assert [each["step"] for each in lines(folders[1] / "metrics.jsonl") if "loss" in each][-1] == 80


def test_a_run_that_is_killed_or_stopped_is_so_without_the_others(local: Local, tmp_path: Path) -> None:
    folders = [make(tmp_path / name, max_steps=200) for name in ("killed", "stopped")]
    for folder in folders:
        local.start(folder)
    wait_for(lambda: all(reached(folder, 2) for folder in folders))
    os.kill(local._live[folders[0]].pid, signal.SIGKILL)
    wait_for(lambda: local._live[folders[0]].poll() is not None)
    assert [(each.folder, each.code, each.lost) for each in local.ended()] == [(folders[0], -9, "")]
    local.stop(PATIENCE)
    assert [(each.folder, each.code, each.lost) for each in local.ended()] == [(folders[1], 75, "")]
    assert Store(tmp_path).state(folders[1]) == "stopped" and not writers(tmp_path)


def test_a_stop_before_the_imports_are_done_leaves_nothing(tmp_path: Path) -> None:
    """Here with a process that has to import them."""
    folder, local = make(tmp_path / "run"), Local(1)
    local.start(folder)
    assert local.running() == [folder] and local.ended() == []
    parent = local._parent._process
    local.stop(PATIENCE)
    assert parent.poll() == -signal.SIGKILL and not writers(tmp_path)
    assert [each.folder for each in local.ended()] == [folder]
    local.close()


def test_another_environment_folder_or_command_is_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: started.append(command[1:3]))
    parent = Parent(tmp_path, Local(1).environment())
    assert started == [["-m", "rankwise.warm"]]
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert parent.fork(tmp_path, 2, Local(1).environment()) is None
    monkeypatch.delenv("HF_HOME")
    monkeypatch.chdir(tmp_path)
    assert parent.fork(tmp_path, 2, Local(1).environment()) is None
    parent._orders.close()
    assert Local(1, command=FRESH)._fork(tmp_path, {}) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert Local(1)._fork(tmp_path, {}) is None


SITE = """
import sys, threading, time
if sys.orig_argv[1:3] == ["-m", "rankwise.warm"]:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""


@pytest.mark.large
@pytest.mark.parametrize("unsafe", ["thread", "code"])
def test_where_a_fork_is_not_safe_the_run_is_a_fresh_process(
    unsafe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the process that forks would be missing; code that has been edited would be the old one."""
    shutil.copytree(Path(rankwise.__file__).parent, tmp_path / "path" / "rankwise")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    if unsafe == "thread":
        (tmp_path / "path" / "sitecustomize.py").write_text(SITE)
    local = Local(1)
    first, second = (make(tmp_path / "runs" / name, max_steps=200) for name in ("first", "second"))
    for folder in (first, second):
        local.start(folder)
        process = local._live[folder]
        wait_for(lambda: reached(folder, 2) or process.poll() is not None)  # noqa: B023 - called at once
        assert is_forked(process.pid) == (unsafe == "code" and folder == first)
        with (tmp_path / "path" / "rankwise" / "train" / "run.py").open("a") as code:
            code.write("\nprint('edited', flush=True)\n")
        process.terminate()
        assert process.wait(PATIENCE) == 75, (folder / "log.txt").read_text()
    assert "edited" not in (first / "log.txt").read_text() and "edited" in (second / "log.txt").read_text()
    local.close()
