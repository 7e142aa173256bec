"""Runs that are cut off, for real, and what becomes of them. Each is compared with the same run left alone.

Where it matters at which step, the model is MiniLM, whose steps take long enough to be met.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

import warm
from rankwise.files import MARKER
from rankwise.processes.stop import this_process
from rankwise.runs.store import Store
from rankwise.train.checkpoint_files import last_complete
from runs import LORA, SIMPLEX, make, start
from waiting import PATIENCE, alive, reached, wait_for


def cut(folder: Path, step: int, how: signal.Signals) -> int:
    """Start the run, send it a signal once it has done `step`, and return its exit status."""
    process = start(folder)
    wait_for(lambda: reached(folder, step) or process.poll() is not None)
    process.send_signal(how)
    return process.wait(PATIENCE)


def newest(folder: Path) -> int:
    """The step of the newest complete checkpoint, -1 for none."""
    found = last_complete(folder)
    return int(found[0].name.removeprefix("checkpoint-")) if found else -1


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def result(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "result.json").read_text())
    del found["cost"]
    return found


def assert_same(folder: Path, other: Path) -> None:
    """Every file that two runs of one configuration must share is the same."""
    assert result(folder) == result(other)
    adapter = ("adapter_model.safetensors", "use.json", "tokenizer.json", "README.md")
    for name in ("metrics.jsonl", "ranks.jsonl", *(f"adapter/{file}" for file in adapter)):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    tables = [pyarrow.parquet.read_table(each / "predictions.parquet") for each in (folder, other)]
    assert tables[0].equals(tables[1])


@pytest.mark.large
def test_a_run_killed_and_stopped_within_epochs_ends_as_the_uncut_one(tmp_path: Path) -> None:
    """Killed by -9 within the search, told to stop by SIGTERM near the end of it; both in the middle of an epoch."""
    alone, folder = (make(tmp_path / name, model=None, method=SIMPLEX) for name in ("alone", "run"))
    undisturbed = start(alone)
    assert cut(folder, 5, signal.SIGKILL) == -signal.SIGKILL
    assert newest(folder) == 3
    assert not (folder / "result.json").exists()

    assert cut(folder, 7, signal.SIGTERM) == 75
    assert newest(folder) == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert not (folder / "error.txt").exists()

    assert start(folder).wait(PATIENCE) == 0, log(folder)
    assert undisturbed.wait(PATIENCE) == 0, log(alone)
    assert_same(folder, alone)

    # Had the ranks stood still, the above would prove little.
    lines = [json.loads(line) for line in (alone / "ranks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6, 9]
    assert lines[0]["ranks"] != lines[1]["ranks"] != lines[2]["ranks"]
    assert ["weights" in line for line in lines] == [True, True, True, False]
    assert set(lines[1]["weights"]) == set(lines[1]["ranks"])


@pytest.mark.large
def test_a_run_of_plain_lora_killed_ends_as_the_uncut_one(tmp_path: Path) -> None:
    """It ends in a new interpreter; most other tests fork theirs."""
    alone, folder = (make(tmp_path / name, model=None, method=LORA) for name in ("alone", "run"))
    undisturbed = start(alone)
    assert cut(folder, 8, signal.SIGKILL) == -signal.SIGKILL
    assert newest(folder) == 6
    assert start(folder, fresh=True).wait(PATIENCE) == 0, log(folder)
    assert undisturbed.wait(PATIENCE) == 0, log(alone)
    assert_same(folder, alone)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_a_line(tmp_path: Path) -> None:
    """The limit on the size of a file fails writes as a full disk does: with an OSError, in the midst of a file."""
    folder = make(tmp_path / "run", model=None, max_steps=40)
    process = start(folder)
    wait_for(lambda: (folder / "checkpoint-3" / MARKER).exists() or process.poll() is not None)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert process.wait(PATIENCE) == 1
    error = (folder / "error.txt").read_text().splitlines()
    assert error[0] and "Traceback" in error[2]
    assert newest(folder) >= 3
    assert not (folder / "result.json").exists()


PARENT = """
import os, subprocess, sys, time
from rankwise.processes.stop import this_process
environment = {**os.environ, "RANKWISE_PARENT": this_process(), "OMP_NUM_THREADS": "1"}
command = [*sys.argv[2:], sys.executable, "-m", "rankwise", "train", sys.argv[1]]
worker = subprocess.Popen(command, env=environment, stdout=2)
print(worker.pid, flush=True)
time.sleep(3600)
"""


BETWEEN = [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"]


@pytest.mark.parametrize("through", [[], BETWEEN], ids=["", "another process"])
def test_a_worker_ends_with_its_parent_and_leaves_a_checkpoint(through: list[str], tmp_path: Path) -> None:
    """The parent is killed by -9, so it cannot tell its worker anything, nor what it has started in between."""
    folder = make(tmp_path / "run", max_steps=200, checkpoint_every=200)
    with (folder / "log.txt").open("wb") as log:
        command = [sys.executable, "-c", PARENT, str(folder), *through]
        parent = warm.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        worker = int(parent.stdout.readline())
        wait_for(lambda: reached(folder, 2) or not alive(worker))
    finally:
        parent.kill()
        parent.communicate()
    wait_for(lambda: not alive(worker))
    assert 2 <= newest(folder) < 200, (folder / "log.txt").read_text()


APART = """
import ctypes, os, subprocess, sys
assert ctypes.CDLL(None).unshare(0x20020000) == 0  # CLONE_NEWPID and CLONE_NEWNS
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
from rankwise.cli import main
main()
"""


@pytest.mark.large
def test_a_worker_that_cannot_see_its_parent_goes_on(tmp_path: Path) -> None:
    """As in a container with process ids of its own, where the parent's is nobody's, or another's."""
    able = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    if able.returncode:
        pytest.skip(f"needs a PID namespace: {able.stderr.strip()}")
    folder = make(tmp_path / "run", max_steps=2)
    environment = {**os.environ, "RANKWISE_PARENT": this_process(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", APART, "train", str(folder)]
    done = warm.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_worker_on_another_machine_goes_on(elsewhere: bool, tmp_path: Path) -> None:
    """As through srun or ssh; there the process of this number is another, or none, as here."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    parent = this_process().replace(f"{os.getpid()}:", f"{gone.pid}:").replace(boot, boot[::-1] if elsewhere else boot)
    folder = make(tmp_path / "run", max_steps=2 if elsewhere else 2_000)
    environment = {**os.environ, "RANKWISE_PARENT": parent, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rankwise", "train", str(folder)]
    done = warm.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == (0 if elsewhere else 75), done.stderr


def test_an_interrupt_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", max_steps=200)
    assert cut(folder, 4, signal.SIGINT) == 130
    assert newest(folder) >= 3
    assert not (folder / "error.txt").exists()


@pytest.mark.large
def test_a_run_killed_while_it_finishes_ends_as_the_uncut_one(tmp_path: Path) -> None:
    """Killed by -9 as each file of its end appears. Nothing but result.json says that it is done."""
    alone, folder = (make(tmp_path / name, model=None, method=SIMPLEX) for name in ("alone", "run"))
    undisturbed = start(alone)
    for name in ("predictions.parquet", "adapter"):
        process = start(folder)
        wait_for(lambda name=name, process=process: (folder / name).exists() or process.poll() is not None)  # type: ignore[misc]
        process.kill()
        process.wait(PATIENCE)
        if Store(tmp_path).result(folder) is None:
            assert newest(folder) == 9
            assert Store(tmp_path).state(folder) == "stopped"
    assert start(folder).wait(PATIENCE) == 0, log(folder)
    assert undisturbed.wait(PATIENCE) == 0, log(alone)
    assert_same(folder, alone)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of a few MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.large
def test_a_disk_that_is_full_loses_nothing_and_room_lets_the_run_go_on(small_disk: Path, tmp_path: Path) -> None:
    """The disk is filled to the last byte in the midst of the training, and emptied again."""
    alone, folder = (make(place / name, model=None) for place, name in ((tmp_path, "alone"), (small_disk, "run")))
    undisturbed = start(alone)
    process = start(folder)
    wait_for(lambda: (folder / "checkpoint-3" / MARKER).exists() or process.poll() is not None)
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    assert process.wait(PATIENCE) == 1
    store = Store(small_disk)
    assert store.state(folder) == "failed" and store.standing(folder).error
    assert newest(folder) >= 3

    (small_disk / "filler").unlink()
    assert start(folder).wait(PATIENCE) == 0, log(folder)
    assert undisturbed.wait(PATIENCE) == 0, log(alone)
    assert_same(folder, alone)
