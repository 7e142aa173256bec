import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rankwise.sweep import progress
from rankwise.sweep.progress import Count, Display


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set by the test."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(folder: Path, step: int, steps: int) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [{"step": 0, "steps": steps}, {"step": step, "loss": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_without_a_terminal_there_is_a_line_every_ten_seconds(tmp_path: Path, clock: list[float]) -> None:
    out = io.StringIO()
    first, second = run(tmp_path / "first", 0, 100), tmp_path / "second"
    names = {first: "cola lora", second: "cola head"}
    with Display(Console(file=out), names) as display:
        display.show(Count(0, 0, 4, [first, second]))
        assert out.getvalue() == ""
        clock[0] += 10
        display.show(Count(0, 0, 4, [first, second]))
        clock[0] += 9
        display.show(Count(0, 0, 4, [first, second]))
        clock[0] += 21
        run(first, 50, 100)
        display.show(Count(1, 1, 4, [first]))
        display.show(Count(3, 1, 4, []), now=True)
    lines = out.getvalue().splitlines()
    assert lines[0] == "0/4 runs, cola lora 0/100 steps; cola head starting"
    # two runs and a half in 40 s, one and a half to go
    assert lines[1] == "2/4 runs, 1 failed, cola lora 50/100 steps, about 24 s left"
    assert lines[2] == "4/4 runs, 1 failed"
    assert len(lines) == 3


def test_work_done_before_does_not_count_for_the_time_left(tmp_path: Path, clock: list[float]) -> None:
    out = io.StringIO()
    folder = run(tmp_path / "run", 80, 100)
    with Display(Console(file=out), {folder: "run"}) as display:
        display.show(Count(10, 0, 12, [folder]))
        clock[0] += 20
        run(folder, 90, 100)
        display.show(Count(10, 0, 12, [folder]))
        clock[0] += 20
        display.show(Count(11, 0, 12, []))
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("run 90/100 steps, about 3 min 40 s left")  # a tenth of a run in 20 s, 1.1 runs to go
    assert lines[1].endswith("about 3 min 20 s left")  # two tenths in 40 s, one run to go


def test_what_was_done_before_the_first_line_counts_for_the_time_left(tmp_path: Path, clock: list[float]) -> None:
    """Four short runs, two of them over before there is a line."""
    out = io.StringIO()
    folders = [tmp_path / str(place) for place in range(4)]
    with Display(Console(file=out), {folder: folder.name for folder in folders}) as display:
        display.show(Count(0, 0, 4, [run(folders[0], 0, 100)]))
        clock[0] += 5
        display.show(Count(1, 0, 4, [run(folders[1], 0, 100)]))
        clock[0] += 5
        display.show(Count(2, 0, 4, [run(folders[2], 0, 100)]))
    assert out.getvalue() == "2/4 runs, 2 0/100 steps, about 10 s left\n"


def test_on_a_terminal_there_are_bars(tmp_path: Path) -> None:
    out = io.StringIO()
    folder = run(tmp_path / "run", 80, 100)
    console = Console(file=out, force_terminal=True, width=120)
    with Display(console, {folder: "cola lora"}) as display:
        display.show(Count(0, 0, 2, [folder]))
        display.show(Count(1, 0, 2, []))
    assert "0/2 runs" in out.getvalue()
    assert "cola lora" in out.getvalue()
    assert "1/2 runs" in out.getvalue()


def test_of_many_runs_those_are_shown_that_have_come_furthest(tmp_path: Path, clock: list[float]) -> None:
    out = io.StringIO()
    folders = [run(tmp_path / str(place), place, 100) for place in range(100)]
    with Display(Console(file=out), {folder: f"run{folder.name}" for folder in folders}) as display:
        display.show(Count(0, 0, 100, folders), now=True)
    shown = [part.split()[0] for part in out.getvalue().partition(", ")[2].split("; ")]
    assert shown == [f"run{place}" for place in range(99, 99 - progress.SHOWN, -1)]


@pytest.mark.parametrize("steps", [(12, 20), (1, 7), (49, 3), (29, 64)])
def test_nothing_is_said_of_the_time_left_before_there_is_any_work(
    steps: tuple[int, int], tmp_path: Path, clock: list[float]
) -> None:
    """However the shares of the runs that are gone on with are rounded."""
    out = io.StringIO()
    over = [run(tmp_path / f"over{place}", 150, 150) for place in range(2)]
    rest = [run(tmp_path / f"rest{place}", step, 150) for place, step in enumerate(steps)]
    with Display(Console(file=out), {folder: folder.name for folder in (*over, *rest)}) as display:
        for done, running in ((27, over), (28, [over[1], rest[0]]), (29, rest)):
            display.show(Count(done, 0, 45, running))
            clock[0] += 10
        display.show(Count(29, 0, 45, rest))
    assert "left" not in out.getvalue() and out.getvalue().count("29/45") > 0
