"""The lines of a run folder, and which of its checkpoints count."""

from pathlib import Path

import pytest

from rankwise.files import MARKER
from rankwise.train.files import append_line, cut_lines, last_complete, mark_complete


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two complete checkpoints; the step counts, not the alphabet."""
    for step in (9, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        (checkpoint / "deep").mkdir(parents=True)
        (checkpoint / "weights").write_bytes(bytes(1000))
        (checkpoint / "deep" / "state").write_text("state")
        mark_complete(checkpoint, {"seconds": float(step)})
    return tmp_path


def test_the_newest_complete_checkpoint_is_found(folder: Path) -> None:
    assert last_complete(folder) == (folder / "checkpoint-10", {"seconds": 10.0})


def truncate(checkpoint: Path) -> None:
    (checkpoint / "weights").write_bytes(bytes(999))


def change_a_byte(checkpoint: Path) -> None:
    (checkpoint / "weights").write_bytes(bytes(999) + b"1")


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "deep" / "state").unlink()


def lose_the_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink()


def spoil_the_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER).write_text("[1, 2")


def empty_the_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER).write_text("[]")


@pytest.mark.parametrize(
    "damage", [truncate, change_a_byte, lose_a_file, lose_the_marker, spoil_the_marker, empty_the_marker]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder: Path, damage) -> None:  # type: ignore[no-untyped-def]
    damage(folder / "checkpoint-10")
    assert last_complete(folder) == (folder / "checkpoint-9", {"seconds": 9.0})
    assert not (folder / "checkpoint-10").exists()
    damage(folder / "checkpoint-9")
    assert last_complete(folder) is None


def test_lines_are_cut_back_to_a_step_and_a_torn_end_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for step in (0, 3, 3, 4):
        append_line(path, {"step": step, "loss": 0.1})
    whole = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    cut_lines(path, 4)
    assert path.read_text() == whole
    cut_lines(path, 3)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:3])
    cut_lines(path, -1)
    assert path.read_text() == ""


def test_lines_of_a_file_that_is_not_there_are_none(tmp_path: Path) -> None:
    cut_lines(tmp_path / "lines.jsonl", 3)
    assert (tmp_path / "lines.jsonl").read_text() == ""
