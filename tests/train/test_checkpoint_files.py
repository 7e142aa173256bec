"""The lines of a run folder, and which of its checkpoints count."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise.files import MARKER, claim
from rankwise.train.checkpoint_files import LINES, append_line, cut_back, last_complete, mark_complete


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two complete checkpoints; the step counts, not the alphabet."""
    for step in (9, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        claim(tmp_path, checkpoint.name)
        (checkpoint / "deep").mkdir(parents=True)
        (checkpoint / "weights").write_bytes(bytes(1000))
        (checkpoint / "deep" / "state").write_text("state")
        for name in LINES:
            append_line(tmp_path / name, {"step": step, "loss": 0.1})
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


def change_what_is_carried(checkpoint: Path) -> None:
    text = (checkpoint / MARKER).read_text()
    (checkpoint / MARKER).write_text(text.replace('"seconds": ', '"seconds": 9'))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "weights"),
        (change_a_byte, "weights"),
        (lose_a_file, "deep/state"),
        (lose_the_marker, ""),
        (spoil_the_marker, MARKER),
        (empty_the_marker, MARKER),
        (change_what_is_carried, MARKER),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    folder: Path, damage: Callable[[Path], None], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, onwards in ((10, "going on from checkpoint-9"), (9, "starting again")):
        damage(folder / f"checkpoint-{step}")
        found = last_complete(folder)
        assert found == ((folder / "checkpoint-9", {"seconds": 9.0}) if step == 10 else None)
        assert not (folder / f"checkpoint-{step}").exists()
        # without its marker it was never complete, as after any kill: nothing to tell
        said = f"{folder}: checkpoint-{step} cannot be used, since {named} has changed; {onwards}\n"
        assert capsys.readouterr().err == (said if named else "")


def lose(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_text("")


def change(path: Path) -> None:
    """The last line, still a line."""
    path.write_text(path.read_text().replace('"step": 10, "loss": 0.1', '"step": 10, "loss": 0.2'))


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def put_in_front(path: Path) -> None:
    path.write_text('{"step": 0, "parameters": 1}\n' + path.read_text())


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("damage", [lose, empty, change, tear, put_in_front])
def test_damaged_lines_take_the_checkpoints_along_that_cover_them(
    folder: Path, damage: Callable[[Path], None], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder / name)
    only_the_end = damage in (change, tear)
    assert last_complete(folder) == ((folder / "checkpoint-9", {"seconds": 9.0}) if only_the_end else None)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{name} has changed" in said
    assert said.endswith("going on from checkpoint-9\n" if only_the_end else "starting again\n")


def test_lines_are_cut_back_to_a_checkpoint_whatever_was_appended(folder: Path) -> None:
    whole = {name: (folder / name).read_text() for name in LINES}
    for name in LINES:
        with (folder / name).open("a") as file:
            file.write('{"step": 1, "parameters": 99}\n{"step": 11, "lo')
    for step in (10, 9):
        cut_back(folder, folder / f"checkpoint-{step}")
        for name in LINES:
            assert (folder / name).read_text() == "".join(whole[name].splitlines(keepends=True)[: step - 8])
    cut_back(folder, None)
    assert all((folder / name).read_text() == "" for name in LINES)


def test_lines_that_are_not_there_are_begun(tmp_path: Path) -> None:
    cut_back(tmp_path, None)
    assert all((tmp_path / name).read_text() == "" for name in LINES)
