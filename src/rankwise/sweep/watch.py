"""How the runs of a folder stand, and how long they will still take."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rankwise.errors import shown_line
from rankwise.results.formats import duration, plain
from rankwise.runs import run_file
from rankwise.runs.standing import FOREIGN, Standing, State
from rankwise.runs.store import Store
from rankwise.sweep.changed import differing, dotted
from rankwise.sweep.progress import counted
from rankwise.sweep.runners import typed

STATES: tuple[State, ...] = ("running", "pending", "stopped", "failed", "damaged", "done")
OVER = ("done", "failed", "damaged")
"""States in which nothing is left to wait for."""
EVERY = 1.0
"""Seconds between two looks."""
HEADER = ("run", "learning rate", "state", "steps", "left", "error")
"""The columns of every table; those of `Look.differing` stand before the last."""


@dataclass(frozen=True)
class Look:
    """All runs at one moment."""

    standings: Sequence[Standing]
    left: dict[Path, float]
    """Seconds that a run still takes once it is at work; without an entry if not known yet."""
    settings: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    """Of each run whose `run.yaml` can be read, by their dotted keys."""

    @property
    def differing(self) -> list[str]:
        """The settings, except the learning rate, that are not the same in all runs that have them."""
        return differing(self.settings.values())

    @property
    def over(self) -> bool:
        """Whether every run is done, damaged or has failed, and none is to follow from the learning rates tried.

        Runs that the present experiment does not ask for count while they are at work.
        """
        counted = [each for each in self.standings if _awaited(each)]
        waiting = counted and all(each.tries for each in counted)
        followed = not waiting or all(each.state == "failed" for each in counted)
        return followed and all(each.state in OVER for each in counted)

    @property
    def total(self) -> float | None:
        """Seconds until all are done if as many stay at work as are now; None if not known yet."""
        waiting = [each.folder for each in self.standings if each.state not in OVER and _awaited(each)]
        known = [self.left[folder] for folder in waiting if folder in self.left]
        if not known:
            return None
        at_once = max(1, sum(each.state == "running" for each in self.standings))
        # not below the longest: a run is not divided among several
        return max(max(known), sum(known) / len(known) * len(waiting) / at_once)

    def head(self) -> str:
        """All in one line."""
        counts = {state: sum(each.state == state for each in self.standings) for state in STATES}
        line = counted(len(self.standings)) + "".join(f", {n} {state}" for state, n in counts.items() if n)
        return line if self.total is None else f"{line}, about {duration(self.total)} left"

    def as_json(self) -> list[dict[str, Any]]:
        """What `rankwise status --json` prints."""
        return [
            {
                "run": each.folder.name,
                "learning_rate": each.learning_rate,
                "tries": each.tries,
                "planned": each.planned,
                "state": each.state,
                "step": each.step,
                "steps": each.steps,
                "seconds_left": round(self.left[each.folder]) if each.folder in self.left else None,
                "settings": {
                    key: value for key, value in self.settings.get(each.folder, {}).items() if key in self.differing
                },
                **({"error": each.error} if each.error else {}),
            }
            for each in self.standings
        ]

    def table(self) -> str:
        """All runs as plain text."""
        return plain(self.header(), self.rows())

    def header(self) -> list[str]:
        """What stands above the columns of `rows`."""
        return [*HEADER[:-1], *self.differing, HEADER[-1]]

    def rows(self) -> list[list[str]]:
        """A row for each run."""
        columns = self.differing
        return [
            [
                each.folder.name,
                "" if each.learning_rate is None else f"{each.learning_rate:g}{' (tried)' if each.tries else ''}",
                each.state,
                f"{each.step}/{each.steps}" if each.steps else "",
                duration(self.left[each.folder]) if each.folder in self.left else "",
                *(typed(settings[key]) if key in settings else "" for key in columns),
                each.error or ("" if _awaited(each) or each.state == "done" else FOREIGN),
            ]
            for each in sorted(self.standings, key=lambda each: STATES.index(each.state))
            for settings in [self.settings.get(each.folder, {})]
        ]


def _awaited(standing: Standing) -> bool:
    """Whether a process carries out this run, or is going to."""
    return standing.planned or standing.state == "running"


class Watch:
    """Looks at a folder of runs again and again, and learns from look to look how fast they are.

    Times are differences of one monotonic clock, of this process or of a run, so setting a clock does not change them.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._first: dict[Path, tuple[int, float]] = {}
        self._pace: dict[Path, float] = {}

    def look(self) -> Look:
        """How all runs stand now."""
        standings = [self._store.standing(folder) for folder in self._store.folders()]
        paces = {each.folder: pace for each in standings if (pace := self._pace_of(each)) is not None}
        usual = sum(paces.values()) / len(paces) if paces else None
        lengths = [each.steps for each in standings if each.steps]
        left = {}
        for each in standings:
            steps = each.steps or (sum(lengths) / len(lengths) if lengths else None)
            pace = paces.get(each.folder, usual)
            if each.state not in OVER and _awaited(each) and pace is not None and steps is not None:
                left[each.folder] = max(0.0, pace * (steps - each.step))
        files = {each.folder: run_file.read(each.folder) for each in standings}
        return Look(standings, left, {folder: dotted(file.config) for folder, file in files.items() if file})

    def _pace_of(self, standing: Standing) -> float | None:
        """Seconds per step: as seen here since the run was first seen at work, else as the run itself has noted."""
        folder, now = standing.folder, self._clock()
        step, since = self._first.get(folder, (standing.step, now))
        if standing.state != "running" or standing.step < step or folder not in self._first:
            self._first[folder] = (standing.step, now)
            self._pace.pop(folder, None)
        elif standing.step > step and now > since:
            self._pace[folder] = (now - since) / (standing.step - step)
        return self._pace.get(folder, standing.pace)


def watch(store: Store, console: Console) -> bool:
    """Keep a table on the terminal until every run is done or has failed (True), or until Ctrl-C (False)."""
    looking = Watch(store)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that the terminal is left as it was
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            look = looking.look()
            live.update(_page(f"{store.folder}: {look.head()}", look.header(), look.rows()), refresh=True)
            if look.over:
                return True
            time.sleep(EVERY)
    return False


def _page(head: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Group:
    table = Table(*header, box=None)
    for row in rows:
        table.add_row(*(Text(shown_line(cell)) for cell in row))
    return Group(Text(shown_line(head)), table)  # a title of the table would be no wider than that
