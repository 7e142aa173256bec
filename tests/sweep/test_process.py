"""A run on a node, without a cluster around it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.processes.stop import this_process
from rankwise.runs.store import Store
from rankwise.sweep.runners.process import Order, carry, send
from sweep_runs import WORKER, runs, started
from waiting import PATIENCE, alive, wait_for


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_a_node_that_does_not_see_the_folder_says_so(store: Store) -> None:
    (folder,) = runs(store, None)
    order = Order(folder, tuple(WORKER), 1, 1.0, patience=0.2)
    assert carry(order).problem.startswith("cannot see this folder; all nodes need one file system")
    send(Order(folder, tuple(WORKER), 1, 1.0))  # another copy of the folder, whatever else lies in it
    assert carry(order).problem and not started(folder)
    send(order)
    send(Order(folder, tuple(WORKER), 1, 1.0))  # another sweep in the same folder
    assert carry(order).problem == "" and store.state(folder) == "done"
    wrong = Order(folder, ("no-such-program",), 1, 1.0)
    send(wrong)
    assert carry(wrong).problem == "cannot start no-such-program in this folder: No such file or directory"


def test_a_run_finds_its_threads_and_what_the_sweep_says_in_its_environment(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = runs(store, None)
    monkeypatch.setenv("RANKWISE_DATA", "/where/the/sweep/has/it")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    show = ("sh", "-c", 'env > "$1/env"', "sh")
    order = Order(folder, show, threads=3, grace=1.0, more={"CUDA_VISIBLE_DEVICES": ""})
    monkeypatch.delenv("RANKWISE_DATA")  # as on a node
    send(order)
    assert carry(order).code == 0
    found = dict(line.split("=", 1) for line in (folder / "env").read_text().splitlines() if "=" in line)
    assert found["RANKWISE_DATA"] == "/where/the/sweep/has/it"
    assert (found["OMP_NUM_THREADS"], found["CUDA_VISIBLE_DEVICES"]) == ("3", "")
    assert found["RANKWISE_PARENT"] == this_process()


ON_A_NODE = """
import pathlib, sys
from rankwise.sweep.runners.process import Order, carry, send
order = Order(pathlib.Path(sys.argv[1]), tuple(sys.argv[2:]), 1, 30.0)
send(order)
over = carry(order)
print(over.code, over.signal)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL])
def test_what_ends_a_node_ends_its_run(number: signal.Signals, store: Store) -> None:
    (folder,) = runs(store, 1)
    command = [sys.executable, "-c", ON_A_NODE, str(folder), *WORKER]
    node = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: bool(started(folder)) or node.poll() is not None)
    (run,) = started(folder)
    os.kill(run, signal.SIGUSR2)  # SLURM sends it to all processes of a job; it is none of the run's business
    node.send_signal(number)
    out, _ = node.communicate(timeout=PATIENCE)
    wait_for(lambda: not alive(run))
    if number == signal.SIGUSR2:
        assert out.split() == ["75", str(int(signal.SIGUSR2))]
    assert (folder / "checkpoint-1").exists() == (number != signal.SIGKILL)
