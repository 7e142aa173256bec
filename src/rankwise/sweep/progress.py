"""How far a sweep has come: bars on a terminal, else a line every few seconds; always on stderr."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from rankwise.errors import shown, shown_line
from rankwise.results.formats import duration
from rankwise.runs.record import progress as steps_of

SHOWN = 20
"""Runs shown one by one: those that have come furthest."""
EVERY = 10.0
"""Seconds between two lines if there is no terminal."""


@dataclass(frozen=True)
class Count:
    """Where the sweep stands."""

    done: int
    failed: int
    total: int
    running: Sequence[Path]


class Display:
    """A context manager; `show` may be called at any rate."""

    def __init__(self, console: Console, names: Mapping[Path, str]) -> None:
        """`names`: what to call the run in each folder."""
        self._names = {folder: shown_line(name) for folder, name in names.items()}
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), console=console
        )
        self._tasks: dict[Path | None, TaskID] = {}
        self._spoke = time.monotonic()
        self._first: tuple[float, int] | None = None
        """When the sweep was seen first, and the runs that were over by then."""
        self._start: dict[Path, float] = {}
        """The share of each run that was done when it was first seen at work."""

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line of the log."""
        self._console.print(shown(text), markup=False, highlight=False, soft_wrap=True)

    def show(self, count: Count, now: bool = False) -> None:
        """Bring the bars up to date, or print a line: when the last one is `EVERY` seconds old, or `now`."""
        self._first = self._first or (time.monotonic(), count.done + count.failed)
        for folder in count.running:
            if folder not in self._start:
                self._start[folder] = share(*steps_of(folder))
        if not (now or self._console.is_terminal) and time.monotonic() - self._spoke < EVERY:
            return
        at = {folder: steps_of(folder) for folder in count.running}
        left = self._left(count, *self._first, sum(share(*place) for place in at.values()))
        # on a cluster most of many runs may be waiting
        at = dict(sorted(at.items(), key=lambda item: item[1][0], reverse=True)[:SHOWN]) if len(at) > SHOWN else at
        self._spoke = time.monotonic()
        head = f"{count.done + count.failed}/{count.total} runs"
        if count.failed:
            head += f", {count.failed} failed"
        if not self._console.is_terminal:
            work = "; ".join(f"{self._names[folder]} {at_step(*place)}" for folder, place in at.items())
            self.say(", ".join(part for part in (head, work, left) if part))
            return
        self._bar(None, head, count.done + count.failed, count.total, left)
        for folder, (step, steps) in at.items():
            self._bar(folder, f"  {self._names[folder]}", step, steps, at_step(step, steps))
        for gone in [folder for folder in self._tasks if folder is not None and folder not in at]:
            self._bars.remove_task(self._tasks.pop(gone))

    def _bar(self, key: Path | None, title: str, done: int, total: int | None, text: str) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(title, total=total, text=text)
        self._bars.update(self._tasks[key], description=title, completed=done, total=total, text=text)

    def _left(self, count: Count, began: float, before: int, parts: float) -> str:
        """About how long it will take, judged by the work done since the sweep began, `parts` of runs included."""
        over = count.done + count.failed + parts
        made, rest = over - before - sum(self._start.values()), count.total - over
        if made < 1e-6 or rest <= 0:  # a share this small is only rounding
            return ""
        return f"about {duration((time.monotonic() - began) / made * rest)} left"


def counted(runs: int) -> str:
    """`1 run`, or `3 runs`."""
    return "1 run" if runs == 1 else f"{runs} runs"


def share(step: int, steps: int | None) -> float:
    """How much of a run is done, from 0 to 1."""
    return step / steps if steps else 0.0


def at_step(step: int, steps: int | None) -> str:
    """`120/300 steps`, or that the run has not come to its steps yet."""
    return f"{step}/{steps} steps" if steps else "starting"
