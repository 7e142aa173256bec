"""A folder of runs. What lies in it is all there is to know about them: no database, no server."""

import fcntl
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import rankwise
from rankwise.config import Experiment, RunConfig, as_yaml, read_yaml
from rankwise.errors import InputError, need
from rankwise.files import (
    MARKER,
    check_regular,
    opened,
    read_bytes,
    read_json,
    read_text,
    similar,
    unwritable,
    write_whole,
)
from rankwise.runs import record
from rankwise.runs.grid import run_id

State = Literal["pending", "running", "stopped", "failed", "done", "damaged"]

LEFT = {
    *("run.yaml", "run.lock", "env.json", "metrics.jsonl", "ranks.jsonl", "predictions.parquet"),
    *("result.json", "error.txt", "log.txt"),
}
"""Names of files by which a folder without `run.yaml` is known to have been a run's."""


class _Kept(NamedTuple):
    """What a `run.yaml` holds."""

    id: str
    made_with: dict[str, str] | None
    """The version of rankwise and the revision of the data that the run was made with."""
    config: RunConfig


def _alike(one: _Kept, other: _Kept) -> bool:
    """Whether two runs were made with the same version and data; the data of two tasks are never alike."""
    if one.config.task == other.config.task or None in (one.made_with, other.made_with):
        return one.made_with == other.made_with
    return one.made_with["rankwise"] == other.made_with["rankwise"]  # type: ignore[index]


PLAN = "plan.json"
"""Beside the runs of an experiment: the names of their folders, tuning's among them as they come up."""
DAMAGED = "its run.yaml is not what was written there: the same rankwise compare or train writes it again"


@dataclass(frozen=True)
class Standing:
    """How one run stands."""

    folder: Path
    learning_rate: float | None
    """None where its `run.yaml` is damaged."""
    tries: bool
    """Whether it only tries this rate."""
    planned: bool
    """Whether the experiment in the folder asks for it; True where none is noted."""
    state: State
    """`damaged`, where no process is at work, for a `run.yaml` or `result.json` that is not what was written."""
    step: int
    """Optimizer steps done."""
    steps: int | None
    """Steps of the whole run, where it has come far enough to know."""
    pace: float | None
    """Seconds per step, as the run measured them up to its end or its newest checkpoint; None before that."""
    error: str
    """First line of its error, when it failed, or what is damaged; of a run that is done, too."""


class Store:
    """The runs below one folder, each in a folder of its own that is called `<task>-<method>-<seed>-<id>`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def place(self, config: RunConfig, revision: str) -> Path:
        """Where this run is or would be. `revision` is that of its data, as `Task.revision` gives it."""
        return self.folder / f"{config.task['name']}-{config.method['name']}-{config.seed}-{run_id(config, revision)}"

    def create(self, config: RunConfig, revision: str) -> Path:
        """The folder of this run, made with its `run.yaml` where it was not there yet; arguments as for `place`.

        Raises InputError where nothing can be written.
        """
        folder = self.place(config, revision)
        if self._read(folder) is not None:
            return folder
        made_with = {"rankwise": rankwise.__version__, "data": revision}
        settings = {
            "id": run_id(config, revision),
            "made_with": made_with,
            **config.model_dump(mode="json", exclude={"runs"}),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "run.yaml", as_yaml(settings))
        except OSError as error:
            raise unwritable(self.folder, error) from None
        return folder

    def diverged(self, folder: Path) -> bool:
        """Whether a run has failed because its training diverged, which it would do again."""
        return self._failed_by(folder, "DivergedError")

    def lasting(self, folder: Path) -> bool:
        """Whether a run has failed by what it was given or by diverging, and so would fail again as it is."""
        return self._failed_by(folder, "InputError", "DivergedError")

    def _failed_by(self, folder: Path, *kinds: str) -> bool:
        last = next(reversed(error_lines(folder)), "") if self.state(folder) == "failed" else ""
        return last.partition(":")[0].rpartition(".")[2] in kinds

    def tries(self, folder: Path) -> bool:
        """Whether a run only tries a learning rate, and is in no table."""
        found = self._read(folder)
        return found is not None and found.config.tuning is not None

    def note_error(self, folder: Path, text: str) -> None:
        """Write why a run failed, or at least that it did: a full disk often has room for an empty file."""
        with suppress(OSError):
            try:
                write_whole(folder / "error.txt", text)
            except OSError:
                (folder / "error.txt").touch()

    def forget_error(self, folder: Path) -> None:
        """Let a failed run be begun again. Raises InputError where nothing can be written."""
        try:
            (folder / "error.txt").unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from None

    def note(self, experiment: Experiment) -> None:
        """Write the experiment beside its runs, for the report and for whoever looks later.

        Raises InputError where nothing can be written.
        """
        content = experiment.model_dump(
            mode="json", include={"vary", "chain", "tune", "report", "published"}, exclude_defaults=True
        )
        content = {"name": experiment.name, **experiment.base, **content}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "experiment.yaml", as_yaml(content))
        except OSError as error:
            raise unwritable(self.folder, error) from None
        self._write_plan(set())

    def plan(self, folders: Sequence[Path]) -> None:
        """Add `folders` to the runs that the experiment asks for, where one is noted. Raises as `note` does."""
        names = self.planned()
        if names is not None:
            self._write_plan(names | {folder.name for folder in folders})

    def planned(self) -> set[str] | None:
        """The names of the folders that the present experiment asks for; None where that is not noted."""
        try:
            return set(map(str, read_json(self.folder / PLAN)))
        except (OSError, ValueError, TypeError):
            return None

    def _write_plan(self, names: set[str]) -> None:
        try:
            write_whole(self.folder / PLAN, json.dumps(sorted(names), indent=1) + "\n")
        except OSError as error:
            raise unwritable(self.folder, error) from None

    def experiment(self) -> dict[str, Any]:
        """What `note` wrote (name, vary, tune, report, and the settings all runs share); {} where it is not there.

        Raises InputError where it is damaged.
        """
        file = self.folder / "experiment.yaml"
        try:
            return record.experiment(file)
        except InputError as error:
            raise InputError(f"{file} is damaged ({error}); the same rankwise compare writes it again") from None

    def described(self) -> tuple[dict[str, Any], str]:
        """What `experiment` gives and "", or {} and how it is damaged: its runs can be shown without it."""
        try:
            return self.experiment(), ""
        except InputError as error:
            return {}, str(error)

    def folders(self) -> list[Path]:
        """The folders that hold a run, or have held one, or cannot be looked into, by name.

        Raises InputError where the folder of runs is not there, or is the one above such folders, or below, or cannot
        be read.
        """
        try:
            inside = sorted(path for path in self.folder.iterdir() if not path.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.folder}: there is no such folder of runs{similar(self.folder)}") from None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be read: {(error.strerror or str(error)).lower()}") from None
        found = [path for path in inside if _of_run(path)]
        if not found and os.path.lexists(self.folder / "run.yaml"):
            raise InputError(f"{self.folder}: is one run; give the folder above it, {self.folder.resolve().parent}")
        if not found and (below := sorted({path.parents[1] for path in self.folder.glob("*/*/run.yaml")})):
            names = ", ".join(each.name for each in below[:5]) + (", …" if below[5:] else "")
            raise InputError(f"{self.folder}: the runs are one folder further down, in {names}; give {below[0]}")
        return found

    def config(self, folder: Path) -> RunConfig:
        """The settings of a run. Raises InputError where its `run.yaml` is missing, or not what was written."""
        found = self._read(folder)
        if found is None:
            raise InputError(f"{folder}: {DAMAGED}")
        return found.config

    def before(self, folder: Path) -> Path | None:
        """The folder of the run whose trained weights this run begins with; None for a run that begins afresh.

        Raises InputError where there should be one, of this version of rankwise and, if it has the same task, of
        the same data, and is none.
        """
        own = self._read(folder)
        if own is None or own.config.after is None:
            return None
        for other in self.folders():
            found = self._read(other)
            if found and found.config.digest() == own.config.after and _alike(found, own):
                return other
        raise InputError(f"{folder}: the run that it begins with is not in {self.folder}; run the whole chain there")

    def revision(self, folder: Path) -> str | None:
        """The revision of the data that the run was made with, where that is noted."""
        found = self._read(folder)
        return found.made_with["data"] if found and found.made_with else None

    def state(self, folder: Path) -> State:
        """How a run stands; see `Standing`."""
        if self.result(folder) is not None:
            return "done"
        if _held(folder / "run.lock"):
            return "running"
        if os.path.lexists(folder / "error.txt"):
            return "failed"
        if os.path.lexists(folder / "metrics.jsonl") or any(folder.glob("checkpoint-*")):
            return "stopped"
        return "pending"

    def standing(self, folder: Path) -> Standing:
        """How a run stands, with its progress and the first line of its error."""
        state = self.state(folder)
        step, steps = progress(folder)
        error, found = record.damage(folder), self._read(folder)
        rate = found.config.learning_rate if found else None
        tries = found is not None and found.config.tuning is not None
        if found is None:
            error = _unreadable(folder) or DAMAGED
        elif state == "failed":
            error = next(iter(error_lines(folder)), "without a message, as on a full disk; log.txt may say more")
        elif state != "done" and os.path.lexists(folder / "result.json"):
            error = "its result.json is not what was written there: the same rankwise compare or train makes it again"
            found = None if state != "running" else found
        if found is None and state != "running":
            state = "damaged"
        names = self.planned()
        planned = names is None or folder.name in names
        return Standing(folder, rate, tries, planned, state, step, steps, self._pace(folder, steps), error)

    def _pace(self, folder: Path, steps: int | None) -> float | None:
        result = self.result(folder)
        try:
            if result is not None:
                return float(result["cost"]["seconds"]) / steps if steps else None
            marks = {int(mark.parent.name.rpartition("-")[2]): mark for mark in folder.glob(f"checkpoint-*/{MARKER}")}
            newest = max(marks)
            pace = float(read_json(marks[newest])["carried"]["seconds"]) / newest
            return pace if 0 <= pace < math.inf else None
        except (OSError, ArithmeticError, ValueError, KeyError, TypeError):  # none there, or on its way out
            return None

    def result(self, folder: Path) -> dict[str, Any] | None:
        """The result of a finished run; None where it is not there, half written, or of some other run."""
        try:
            result = record.result(folder)
        except (OSError, InputError):
            return None
        found = self._read(folder)  # last: to read YAML takes long, and somebody may look at many runs each second
        if found is None or result["run"] != found.id:
            return None
        asked = {"name": result["method"], **result["options"]}
        same = all(asked.get(key) == value for key, value in found.config.method.items())
        rest = (result["seed"], result["learning_rate"]) == (found.config.seed, found.config.learning_rate)
        return result if same and rest else None

    def results(self, folders: Sequence[Path] | None = None) -> list[dict[str, Any]]:
        """The results of all finished runs (of those in `folders`), each with its `folder`, its `config` and `lineage`.

        The lineage of a run in a chain is the settings, without the seed, of the runs it goes back to, the first first.
        """
        found = ((folder, self.result(folder)) for folder in (self.folders() if folders is None else folders))
        return [
            {
                **result,
                "folder": folder,
                "config": self.config(folder).model_dump(mode="json", exclude={"runs"}),
                "lineage": self._lineage(folder),
            }
            for folder, result in found
            if result is not None
        ]

    def _lineage(self, folder: Path) -> list[dict[str, Any]]:
        try:
            before = self.before(folder)
        except InputError:
            return [{"unknown": True}]  # its folder is gone
        if before is None:
            return []
        settings = self.config(before).model_dump(mode="json", exclude={"runs", "seed", "after", "followed"})
        return [*self._lineage(before), settings]

    def _read(self, folder: Path) -> "_Kept | None":
        try:
            settings = read_yaml(folder / "run.yaml")
            name, made_with = str(settings.pop("id")), settings.pop("made_with", None)
            config = RunConfig.model_validate(settings)
            ours = made_with is not None and made_with["rankwise"] == rankwise.__version__
            if ours and run_id(config, made_with["data"]) != name:
                return None  # cut off or changed, it would go on as another run than the one that is named
            return _Kept(name, made_with, config)
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
        ):  # the errors of reading and of pydantic
            return None


Kind = Literal["prediction", "score", "statistics"]
"""The column of predictions.parquet that a main metric is computed from."""


class Answers(NamedTuple):
    """What a run said of the examples of its main evaluation split."""

    kind: Kind
    values: np.ndarray
    """Predictions or scores (n,), or statistics (n, k)."""
    labels: np.ndarray
    """(n,); the numbers of the examples where these are scores or statistics."""


def answers(folder: Path) -> Answers | None:
    """The answers of a finished run; None where there are none to be read, or no labels to compare them with."""
    computed: tuple[Kind, ...] = ("score", "statistics")
    try:
        file = need("pyarrow.parquet", "bench").ParquetFile(check_regular(folder / "predictions.parquet"))
        kind: Kind = next((each for each in computed if each in file.schema_arrow.names), "prediction")
        table = file.read(columns=["split", kind, "label" if kind == "prediction" else "idx"])
        table = table.rename_columns(["split", "values", "labels"])  # an error where one is not there
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        main = [place for place, split in enumerate(columns["split"]) if split == columns["split"][0]]
        values, labels = (np.asarray([columns[name][place] for place in main]) for name in ("values", "labels"))
    except (OSError, ValueError, KeyError):  # pyarrow's errors are of these kinds, and numpy's for uneven statistics
        return None
    return None if (labels == -1).all() else Answers(kind, values, labels)


def progress(folder: Path) -> tuple[int, int | None]:
    """Steps done and steps of the whole run, from `metrics.jsonl`; (0, None) before its first line."""
    lines = record.course(folder)
    steps = next((line["steps"] for line in lines if "steps" in line), None)
    return max((line["step"] for line in lines), default=0), steps


def _of_run(folder: Path) -> bool:
    try:
        return folder.is_dir() and not LEFT.isdisjoint(entry.name for entry in folder.iterdir())
    except OSError:
        return True  # nobody can tell, so it is not left out


def _unreadable(folder: Path) -> str:
    """Why nobody can say what a run is; "" where its settings can be read."""
    try:
        read_bytes(folder / "run.yaml")
    except FileNotFoundError:
        return "there is no run.yaml in it, so nobody can say which run it was"
    except InputError as error:
        return str(error).replace(f"{folder}/", "")
    return ""


def error_lines(folder: Path) -> list[str]:
    """The lines of a run's error; none where somebody has begun it again meanwhile."""
    try:
        return read_text(folder / "error.txt").strip().splitlines()
    except (OSError, InputError):
        return []


def _held(path: Path) -> bool:
    """Whether a live process holds the lock; the file itself stays behind when one is gone."""
    try:
        with opened(path) as file:
            # Shared, for the moment of the look: two that look at once do not take each other for the run.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except (OSError, InputError):
        return False  # no such file: nobody has begun
