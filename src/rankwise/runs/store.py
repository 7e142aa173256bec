"""A folder of runs, whose files are all there is: no database, no server."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import rankwise
from rankwise.errors import InputError
from rankwise.files import (
    MARKER,
    checkpoints,
    opened,
    read_json,
    remove_checkpoint,
    similar,
    tidy,
    unwritable,
    write_whole,
)
from rankwise.runs import record, result, run_file
from rankwise.runs.answers import FILE as ANSWERS
from rankwise.runs.data import FILE as DATA
from rankwise.runs.maker import FILE as MAKER
from rankwise.runs.maker import Maker, in_words
from rankwise.runs.noted import Noted
from rankwise.runs.record import Failure
from rankwise.runs.result import Finished, Result
from rankwise.runs.run_file import RunFile, apart
from rankwise.runs.standing import Standing, State, held, pace
from rankwise.settings import FORMAT, PLACE, RunConfig

MEMORY = "memory.json"
"""In a run folder: how many rows go through the model at once, once memory has run out."""
WEIGHTS = "weights.pt"
"""In a run folder: everything that was learnt, unfolded, for a run that begins with it."""
PICTURE = "masks.png"
"""In a run folder: some images, their masks and the predicted masks, side by side."""
ERROR = ("error.txt", "error.json")
"""In the folder of a failed run: why, for people and for programs. A run with the first of them counts as failed."""
LEFT = {
    *("run.yaml", "run.lock", "env.json", "metrics.jsonl", "ranks.jsonl", "predictions.parquet"),
    *("result.json", *ERROR, "log.txt"),
}
"""Files that show that a folder without `run.yaml` belonged to a run."""


BEGUN = ("metrics.jsonl", "ranks.jsonl", *ERROR, "predictions.parquet", ANSWERS, WEIGHTS)
"""Files, apart from checkpoints and the result, to delete before a run starts again from its beginning."""
FILES = (*BEGUN, DATA, "env.json", PICTURE, "result.json", "run.lock", MEMORY, MAKER)
"""Files that a run writes into its folder."""


class Store(Noted):
    """The runs in one folder, each in a folder of its own, `<task>-<method>-<seed>-<id>`."""

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    def place(self, config: RunConfig) -> Path:
        """The folder of this run, whether or not it exists yet."""
        folder = self.folder / f"{config.task['name']}-{config.method['name']}-{config.seed}-{config.id}"
        return folder if os.path.lexists(folder) else self._elsewhere.get(config.id, folder)

    @cached_property
    def _elsewhere(self) -> dict[str, Path]:
        """Runs in folders that are not named after their present id, such as those of an older format, by that id."""
        places = [file.parent for file in self.folder.glob(f"*/{run_file.NAME}") if not run_file.at_home(file.parent)]
        # of several the newest
        runs = {
            each: run
            for each in sorted(places, key=_age, reverse=True)
            if (run := run_file.read(each)) is not None and run.maker is not None
        }
        named = {name: run for run in runs.values() for name in run.names}

        def now(run: RunFile) -> str:
            if run.format == FORMAT:
                return run.id
            before = named.get(run.config.after or "")
            after = run.config.after if before is None else now(before)
            return run.config.model_copy(update={"after": after}).id

        return {now(run): folder for folder, run in runs.items()}

    def create(self, config: RunConfig, maker: Maker | str) -> Path:
        """The folder of this run, created with its `run.yaml` if there is none yet.

        `maker` is what would train it now, or only the revision of its data, if the code is not to be recorded. It is
        also recorded for a run that exists but has not started; a run that has started keeps the maker it has.
        Raises InputError if nothing can be written.
        """
        maker = Maker(rankwise.__version__, maker) if isinstance(maker, str) else maker
        folder = self.place(config)
        run, noted = run_file.read(folder), self.maker(folder)
        if run and (noted == maker or self.begun(folder)):
            # it was trained before rates were tried, its plugins have moved, or it reports to others
            other = (config.plugins, config.report_to) != (run.config.plugins, run.config.report_to)
            stale = (config.tuned and not run.config.tuned) or other
            if run.maker and stale:
                self._write(folder, replace(run, config=config), run.maker)
            return folder
        if not run and self.begun(folder):
            maker = noted or Maker("unknown", "unknown")  # its run.yaml is repaired; what made the run is not known
        self._write(folder, RunFile(config.id, config, maker, config.kind), maker)
        return folder

    def _write(self, folder: Path, content: RunFile, maker: Maker) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / MAKER, maker.text())
            write_whole(folder / run_file.NAME, replace(content, maker=maker).text())
        except OSError as error:
            raise unwritable(self.folder, error) from None

    def maker(self, folder: Path) -> Maker | None:
        """What made a run, or is recorded as what will; None if nothing is recorded."""
        run = run_file.read(folder)
        if run is not None:
            return run.maker
        try:
            return Maker.of(read_json(folder / MAKER)["made_with"], folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def begun(self, folder: Path) -> bool:
        """Whether a run is done, running, or has a checkpoint to resume from."""
        if _checkpoints(folder):
            return True
        if run_file.read(folder) is None:  # whose result this is cannot be known
            return os.path.lexists(folder / "result.json")
        return self.state(folder) in ("running", "done")

    def others(self, wanted: Mapping[Path, Maker]) -> dict[Path, list[str]]:
        """The started or finished runs that were not made by the `wanted` maker, and what differs."""
        differing = {}
        for folder, maker in wanted.items():
            noted = self.maker(folder) if self.begun(folder) else None
            if noted is not None and (differences := maker.differs(noted)):
                differing[folder] = differences
        return differing

    def named(self, name: str) -> str:
        """The `name` of the maker of a run that another one begins with; "" if the run or its maker is not known."""
        maker = next((run.maker for _, run in self._called(name)), None)
        return maker.name if maker else ""

    def _called(self, name: str) -> Iterator[tuple[Path, RunFile]]:
        """The runs that the next stage of a chain may mean by `name`."""
        for folder in self.folders():
            if (run := run_file.read(folder)) and name in run.names:
                yield folder, run
        if (elsewhere := self._elsewhere.get(name)) and (run := run_file.read(elsewhere)):
            yield elsewhere, run

    def claim(self, folder: Path, maker: Maker) -> None:
        """Record what is about to train a run, unless its file was written by hand.

        Raises InputError for a run that another maker has started.
        """
        run = run_file.read(folder)
        if run is None or run.maker is None:
            return
        if run.config.after is not None:
            before = self._before(folder, replace(run, maker=maker))[1].maker
            maker = replace(maker, before=before.name if before else "")
        if run.maker == maker:
            return
        if _checkpoints(folder):
            raise InputError(
                f"{folder.name} was started with {in_words(maker.differs(run.maker))}; "
                f"`rankwise train {folder} --reuse` resumes it all the same, --repeat starts it again"
            )
        self._write(folder, replace(run, begun_with=None), maker)

    def take_over(self, folder: Path, maker: Maker) -> None:
        """Let `maker` resume what another maker started, and record that. Raises InputError as `create` does."""
        run = run_file.read(folder)
        if run is not None and run.maker is not None:
            self._write(folder, replace(run, begun_with=run.maker.made_with()), maker)

    def clear(self, folder: Path) -> None:
        """Delete what a run has produced, so that it starts from its beginning. InputError while it is running."""
        if self.state(folder) == "running":
            raise InputError(f"{folder}: another process is at work on this run; wait for it or end it")
        try:
            (folder / "result.json").unlink(missing_ok=True)
            clear(folder)
            for name in BEGUN:
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from None

    def failure(self, folder: Path) -> Failure:
        """Why a run failed; an empty `Failure` for a run that did not."""
        return record.failure(folder) if self.state(folder) == "failed" else Failure()

    def tries(self, folder: Path) -> bool:
        """Whether a run only tries a learning rate, and appears in no table."""
        run = run_file.read(folder)
        return run is not None and run.kind == "trial"

    def note_error(self, folder: Path, text: str, diverged: bool = False, refused: bool = False) -> None:
        """Record why a run failed, or at least that it did: a full disk often has room for an empty file.

        `diverged` and `refused`: see `Failure`.
        """
        failure = Failure(next(iter(text.splitlines()), ""), diverged, refused)
        with suppress(OSError):
            try:
                write_whole(folder / "error.json", json.dumps(asdict(failure)) + "\n")
                write_whole(folder / "error.txt", text)
            except OSError:
                (folder / "error.txt").touch()

    def forget_error(self, folder: Path) -> None:
        """Let a failed run start again. Raises InputError if nothing can be written."""
        try:
            for name in ERROR:
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from None

    def tidy(self, folders: Sequence[Path] = ()) -> None:
        """Clean up after runs that were killed just after their result, or while they wrote a file.

        A finished run loses its checkpoints. Half-written files are deleted everywhere, except those of a live process
        and those that cannot be deleted.
        """
        for folder in folders:
            if (checkpoints(folder) or os.path.isfile(folder / MEMORY)) and self.result(folder) is not None:  # noqa: PTH113
                with suppress(OSError, InputError), opened(folder / "run.lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    clear(folder)
            tidy(folder)
        tidy(self.folder)

    def folders(self) -> list[Path]:
        """The folders that hold or held a run, and those that cannot be read, sorted by name.

        Raises InputError if there is no such folder of runs, if it cannot be read, or if the runs are one level higher
        or lower.
        """
        try:
            inside = sorted(path for path in self.folder.iterdir() if not path.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            if os.path.lexists(self.folder):
                raise InputError(f"{self.folder}: is a file; give the folder that holds the runs") from None
            raise InputError(f"{self.folder}: there is no such folder of runs{similar(self.folder)}") from None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be read: {(error.strerror or str(error)).lower()}") from None
        runs = [path for path in inside if _of_run(path)]
        if not runs and os.path.lexists(self.folder / "run.yaml"):
            raise InputError(f"{self.folder}: is one run; give the folder above it, {self.folder.resolve().parent}")
        if not runs and (below := sorted({path.parents[1] for path in self.folder.glob("*/*/run.yaml")})):
            names = ", ".join(each.name for each in below[:5]) + (", …" if below[5:] else "")
            raise InputError(f"{self.folder}: the runs are one folder further down, in {names}; give {below[0]}")
        return runs

    def config(self, folder: Path) -> RunConfig:
        """The settings of a run. Raises InputError if its `run.yaml` is missing or damaged."""
        run = run_file.read(folder)
        if run is None:
            raise InputError(f"{folder}: {run_file.unreadable(folder) or run_file.DAMAGED}")
        return run.config

    def before(self, folder: Path) -> Path | None:
        """The folder of the run whose trained weights this run begins with; None if it begins with none.

        Raises InputError if that run is not there, or was made by another version or other code of rankwise or, for the
        same task, with other data.
        """
        own = run_file.read(folder)
        if own is None or own.config.after is None:
            return None
        return self._before(folder, own)[0]

    def check_before(self, config: RunConfig, maker: Maker) -> None:
        """Raise InputError if a run yet to be created begins with a run that is not there; see `before`."""
        if config.after is not None:
            self._before(self.place(config), RunFile(config.id, config, maker, config.kind))

    def _before(self, folder: Path, own: RunFile) -> tuple[Path, RunFile]:
        why = []
        for other, run in self._called(own.config.after or ""):
            if not (why := apart(run, own)):
                return other, run
        if why:
            raise InputError(
                f"{folder}: the run that it begins with was made with {in_words(why)}; carry out the whole chain "
                "again, with --repeat"
            )
        raise InputError(f"{folder}: the run that it begins with is not in {self.folder}; run the whole chain there")

    def state(self, folder: Path) -> State:
        """How a run stands; see `Standing`."""
        if self.result(folder) is not None:
            return "done"
        if held(folder / "run.lock"):
            return "running"
        if os.path.lexists(folder / "error.txt"):
            return "failed"
        if os.path.lexists(folder / "metrics.jsonl") or checkpoints(folder):
            return "stopped"
        return "pending"

    def standing(self, folder: Path) -> Standing:
        """How a run stands, with its progress and the first line of its error."""
        state = self.state(folder)
        step, steps = record.progress(folder)
        error, run = record.damage(folder), run_file.read(folder)
        rate = run.config.learning_rate if run else None
        tries = run is not None and run.kind == "trial"
        if run is None:
            error = run_file.unreadable(folder) or run_file.DAMAGED
        elif state == "failed":
            error = next(iter(record.error_lines(folder)), "without a message, as on a full disk; log.txt may say more")
        elif state != "done" and os.path.lexists(folder / "result.json"):
            error = "its result.json is not what was written there: the same rankwise compare or train makes it again"
            run = None if state != "running" else run
        if run is None and state != "running":
            state = "damaged"
        names = self.planned()
        planned = names is None or folder.name in names
        return Standing(
            folder, rate, tries, planned, state, step, steps, pace(folder, self.result(folder), steps), error
        )

    def result(self, folder: Path) -> Result | None:
        """The result of a finished run; None if it is missing, damaged, or of another run."""
        try:
            found = result.read(folder)
        except (OSError, InputError):
            return None
        run = run_file.read(folder)
        if run is None or found.run != run.id:
            return None
        options = {"name": found.method, **found.options}
        same = all(options.get(key) == value for key, value in run.config.method.items())
        rest = (found.seed, found.learning_rate) == (run.config.seed, run.config.learning_rate)
        return found if same and rest else None

    def results(self, folders: Sequence[Path] | None = None) -> list[Finished]:
        """The finished runs (of those in `folders`) that may be compared.

        These are the newest ones, and those whose makers agree with theirs in what they share.
        """
        return [
            Finished(
                **vars(found),
                folder=folder,
                kind=run.kind,
                tuned=run.config.tuned,
                config=run.config.model_dump(mode="json", exclude={*PLACE, "tuned"}),
                lineage=self._lineage(folder),
            )
            for folder, found, run, apart in self._finished(folders)
            if not apart
        ]

    def left_out(self, folders: Sequence[Path] | None = None) -> str:
        """How many finished runs are not in `results` and why, in a sentence; "" if all are."""
        found = [apart for *_, apart in self._finished(folders) if apart]
        if not found:
            return ""
        count = "1 finished run is" if len(found) == 1 else f"{len(found)} finished runs are"
        why = in_words(each for apart in found for each in apart)
        return f"{count} left out, because newer ones were made with {why}."

    def _finished(self, folders: Sequence[Path] | None) -> list[tuple[Path, Result, RunFile, list[str]]]:
        """The finished runs, and why each is not compared with the newest ones, for `in_words`; [] if it is."""
        found = [
            (folder, result, run)
            for folder in (self.folders() if folders is None else folders)
            if (result := self.result(folder)) is not None and (run := run_file.read(folder)) is not None
        ]
        chosen: list[RunFile] = []
        known: dict[str, list[str]] = {}
        why: dict[Path, list[str]] = {}
        for folder, _, run in sorted(found, key=lambda each: (_age(each[0]), each[0].name)):
            # the same holds for all runs of one maker; in a chain it counts which run they begin with
            chain = [run.config.after, run.id if run.config.followed else ""]
            like = repr([run.maker and run.maker.name, run.config.task, run.kind == "trial", *chain])
            if like not in known:
                known[like] = next((words for other in chosen if (words := apart(run, other))), [])
                if not known[like]:
                    chosen.append(run)
            why[folder] = known[like]
        return [(folder, result, run, why[folder]) for folder, result, run in found]

    def _lineage(self, folder: Path) -> list[dict[str, Any]]:
        try:
            before = self.before(folder)
        except InputError:
            return [{"unknown": True}]  # its folder is gone
        if before is None:
            return []
        settings = self.config(before).model_dump(mode="json", exclude={*PLACE, "tuned", "seed", "after", "followed"})
        return [*self._lineage(before), settings]


def clear(folder: Path) -> None:
    """Delete what a run resumes by. The caller holds its lock, and its result is written."""
    for checkpoint in checkpoints(folder):
        remove_checkpoint(checkpoint)
    (folder / MEMORY).unlink(missing_ok=True)


def _of_run(folder: Path) -> bool:
    try:
        return folder.is_dir() and not LEFT.isdisjoint(entry.name for entry in folder.iterdir())
    except OSError:
        return True  # it may hold a run


def _age(folder: Path) -> int:
    """A number that is smaller the later a run finished."""
    try:
        return -(folder / "result.json").stat().st_mtime_ns
    except OSError:
        return 0


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that are complete."""
    return [each for each in checkpoints(folder) if (each / MARKER).is_file()]
