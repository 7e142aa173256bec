"""What a run does with its folder: which files are its own, which it leaves, and which it removes."""

import fcntl
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm
from rankwise.errors import InputError
from rankwise.files import WRITTEN, claim
from rankwise.runs.store import MEMORY, Store
from rankwise.train.checkpoint_files import append_line, last_complete, mark_complete
from rankwise.train.run import run
from runs import make, start
from waiting import PATIENCE, reached, wait_for


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run under an umask of its own, in a folder with things that somebody else has put there."""
    folder = make(tmp_path_factory.mktemp("runs") / "run")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-best" / "weights").touch()
    (folder / "checkpoint-notes").write_text("of mine")
    before = os.umask(0o027)
    run(folder)
    os.umask(before)
    yield folder


def test_what_others_have_put_there_stays(finished: Path) -> None:
    assert (finished / "checkpoint-best" / "weights").exists() and (finished / "checkpoint-notes").exists()
    assert not list(finished.glob("checkpoint-[0-9]*")) and not (finished / WRITTEN).exists()
    assert run(finished) == json.loads((finished / "result.json").read_text())


def test_all_that_a_run_writes_follows_the_umask(finished: Path) -> None:
    for path in [each for each in finished.rglob("*") if "checkpoint-" not in str(each) and each.name != "run.yaml"]:
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == wanted or path.name == "run.lock", path


def leave_behind(folder: Path) -> None:
    """What a run that is killed right after its result leaves."""
    claim(folder, "checkpoint-9")
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "state").touch()
    (folder / MEMORY).write_text("{}")
    (folder / ".result.json.0123abcd.rankwise").touch()


def test_what_a_killed_run_has_left_behind_its_result_goes_with_the_next_look(finished: Path) -> None:
    before = sorted(path.name for path in finished.iterdir())
    leave_behind(finished)
    with (finished / "run.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Store(finished.parent).tidy([finished])
        assert (finished / "checkpoint-9").exists() and (finished / MEMORY).exists()
    run(finished)
    assert sorted(path.name for path in finished.iterdir()) == before
    leave_behind(finished)
    done = subprocess.run([sys.executable, "-m", "rankwise", "status", str(finished.parent)], capture_output=True)
    assert done.returncode == 0 and sorted(path.name for path in finished.iterdir()) == before


@pytest.mark.parametrize("name", ["checkpoint-6", "model"])
def test_what_would_be_written_over_is_named_before_any_training(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    (folder / name).mkdir()
    (folder / name / "mine").touch()
    with pytest.raises(InputError, match=f"{name} was not written by this run, .*: move it away"):
        run(folder)
    assert (folder / name / "mine").exists() and not (folder / "metrics.jsonl").exists()


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harm",)


def test_a_checkpoint_that_others_have_written_is_refused_in_one_line_and_nothing_of_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / "run", method={"name": "head"})
    process = start(folder)
    wait_for(lambda: reached(folder, 4) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75
    found = last_complete(folder)
    assert found is not None
    for name in ("optimizer.pt", "rng_state.pth"):  # of which one is read before the first step, one in it
        whole = (found[0] / name).read_bytes()
        (found[0] / name).write_bytes(pickle.dumps(Harm(), protocol=2))
        mark_complete(found[0], found[1])
        with pytest.raises(InputError, match=f"{found[0].name} cannot be loaded, .* delete it, and the same command"):
            run(folder)
        (found[0] / name).write_bytes(whole)
    assert not (tmp_path / "harm").exists()
    mark_complete(found[0], found[1])
    assert run(folder)["seed"] == 0


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_deleted_in_mid_run_is_not_made_anew(again: bool, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", max_steps=200)
    command = [sys.executable, "-m", "rankwise", "train", str(folder)]
    with warm.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        wait_for(lambda: reached(folder, 4) or process.poll() is not None)
        folder.rename(tmp_path / "moved")
        shutil.rmtree(tmp_path / "moved")
        if again:
            folder.mkdir()
        said = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 2, said
    assert (
        said.endswith("run was deleted or moved during the run, which has ended: start it again\n")
        and "Traceback" not in said
    )
    assert not folder.exists() or not list(folder.iterdir())


def answers(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@pytest.mark.parametrize("later", [0.0, 0.4, 1.5])  # seconds: wherever its imports are by then
@pytest.mark.parametrize(
    "command",
    [["train"], *(pytest.param(each, marks=pytest.mark.large) for each in (["compare"], ["train", "--dry-run"]))],
)
def test_a_signal_in_the_first_moments_is_one_line(command: list[str], later: float, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "task: stdlib-kind\nvary: {seed: [0, 1]}\n" if command == ["compare"] else "task: stdlib-kind"
    )
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        process = subprocess.Popen(
            [sys.executable, "-m", "rankwise", command[0], "x.yaml", *command[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )  # fmt: skip
        wait_for(lambda process=process: answers(process, signal.SIGTERM) or process.poll() is not None)
        time.sleep(later)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, err
        assert out == "" and err.count("\n") == 1 and err.startswith("rankwise: "), err


def test_a_file_of_lines_is_not_created_in_a_new_folder_of_the_same_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        append_line(tmp_path / "metrics.jsonl", {"step": 1}, create=False)
    assert not list(tmp_path.iterdir())
