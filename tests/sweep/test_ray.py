"""Sweeps on a real Ray cluster of two nodes, both on this machine, of which one is killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rankwise.runs.store import Store
from runs import make
from sweep_runs import SCRIPTS, SUPPORT, chain, check_told, runs, start, started, tuned
from waiting import PATIENCE, alive, reached, wait_for

pytest.importorskip("ray", reason="Ray is not installed: pip install 'rankwise[ray]'")


class Cluster:
    """One node, to which others can be added."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, str(SCRIPTS / "cluster.py")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.address = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def add(self) -> "Node":
        """One more node of one CPU."""
        assert self.process.stdin is not None
        self.process.stdin.write("add\n")
        self.process.stdin.flush()
        return Node(self._answer())


@dataclass(frozen=True)
class Node:
    """The processes that a node was started with."""

    own: list[int]

    def processes(self) -> list[psutil.Process]:
        """All that runs there now, the runs among it."""
        found = [psutil.Process(each) for each in self.own if alive(each)]
        return [*found, *(child for each in found for child in each.children(recursive=True))]

    def kill(self) -> None:
        for each in self.processes():
            with suppress(psutil.NoSuchProcess):
                each.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        yield made
    finally:
        made.process.communicate()


@pytest.fixture
def second(cluster: Cluster) -> Iterator[Node]:
    """A second node, which the test may kill."""
    node = cluster.add()
    yield node
    node.kill()


def said(folder: Path) -> dict[str, Any]:
    """What a finished run says that does not depend on when and where it ran."""
    result = json.loads((folder / "result.json").read_text())
    del result["cost"]
    return {**result, "metrics.jsonl": (folder / "metrics.jsonl").read_text()}


@pytest.mark.large
def test_the_runs_of_a_node_that_dies_go_on_elsewhere(cluster: Cluster, second: Node, tmp_path: Path) -> None:
    """Real runs. All processes of one node are killed by -9 while a run there is in the midst of its training."""
    for seed in (0, 1):
        make(tmp_path / "ray" / f"run-{seed}", model=None, seed=seed, max_steps=20)
    train = f"command=[{sys.executable},-m,rankwise,train]"
    sweep = start(Store(tmp_path / "ray"), "ray", f"address={cluster.address}", train)

    def there() -> list[Path]:
        """The run at work on the second node, once it has a checkpoint behind it."""
        commands = [each.cmdline() for each in second.processes() if alive(each.pid)]
        folders = [Path(command[-1]) for command in commands if "train" in command]
        return [folder for folder in folders if reached(folder, 5)]

    wait_for(lambda: bool(there()) or sweep.poll() is not None)
    (cut,) = there()
    second.kill()
    out, log = sweep.communicate(timeout=PATIENCE)
    assert out.split() == ["2", "0", "0"], log
    assert "its node or its worker there died" in log and "started again" in log

    seed = int(cut.name.removeprefix("run-"))
    alone = make(tmp_path / "local" / "run", model=None, seed=seed, max_steps=20)
    out, log = start(Store(alone.parent), "local", "jobs=1", train).communicate(timeout=PATIENCE)
    assert out.split() == ["1", "0", "0"], log
    assert said(cut) == said(alone)


@pytest.mark.large
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_sweep_that_ends_leaves_no_worker(
    number: signal.Signals, code: int, cluster: Cluster, second: Node, tmp_path: Path
) -> None:
    store = Store(tmp_path / "runs")
    folders = runs(store, 6, 6, 6, None)
    options = ("ray", f"address={cluster.address}")
    sweep = start(store, *options)
    wait_for(lambda: sum(len(started(folder)) for folder in folders) >= 2 or sweep.poll() is not None)
    workers = [each for folder in folders for each in started(folder)]
    sweep.send_signal(number)
    _, log = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == code, log
    assert "Traceback" not in log
    wait_for(lambda: not any(alive(each) for each in workers))
    busy = [folder for folder in folders if started(folder)]
    assert len(busy) == 2
    if number != signal.SIGKILL:
        assert all((folder / "checkpoint-1").exists() for folder in busy)

    for folder in folders:
        (folder / "checkpoint-1").mkdir(exist_ok=True)
    out, log = start(store, *options).communicate(timeout=PATIENCE)
    assert out.split() == ["4", "0", "0"], log


@pytest.mark.large
def test_what_becomes_of_a_run_is_told_as_on_this_machine(cluster: Cluster, second: Node, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    folders = runs(store, None, 2, 3, 4)
    out, log = start(store, "ray", f"address={cluster.address}").communicate(timeout=PATIENCE)
    assert out.split() == ["1", "3", "0"], log
    check_told(store, folders)


@pytest.mark.large
def test_a_node_that_cannot_carry_out_runs_ends_the_sweep_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    runs(store, None)
    sweep = start(store, "ray", f"address={cluster.address}", "command=[no-such-program]")
    _, log = sweep.communicate(timeout=PATIENCE)
    last = log.strip().splitlines()[-1]
    assert last.endswith("cannot start no-such-program in this folder: No such file or directory")
    assert last.startswith("rankwise.errors.InputError: ")


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    runs(store, None)
    sweep = start(store, "ray", "address=127.0.0.1:1")
    _, log = sweep.communicate(timeout=PATIENCE)
    assert "InputError: Ray cluster 127.0.0.1:1: cannot be reached: " in log.strip().splitlines()[-1]


@pytest.mark.large
def test_two_sweeps_in_one_folder_share_the_runs_chains_among_them(
    cluster: Cluster, second: Node, tmp_path: Path
) -> None:
    """Both send all their runs to the cluster at once; each run is carried out once, none before the one it follows."""
    store = Store(tmp_path / "runs")
    before, after = chain(store, None, None)
    folders = {before, after, *runs(store, None, None)}
    both = [start(store, "ray", f"address={cluster.address}") for _ in range(2)]
    for sweep in both:
        out, log = sweep.communicate(timeout=PATIENCE)
        assert out.split() == [str(len(folders)), "0", "0"], log
    assert [len(started(folder)) for folder in folders] == [1] * len(folders)
    assert (before / "result.json").stat().st_mtime_ns <= (after / "started").stat().st_mtime_ns


@pytest.mark.large
def test_rates_are_tried_on_a_cluster_and_the_chosen_one_is_carried_out_there(tmp_path: Path) -> None:
    """Two phases, and so twice a cluster of this machine alone."""
    experiment = {
        "name": "tuned",
        "base": {"task": {"name": "cola"}, "max_steps": 5},
        "vary": {"seed": [0], "method": [{"name": "lora"}]},
        "tune": {"learning_rate": [1e-3, 5.0], "seeds": [7]},
        "runs": str(tmp_path),
    }
    out, log = tuned(experiment, "ray").communicate(timeout=PATIENCE)
    done, failed, shown = json.loads(out.splitlines()[-1])
    assert (len(done), failed, len(shown)) == (2, [], 3), log
    assert "learning rate 0.001 of 1 tried" in log
    assert {result.seed for result in Store(tmp_path).results()} == {0, 7}
