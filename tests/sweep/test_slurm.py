"""Sweeps through submitit: with its debug executor, and with a SLURM that only the commands of stand in for."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rankwise.errors import InputError
from rankwise.runs.store import Store
from rankwise.sweep.compare import carry_out
from rankwise.sweep.runners import runner
from rankwise.sweep.runners.process import Order, send, sent
from runs import make
from sweep_runs import check_told, runs, slurm_on_path, start, started
from waiting import PATIENCE, alive, reached, wait_for

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'rankwise[slurm]'")

TRAIN = f"command=[{sys.executable},-m,rankwise,train]"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the stand-in, whose commands are on the PATH."""
    home = slurm_on_path(tmp_path / "slurm", monkeypatch)
    yield home
    call("scancel", *(job.parent.name for job in home.glob("*/state")))
    wait_for(lambda: not call("squeue", "--array", "%i|%K|%j"))


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def job_of(folder: Path, slurm: Path) -> Path:
    """Where the stand-in keeps the job of a run."""
    note = sent(folder)
    index = "N/A" if note["index"] is None else str(note["index"])
    (found,) = [
        name.parent
        for name in slurm.glob("*/name")
        if name.read_text() == f"rankwise-{note['mark']}" and (name.parent / "index").read_text() == index
    ]
    return found


def count(slurm: Path) -> int:
    return len(list(slurm.glob("*/state")))


def busy(*folders: Path) -> Callable[[], bool]:
    return lambda: all(started(folder) for folder in folders)


@pytest.mark.parametrize("array", [pytest.param("false", marks=pytest.mark.large), "true"])
def test_what_becomes_of_a_run_is_told_as_on_this_machine(array: str, store: Store, slurm: Path) -> None:
    folders = runs(store, None, 2, 3, 4)
    out, log = start(store, "slurm", f"array={array}", "sbatch={constraint: fast}").communicate(timeout=PATIENCE)
    assert out.split() == ["1", "3", "0"], log
    check_told(store, folders)
    assert sorted(job.parent.name for job in slurm.glob("*/state"))[0] == ("100_0" if array == "true" else "100")
    script = (job_of(folders[1], slurm) / "script").read_text()
    assert "#SBATCH --constraint=fast" in script and "#SBATCH --cpus-per-task=1" in script


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.large)]
)
def test_a_sweep_that_is_told_to_stop_leaves_no_job(
    number: signal.Signals, code: int, store: Store, slurm: Path
) -> None:
    folders = runs(store, 6, 6, 6)
    sweep = start(store, "slurm", "jobs=2")
    wait_for(lambda: sum(map(bool, map(started, folders))) == 2 or sweep.poll() is not None)
    at_work = [folder for folder in folders if started(folder)]
    (slurm / "hold").touch()
    sweep.send_signal(number)
    _, log = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == code, log
    assert "Traceback" not in log
    assert not call("squeue", "--array", "%i|%K|%j")
    assert not any(alive(each) for folder in folders for each in started(folder))
    assert all((folder / "checkpoint-1").exists() for folder in at_work)


def test_a_job_that_waits_in_the_queue_is_cancelled_with_its_sweep(store: Store, slurm: Path) -> None:
    runs(store, None, None)
    (slurm / "hold").touch()
    sweep = start(store, "slurm")
    wait_for(lambda: count(slurm) == 2 or sweep.poll() is not None)
    sweep.send_signal(signal.SIGTERM)
    _, log = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 75, log
    assert [state.read_text() for state in slurm.glob("*/state")] == ["CANCELLED by 0"] * 2


@pytest.mark.large
@pytest.mark.parametrize("array", ["false", "true"])
def test_what_a_killed_sweep_left_in_the_queue_is_not_submitted_again(array: str, store: Store, slurm: Path) -> None:
    """Of two jobs one waits and one is at work when the sweep is killed by -9; the same call takes both over."""
    first, second = runs(store, 6, None)
    options = ("slurm", f"array={array}")
    (slurm / "hold").touch()
    sweep = start(store, *options)
    wait_for(lambda: len(list(store.folder.glob(".slurm/*_submitted.pkl"))) == 2 or sweep.poll() is not None)
    sweep.kill()
    sweep.communicate()

    again = start(store, *options)
    assert again.stderr is not None
    wait_for(lambda: "0/2 runs" in again.stderr.readline())  # a second in
    assert count(slurm) == 2 and not started(first) and not started(second)
    (slurm / "hold").unlink()
    wait_for(busy(first, second))
    again.kill()
    again.communicate()
    assert alive(started(first)[0])

    last = start(store, *options)
    wait_for(lambda: store.state(second) == "done")
    call("scancel", "--signal=USR2", job_of(first, slurm).name)
    out, log = last.communicate(timeout=PATIENCE)
    assert out.split() == ["2", "0", "0"], log
    assert (len(started(first)), len(started(second)), count(slurm)) == (2, 1, 3)


@pytest.mark.large
def test_a_job_left_by_a_sweep_that_was_killed_while_it_submitted_gives_way(store: Store, slurm: Path) -> None:
    (folder,) = runs(store, None)
    (slurm / "hold").touch()
    sweep = start(store, "slurm")
    wait_for(lambda: bool(list(store.folder.glob(".slurm/*_submitted.pkl"))) or sweep.poll() is not None)
    sweep.kill()
    sweep.communicate()
    (store.folder / ".slurm" / "100_submitted.pkl").unlink()  # which comes to its place after the job is in the queue
    sweep = start(store, "slurm")
    wait_for(lambda: count(slurm) == 2 or sweep.poll() is not None)
    (slurm / "hold").unlink()
    out, log = sweep.communicate(timeout=PATIENCE)
    assert out.split() == ["1", "0", "0"], log
    assert (slurm / "100" / "state").read_text() == "CANCELLED by 0" and len(started(folder)) == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("USR2", "the time of its job 100 was up"),
        pytest.param("TERM", "its job 100 had to make room", marks=pytest.mark.large),
    ],
)
def test_a_run_whose_time_is_up_or_that_is_preempted_goes_on_in_another_job(
    how: str, said: str, store: Store, slurm: Path
) -> None:
    (folder,) = runs(store, 6)
    sweep = start(store, "slurm")
    wait_for(lambda: busy(folder)() or sweep.poll() is not None)
    call("scancel", f"--signal={how}", "100")
    out, log = sweep.communicate(timeout=PATIENCE)
    assert out.split() == ["1", "0", "0"], log
    assert f"{said}; started again" in log
    assert (folder / "checkpoint-1").exists() and len(started(folder)) == 2 and count(slurm) == 2


def test_a_run_whose_node_dies_goes_on_in_another_job(store: Store, slurm: Path) -> None:
    (folder,) = runs(store, 6)
    sweep = start(store, "slurm")
    wait_for(lambda: busy(folder)() or sweep.poll() is not None)
    (folder / "checkpoint-1").mkdir()
    (slurm / "100" / "node-dies").touch()
    out, log = sweep.communicate(timeout=PATIENCE)
    assert out.split() == ["1", "0", "0"], log
    assert "its job 100 ended without a result (NODE_FAIL); started again" in log
    assert not alive(started(folder)[0]) and len(started(folder)) == 2


@pytest.mark.large
def test_a_run_that_takes_its_node_with_it_each_time_fails(store: Store, slurm: Path) -> None:
    (folder,) = runs(store, 1)
    sweep = start(store, "slurm")
    for tries in range(1, 5):
        wait_for(lambda tries=tries: len(started(folder)) == tries or sweep.poll() is not None)  # type: ignore[misc]
        (job_of(folder, slurm) / "node-dies").touch()
    out, log = sweep.communicate(timeout=PATIENCE)
    assert out.split() == ["0", "1", "0"], log
    assert "ended without a result (NODE_FAIL)" in store.standing(folder).error


def test_a_job_cancelled_by_its_owner_is_neither_done_nor_failed(store: Store, slurm: Path) -> None:
    folders = runs(store, 1, None)
    sweep = start(store, "slurm")
    wait_for(lambda: busy(*folders)() or sweep.poll() is not None)
    call("scancel", job_of(folders[0], slurm).name)
    out, log = sweep.communicate(timeout=PATIENCE)
    assert out.split() == ["1", "0", "1"], log
    assert store.state(folders[0]) == "stopped"


@pytest.mark.large
def test_a_controller_that_is_down_for_a_while_harms_nothing(store: Store, slurm: Path) -> None:
    (folder,) = runs(store, 6)
    sweep = start(store, "slurm")
    wait_for(lambda: busy(folder)() or sweep.poll() is not None)
    (slurm / "down").touch()
    assert sweep.stderr is not None
    wait_for(lambda: "0/1 runs" in sweep.stderr.readline())  # a second in
    (slurm / "down").unlink()
    call("scancel", "--signal=USR2", "100")
    out, log = sweep.communicate(timeout=PATIENCE)
    assert out.split() == ["1", "0", "0"], log
    assert len(started(folder)) == 2

    (other,) = [each for each in runs(store, 6, 6) if each != folder]
    send(Order(other, ("true",), 1, 1.0))  # as if it had been submitted
    (slurm / "down").touch()
    _, log = start(store, "slurm").communicate(timeout=PATIENCE)
    assert "squeue does not answer, so which runs are in the queue is unknown" in log.strip().splitlines()[-1]
    assert not started(other)
    (slurm / "down").unlink()


def test_what_the_cluster_refuses_is_one_line(store: Store, slurm: Path) -> None:
    runs(store, None)
    _, log = start(store, "slurm", "partition=nowhere").communicate(timeout=PATIENCE)
    last = log.strip().splitlines()[-1]
    assert "InputError: sbatch did not take the job: sbatch: error: invalid partition specified: nowhere" in last


@pytest.mark.large
def test_a_node_that_cannot_carry_out_runs_ends_the_sweep_in_one_line(store: Store, slurm: Path) -> None:
    runs(store, None)
    _, log = start(store, "slurm", "command=[no-such-program]").communicate(timeout=PATIENCE)
    last = log.strip().splitlines()[-1]
    assert last.endswith("cannot start no-such-program in this folder: No such file or directory")
    assert last.startswith("rankwise.errors.InputError: ") and f": node {socket.gethostname()} " in last


@pytest.mark.large
def test_a_node_where_rankwise_cannot_be_imported_ends_the_sweep_in_one_line(
    store: Store, slurm: Path, tmp_path: Path
) -> None:
    runs(store, None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "rankwise.py").write_text("raise ImportError('not on this node')\n")
    _, log = start(store, "slurm", f"setup=[export PYTHONPATH={tmp_path / 'broken'}]").communicate(timeout=PATIENCE)
    assert log.strip().splitlines()[-1].endswith("cannot carry out runs: ImportError: not on this node")


def test_without_slurm_it_is_one_line(store: Store) -> None:
    with pytest.raises(InputError, match="srun is not on the PATH"):
        carry_out(store, runs(store, None), runner("slurm"))


def test_without_a_cluster_the_debug_executor_carries_runs_out_here(store: Store) -> None:
    folders = runs(store, None, 4)
    out, log = start(store, "slurm", "executor=debug").communicate(timeout=PATIENCE)
    assert out.split() == ["1", "1", "0"], log
    assert [store.state(folder) for folder in folders] == ["done", "failed"]


def test_a_debug_sweep_is_told_to_stop(store: Store) -> None:
    folders = runs(store, 6, 6)
    sweep = start(store, "slurm", "executor=debug")
    wait_for(lambda: busy(folders[0])() or sweep.poll() is not None)
    sweep.send_signal(signal.SIGINT)
    _, log = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 130, log
    assert (folders[0] / "checkpoint-1").exists() and not started(folders[1])
    assert not alive(started(folders[0])[0])


@pytest.mark.large
def test_a_real_run_goes_on_after_the_notice(tmp_path: Path, slurm: Path) -> None:
    """SIGUSR2 reaches all processes of the job, as under SLURM; the run itself must not die of it."""
    folder = make(tmp_path / "runs" / "run", model=None, max_steps=40, checkpoint_every=40)
    sweep = start(Store(folder.parent), "slurm", TRAIN)
    wait_for(lambda: reached(folder, 3) or sweep.poll() is not None)
    call("scancel", "--signal=USR2", "100")
    out, log = sweep.communicate(timeout=PATIENCE)
    assert out.split() == ["1", "0", "0"], log
    assert "the time of its job 100 was up; started again" in log
    assert "stopped after step" in (folder / "log.txt").read_text()
