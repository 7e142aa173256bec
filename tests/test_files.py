"""Files written whole, and read whatever may lie in their place."""

import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from odd_files import ODD
from rankwise.errors import InputError
from rankwise.files import (
    MARKER,
    WRITTEN,
    appended,
    as_new,
    check_regular,
    checkpoints,
    claim,
    disk_errors,
    opened,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    remembered,
    remove_checkpoint,
    tidy,
    unfinished,
    write_whole,
)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("read", [opened, read_bytes, read_text, read_json, read_lines, check_regular, appended])
def test_what_is_no_file_is_one_line_and_waits_for_nothing(
    read: Callable[[Path], object], odd: Callable[[Path], None], tmp_path: Path
) -> None:
    odd(tmp_path / "x")
    with pytest.raises(
        InputError, match="x: (is a .* where a file should be|cannot be .*); move it away|cannot be read"
    ):
        read(tmp_path / "x")


@pytest.fixture(params=[0o022, 0o077, 0o002])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_has_the_mode_of_any_new_file(mask: int, tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    with unfinished(tmp_path / "folder", folder=True) as made:
        (made / "secret").touch(0o600)
        as_new(made)
        made.rename(tmp_path / "folder")
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((tmp_path / "folder" / "secret").stat().st_mode) == 0o666 & ~mask


KILLED = """
import os, sys
from pathlib import Path
from rankwise.files import unfinished
with unfinished(Path(sys.argv[1])), unfinished(Path(sys.argv[2]), folder=True) as made:
    (made / "half").touch()
    print(flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_was_writing_goes_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    (tmp_path / ".mine.rankwise").touch()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "result.json"), str(tmp_path / "adapter")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        tidy(tmp_path)
        assert len(list(tmp_path.iterdir())) == 3
        process.kill()
        process.wait()
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".mine.rankwise"]


def test_a_disk_that_is_full_is_told_as_such_by_torch_too(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="disk|space"), disk_errors(tmp_path):
            torch.save(torch.zeros(100_000), tmp_path / "state.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_nothing_is_deleted_that_was_not_claimed(tmp_path: Path) -> None:
    for name in ("checkpoint-3", "checkpoint-6", "checkpoint-best"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="checkpoint-3 was not written by this run"):
        claim(tmp_path, "checkpoint-3")
    claim(tmp_path, "checkpoint-9")
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "ours").touch()
    write_whole(tmp_path / "checkpoint-9" / MARKER, '{"files": {"ours": "1"}}')
    (tmp_path / "checkpoint-9" / "notes").touch()
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-9"]
    remove_checkpoint(tmp_path / "checkpoint-9")
    assert [path.name for path in (tmp_path / "checkpoint-9").iterdir()] == ["notes"]
    assert not checkpoints(tmp_path) and not (tmp_path / WRITTEN).exists()


def test_what_was_read_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, looks = tmp_path / "file", []

    def read(path: Path) -> str:
        looks.append(path)
        return path.read_text()

    file.write_text("one")
    assert [remembered(read, file) for _ in range(2)] == ["one", "one"] and len(looks) == 2  # it may still change
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert [remembered(read, file) for _ in range(3)] == ["one"] * 3 and len(looks) == 3
    file.write_text("two, of another size")
    assert remembered(read, file) == "two, of another size" and len(looks) == 4
    file.unlink()
    with pytest.raises(FileNotFoundError):
        remembered(read, file)
