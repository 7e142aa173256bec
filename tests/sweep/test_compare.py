"""Sweeps that are crashed, stopped and killed. The workers stand in for the training; `test_cli.py` has a real one."""

import io
import os
import signal
from pathlib import Path

import filelock
import pytest
from rich.console import Console

from rankwise.errors import InputError
from rankwise.processes.stop import this_process
from rankwise.runs.store import Store
from rankwise.sweep.compare import Outcome, carry_out
from rankwise.sweep.runners.local import Local
from runs import REVISION, config, finish
from sweep_runs import WORKER, chain, check_told, runs, start, started
from waiting import PATIENCE, alive, wait_for


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def runner(jobs: int = 2) -> Local:
    return Local(jobs, command=tuple(WORKER))


def sweep(store: Store, folders: list[Path], jobs: int = 2) -> tuple[Outcome, str]:
    log = io.StringIO()
    return carry_out(store, folders, runner(jobs), Console(file=log)), log.getvalue()


def test_every_run_is_carried_out_and_a_crash_takes_nothing_with_it(store: Store) -> None:
    folders = runs(store, None, 2, 3, 4, None)
    outcome, log = sweep(store, folders)
    assert sorted(outcome.done) == sorted([folders[0], folders[4]])
    assert sorted(outcome.failed) == sorted(folders[1:4])
    assert "failed: cola lora rate 0.001 seed 1: the loss is not finite" in log
    check_told(store, folders[:4])
    assert log.splitlines()[-1] == "5/5 runs, 3 failed"
    assert all((folder / "log.txt").exists() for folder in folders)


def test_what_is_done_is_left_alone_and_the_rest_is_carried_out(store: Store) -> None:
    folders = runs(store, None, 2, None)
    finish(store, store.config(folders[0]), 0.9)
    before = (folders[0] / "result.json").stat().st_mtime_ns
    sweep(store, folders)
    outcome, log = sweep(store, folders)
    assert "2 of 3 runs are done already" in log
    assert len(outcome.done) == 2
    assert [len(started(folder)) for folder in folders] == [0, 2, 1]
    assert (folders[0] / "result.json").stat().st_mtime_ns == before


def test_a_damaged_result_is_made_again(store: Store) -> None:
    folders = runs(store, None)
    (folders[0] / "result.json").write_text('{"run": "')
    outcome, _ = sweep(store, folders)
    assert outcome.done == folders
    assert store.result(folders[0]) is not None


def test_no_more_runs_at_once_than_jobs_and_the_cores_are_divided(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("rankwise.sweep.runners.local.cores", lambda: 7)
    folders = runs(store, None, None)
    sweep(store, folders, jobs=3)
    assert [(folder / "started").read_text().split()[1] for folder in folders] == ["2", "2"]
    environment = runner(2).environment()
    threads = {environment[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    assert threads == {"3"}
    assert environment["RANKWISE_PARENT"] == this_process()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = runner(2).environment()
    assert (environment["MKL_NUM_THREADS"], environment["TOKENIZERS_PARALLELISM"]) == ("1", "false")


@pytest.mark.large
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_sweep_that_is_told_to_stop_stops_its_workers_and_goes_on_later(
    number: signal.Signals, code: int, store: Store
) -> None:
    folders = runs(store, 1, 1, None)
    process = start(store, "local", "jobs=2")
    wait_for(lambda: sum(len(started(folder)) for folder in folders) >= 2)
    workers = [each for folder in folders for each in started(folder)]
    process.send_signal(number)
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert "they write a checkpoint first" in log
    assert "Traceback" not in log
    assert log.splitlines()[-1] == "stopped with 0 of 3 runs done; the same command goes on with the others"
    assert not any(alive(each) for each in workers)
    assert sorted(store.state(folder) for folder in folders[:2]) == ["stopped", "stopped"]
    assert (folders[0] / "checkpoint-1").exists()


def test_a_killed_sweep_leaves_no_worker_and_the_same_call_goes_on(store: Store) -> None:
    folders = runs(store, None, 1)
    process = start(store, "local", "jobs=2")
    wait_for(lambda: store.state(folders[0]) == "done" and bool(started(folders[1])))
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(each) for each in started(folders[1])))
    assert store.state(folders[1]) == "stopped"
    finish(store, store.config(folders[1]), 0.5)
    outcome, _ = sweep(store, folders)
    assert sorted(outcome.done) == sorted(folders)


def test_a_worker_that_will_not_stop_is_killed_with_its_children(store: Store) -> None:
    (folder,) = runs(store, 5)
    local = runner(1)
    local.start(folder)
    wait_for(lambda: (folder / "child").exists() and (folder / "child").read_text().endswith("\n"))
    local.stop(grace=0.1)
    processes = [*started(folder), int((folder / "child").read_text())]
    wait_for(lambda: not any(alive(each) for each in processes))
    assert [(each.folder, each.code) for each in local.ended()] == [(folder, -signal.SIGKILL)]


def test_a_worker_stopped_from_outside_is_neither_done_nor_failed(store: Store) -> None:
    (folder,) = runs(store, 1)
    process = start(store, "local", "jobs=2")
    wait_for(lambda: bool(started(folder)))
    os.kill(started(folder)[0], signal.SIGTERM)
    out, _ = process.communicate(timeout=PATIENCE)
    assert out.split() == ["0", "0", "1"]
    assert store.state(folder) == "stopped"


@pytest.mark.large
def test_two_sweeps_in_one_folder_share_the_runs(store: Store) -> None:
    folders = runs(store, *[None] * 6)
    both = [start(store, "local", "jobs=2"), start(store, "local", "jobs=2")]
    for process in both:
        out, log = process.communicate(timeout=PATIENCE)
        assert out.split() == ["6", "0", "0"], log
    assert [len(started(folder)) for folder in folders] == [1] * 6


class Overtaken(Local):
    """Another sweep carries out a run while this one is at work on the one before."""

    def start(self, folder: Path) -> None:
        super().start(folder)
        store = Store(folder.parent)
        for other in store.folders():
            if other != folder:
                finish(store, store.config(other), 0.5)


def test_a_run_that_another_sweep_has_done_meanwhile_is_not_started(store: Store) -> None:
    first, second = runs(store, None, None)
    outcome = carry_out(store, [first, second], Overtaken(1, command=tuple(WORKER)), Console(file=io.StringIO()))
    assert set(outcome.done) == {first, second}
    assert not (second / "log.txt").exists()


def test_a_run_that_another_process_holds_is_waited_for(store: Store) -> None:
    (folder,) = runs(store, None)
    lock = filelock.FileLock(folder / "run.lock")
    lock.acquire()
    process = start(store, "local", "jobs=2")
    assert process.stderr is not None
    assert "another process is at work on it; waiting for it" in process.stderr.readline()
    lock.release()
    out, _ = process.communicate(timeout=PATIENCE)
    assert out.split() == ["1", "0", "0"]


def test_a_folder_that_cannot_be_written_to_ends_the_sweep_in_one_line(store: Store) -> None:
    first, second = runs(store, None, None)
    (second / "log.txt").mkdir()  # stands for a folder that takes no file; root may write anywhere
    with pytest.raises(InputError, match="cannot be written to: is a directory"):
        sweep(store, [first, second])
    assert store.state(second) == "pending"


def test_a_run_that_begins_with_another_waits_for_it(store: Store) -> None:
    folders = chain(store, None, None, None)
    outcome, _ = sweep(store, folders[::-1], jobs=3)
    assert set(outcome.done) == set(folders)
    times = [(folder / "started").stat().st_mtime_ns for folder in folders]
    ends = [(folder / "result.json").stat().st_mtime_ns for folder in folders]
    assert ends[0] <= times[1] and ends[1] <= times[2]


def test_what_follows_a_failed_run_fails_with_it_and_goes_on_with_it(store: Store) -> None:
    folders = chain(store, None, 2, None)
    outcome, log = sweep(store, folders)
    assert outcome.done == folders[:1] and set(outcome.failed) == set(folders[1:])
    assert "the run that it begins with is not done" in log
    assert folders[1].name in (folders[2] / "error.txt").read_text()
    assert not (folders[2] / "started").exists()
    finish(store, config(max_steps=6, train_rows=2, after=config(max_steps=5).id), 0.5)
    assert sweep(store, folders[2:])[0].done == folders[2:]


def test_a_chain_without_its_beginning_is_refused(store: Store) -> None:
    lost = store.create(config(after="0" * 64), REVISION)
    with pytest.raises(InputError, match="run the whole chain there"):
        sweep(store, [lost])
