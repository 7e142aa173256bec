"""Carry out the runs of an experiment, and be stopped without losing any of them."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console

from rankwise.errors import INTERRUPTED, STOPPED, InputError
from rankwise.files import opened
from rankwise.processes.stop import answering
from rankwise.runs import run_file
from rankwise.runs.record import progress as steps_of
from rankwise.runs.store import Store
from rankwise.settings import RunConfig
from rankwise.sweep.progress import Count, Display
from rankwise.sweep.runners import Ended, Runner

LOSSES = 3
"""How often in a row a run may lose its node or run out of time without getting further."""
GRACE = 60.0
"""Seconds that a run has for its last step and its checkpoint."""
TAIL = 100_000
"""Bytes of a log in which its last line is looked for."""
POLL = 0.2
"""Seconds between two looks at the processes."""


@dataclass
class Outcome:
    """What became of the runs."""

    done: list[Path] = field(default_factory=list)
    failed: list[Path] = field(default_factory=list)
    stopped: list[Path] = field(default_factory=list)
    """Stopped by something other than the sweep; the same command goes on with them."""


class Interrupted(SystemExit):  # noqa: N818 - not an error: exit codes 75 and 130
    """The sweep was stopped; its workers have ended."""


def carry_out(store: Store, folders: Sequence[Path], runner: Runner, console: Console | None = None) -> Outcome:
    """Carry out the runs in `folders` that are not done yet, and return which are done and which failed.

    A run that another sweep is at work on is waited for. SIGINT and SIGTERM are passed on to the runs as SIGTERM: they
    write a checkpoint, then `Interrupted` (a SystemExit of 130 or 75) is raised. The same call goes on from there.
    Raises InputError where a folder cannot be written to.
    """
    store.plan(folders)
    configs = {folder: store.config(folder) for folder in folders}
    names = {folder: called(config) for folder, config in configs.items()}
    console = console or Console(file=sys.stderr)
    # stdout is for results, and Ray prints there
    try:
        with redirect_stdout(sys.stderr), Display(console, names) as display, _signals() as asked, runner.kept():
            sweep = _Sweep(store, runner, display, names, _before(store, configs))
            sweep.carry_out(asked)
    except Interrupted:  # after the display, so that this is the last line
        done = sum(store.state(folder) == "done" for folder in folders)
        say = f"stopped with {done} of {len(folders)} runs done; the same command goes on with the others"
        console.print(say, markup=False, highlight=False, soft_wrap=True)
        raise
    return sweep.outcome


def called(config: RunConfig) -> str:
    """A run in a few words, for a log with several of them."""
    return f"{config.task['name']} {config.method['name']} rate {config.learning_rate:g} seed {config.seed}"


def _before(store: Store, configs: dict[Path, RunConfig]) -> dict[Path, Path]:
    """Of each run in a chain but the first the run that it begins with, in the sweep or done before."""
    known = {name: folder for folder in configs if (kept := run_file.read(folder)) for name in kept.names}
    found = {
        folder: known.get(config.after) or store.before(folder)
        for folder, config in configs.items()
        if config.after is not None
    }
    return {folder: before for folder, before in found.items() if before is not None}


class _Sweep:
    def __init__(
        self, store: Store, runner: Runner, display: Display, names: dict[Path, str], before: dict[Path, Path]
    ) -> None:
        self.outcome = Outcome()
        self._store, self._runner, self._display, self._names, self._before = store, runner, display, names, before
        self._pending: deque[Path] = deque()
        self._losses: dict[Path, tuple[int, int]] = {}
        """Of each run that was lost: its furthest step, and how often in a row it got no further."""
        self._elsewhere: list[Path] = []
        """Runs that another sweep in the same folder is at work on."""
        store.tidy(list(names))
        for folder in names:
            (self.outcome.done if store.state(folder) == "done" else self._pending).append(folder)

    def carry_out(self, asked: list[int]) -> None:
        """Until every run is done or has failed, or until a signal is in `asked`."""
        if self.outcome.done:
            self._display.say(f"{len(self.outcome.done)} of {len(self._names)} runs are done already")
        work = bool(self._pending)
        try:
            while self._pending or self._elsewhere or self._runner.running():
                self._collect()
                self._launch()
                self._show()
                if asked:
                    raise Interrupted(INTERRUPTED if asked[0] == signal.SIGINT else STOPPED)
                time.sleep(POLL)
        finally:
            if self._runner.running():
                self._display.say(f"stopping {len(self._runner.running())} runs; they write a checkpoint first")
                self._runner.stop(GRACE)
        if work:
            self._show(now=True)

    def _collect(self) -> None:
        for ended in self._runner.ended():
            self._settle(ended)
        for folder in list(self._elsewhere):
            state = self._store.state(folder)
            if state == "running":
                continue
            self._elsewhere.remove(folder)
            # what the other sweep left unfinished is ours now
            {"done": self.outcome.done, "failed": self.outcome.failed}.get(state, self._pending).append(folder)

    def _settle(self, ended: Ended) -> None:
        """File a run whose process is over, and note why it ended if the process could not."""
        folder, state = ended.folder, self._store.state(ended.folder)
        if state == "done":
            self.outcome.done.append(folder)
        elif ended.lost and state != "failed" and self._comes_further(folder):
            self._display.say(f"{self._names[folder]}: {ended.lost}; started again")
            self._pending.append(folder)
        elif state == "running":
            self._elsewhere.append(folder)  # another sweep was a moment faster
        elif ended.code in (STOPPED, -signal.SIGTERM) and not ended.lost and state != "failed":
            self.outcome.stopped.append(folder)
            self._display.say(f"stopped: {self._names[folder]}")
        else:
            if state != "failed":
                self._store.note_error(folder, f"{_last_words(ended)}\n")
            self.outcome.failed.append(folder)
            self._display.say(f"failed: {self._names[folder]}: {self._store.standing(folder).error or ended.reason}")

    def _comes_further(self, folder: Path) -> bool:
        """Note a loss, and return whether to start the run again: not if it was lost too often at the same step."""
        step, (furthest, times) = steps_of(folder)[0], self._losses.get(folder, (-1, 0))
        self._losses[folder] = (step, 0) if step > furthest else (furthest, times + 1)
        return self._losses[folder][1] < LOSSES

    def _launch(self) -> None:
        for _ in range(len(self._pending)):
            if self._runner.full:
                return
            folder = self._pending.popleft()
            before = self._before.get(folder)
            if before is not None and self._store.state(before) != "done":
                self._wait(folder, before)
            elif (state := self._store.state(folder)) == "done":
                self.outcome.done.append(folder)  # by another sweep, since this one started
            elif state == "running":
                self._display.say(f"{self._names[folder]}: another process is at work on it; waiting for it")
                self._elsewhere.append(folder)
            else:
                self._store.forget_error(folder)
                self._runner.start(folder)

    def _wait(self, folder: Path, before: Path) -> None:
        """A run that begins with another one's weights waits for it, or fails with it."""
        # A process that has just started has yet to take the lock, so the state alone is not enough.
        ours = (*self._pending, *self._elsewhere, *self._runner.running())
        if before in ours or self._store.state(before) == "running":
            self._pending.append(folder)
        elif before in self.outcome.stopped:
            self.outcome.stopped.append(folder)
        else:
            self._store.note_error(folder, f"the run that it begins with is not done: {before.name}\n")
            self.outcome.failed.append(folder)
            self._display.say(f"failed: {self._names[folder]}: the run that it begins with is not done")

    def _show(self, now: bool = False) -> None:
        done, failed = len(self.outcome.done), len(self.outcome.failed) + len(self.outcome.stopped)
        self._display.show(Count(done, failed, len(self._names), self._runner.running()), now)


def _last_words(ended: Ended) -> str:
    with suppress(OSError, InputError), opened(ended.folder / "log.txt") as log:
        log.seek(max(ended.log_from, log.seek(0, os.SEEK_END) - TAIL))
        lines = log.read(TAIL).decode(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        if words:
            return f"{ended.reason}; the last line of its log: {words[-1]}"
    return ended.reason


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that asked to stop, in a list that fills as they come.

    The first one is noted for the loop, which stops the runs in an orderly way; a second one raises at once.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise Interrupted(INTERRUPTED if number == signal.SIGINT else STOPPED)
        asked.append(number)

    with answering(dict.fromkeys((signal.SIGINT, signal.SIGTERM), note)):
        yield asked
