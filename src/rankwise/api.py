"""What the command line does, one call each: `rw.compare("experiment.yaml")`, `rw.train(config)`, `rw.report(runs)`.

Wrong input is an InputError of one line. At SIGTERM or Ctrl-C the runs write a checkpoint, then SystemExit is raised;
the same call goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankwise.errors import SOME_FAILED, STOPPED, InputError
from rankwise.named import written
from rankwise.results.summary import Summary
from rankwise.runs import use
from rankwise.runs.record import rank_course
from rankwise.runs.several import Several
from rankwise.runs.store import Store
from rankwise.settings import read_yaml
from rankwise.sweep.compare import Outcome
from rankwise.sweep.progress import counted

if TYPE_CHECKING:
    from rankwise.commands.data import View
    from rankwise.commands.evaluate import Evaluated
    from rankwise.commands.predict import Predicted
    from rankwise.commands.shrink import Shrunk
    from rankwise.commands.suggest import Suggestion
    from rankwise.sweep.check import Source
    from rankwise.sweep.plan import One, Plan
    from rankwise.sweep.runners import Runner
    from rankwise.tasks import Task

Form = Literal["md", "csv", "latex"]
Settings = Mapping[str, Any] | Sequence[str]
"""Settings that win over the source's: `{"seed": [0, 1], "method.rank": 4}`, or as typed, `["seed=[0,1]"]`."""


@dataclass(frozen=True, kw_only=True)
class Report(Summary):
    """What the finished runs of one or more folders say: `rows`, `best`, `verdicts`, `notes`, and more.

    Attributes:
        store: the runs.
        whole: whether it is about all runs in the folder.
    """

    store: Store
    whole: bool = True

    @property
    def folder(self) -> Path:
        """The folder of the runs, or the first of several."""
        return self.store.folder

    def table(self, form: Form, columns: Sequence[str] = (), caption: str = "", bold: bool = False) -> str:
        """The best rows as one table in another format.

        Args:
            form: `md`, `csv` or `latex`.
            columns: which and in what order, by their headings or by what the CSV calls them; all when absent.
            caption: of a Markdown or LaTeX table.
            bold: whether the best score of each task stands out in such a table.
        """
        from rankwise.report import tables
        from rankwise.results.columns import chosen

        shown = chosen(self.best, columns)
        if form == "csv":
            return tables.csv(self.best, shown)
        return (tables.markdown if form == "md" else tables.latex)(self.best, shown, caption, bold)

    def write_page(self, out: Path | str | None = None) -> Path:
        """Write the page of the whole folder, by default `report.html` next to the runs, and return where it is.

        Raises InputError where the page of several folders is given no place.
        """
        from rankwise.report.html import write

        if out is None and isinstance(self.store, Several):
            raise InputError("a page of several folders belongs to none of them: say where to write it")
        return write(self.store, out, self if self.whole else None)


@dataclass(frozen=True, kw_only=True)
class Comparison(Report):
    """What an experiment's runs say, and what became of each run."""

    outcome: Outcome

    @classmethod
    def of(cls, store: Store, outcome: Outcome, folders: Sequence[Path]) -> Comparison:
        """Of the runs in `folders`."""
        whole = sorted(folders) == store.folders()
        return cls.of_store(store, folders, store=store, whole=whole, outcome=outcome)

    @property
    def code(self) -> int:
        """The exit code of the command: 0 all done, 3 some failed, 75 some stopped."""
        return SOME_FAILED if self.outcome.failed else STOPPED if self.outcome.stopped else 0

    def left(self) -> list[str]:
        """What is not done and what to do about it, a sentence each."""
        store, failed, stopped = Store(self.folder), self.outcome.failed, len(self.outcome.stopped)
        lasting, lines = sum(store.failure(folder).lasting for folder in failed), []
        if again := len(failed) - lasting:
            it = "it" if again == 1 else "them"
            lines.append(f"{counted(again)} failed; `rankwise retry {self.folder}` carries {it} out again")
        if lasting:
            errors, them = ("its error names", "it") if lasting == 1 else ("their errors name", "them")
            lines.append(
                f"{counted(lasting)} failed and would again until what {errors} is changed; "
                f"`rankwise status {self.folder}` shows {them}"
            )
        if stopped and not failed:
            were, them = ("was", "it") if stopped == 1 else ("were", "them")
            lines.append(f"{counted(stopped)} {were} stopped; the same command goes on with {them}")
        return lines

    def as_json(self) -> dict[str, Any]:
        states = ("done", "failed", "stopped")
        runs = {state: [path.name for path in getattr(self.outcome, state)] for state in states}
        return {"runs": str(self.folder), **runs, **super().as_json()}


@dataclass(frozen=True)
class Trained:
    """A run that is done: its folder, and what its `result.json` holds."""

    folder: Path
    result: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter."""
        return self.folder / "adapter"

    def ending(self) -> str:
        """The ranks, where the adapter is (or the model, if all of it has changed), and a command that uses it."""
        from rankwise.adapters.layouts import reading
        from rankwise.adapters.stored import stored
        from rankwise.ranks.report import by_kind

        folder = next((self.folder / name for name in ("adapter", "model") if (self.folder / name).is_dir()), None)
        if folder is None:
            return ""
        parts, course = [], rank_course(self.folder)
        if course and course[-1].ranks:
            parts.append(f"ranks, block by block\n{by_kind(course[-1].ranks)}\n")
        parts.append(f"{folder.name}: {folder}")
        with suppress(InputError):  # of another kind than LoRA, which other programs read as PEFT does or not at all
            parts += [reading(stored(folder))]
        if (found := use.read(folder)) is not None:
            parts.append(f"use it:  {found.command(self.folder)}")
        return "\n".join(filter(None, parts))

    def text(self) -> str:
        """Tables and notes of this run alone, as the terminal shows them."""
        [found] = Store(self.folder.parent).results([self.folder])
        if found.kind != "trial":
            return Summary([found]).text()
        score, split = found.metrics.get(found.score), found.splits.evaluation[0]
        scored = f"{found.score} {score} on {split.rows} rows of {split.name}"
        return f"learning rate {found.learning_rate:g}, tried for its experiment: {scored}"


def report(*runs: Path | str) -> Report:
    """What the finished runs in one or more folders say; several are read as one.

    Raises InputError for a folder without a run, and if none has finished.
    """
    if not runs:
        raise InputError("a report is of a folder of runs, or of several: give one")
    store = Store(runs[0]) if len(runs) == 1 else Several(runs)
    summary = Report.of_store(store, store=store)
    if not summary.results:
        if not store.folders():
            raise InputError(f"{runs[0]}: there is no run in it")
        raise InputError(f"{runs[0]}: no run in it has finished; `rankwise status {runs[0]}` says how they stand")
    return summary


def compare(
    experiment: Source,
    settings: Settings = (),
    *,
    runs: Path | str | None = None,
    jobs: int | None = None,
    runner: str = "local",
    options: Sequence[str] = (),
    reuse: bool = False,
    repeat: bool = False,
) -> Comparison:
    """Carry out an experiment, or what is left of it, and compare its methods.

    Args:
        experiment: a file, or its content, with `vary:`.
        settings: win over the experiment's.
        runs: folder of the runs; the experiment's own when absent.
        jobs: runs at once; as many as there is room for when absent.
        runner: where they are carried out, one of `local`, `ray`, `slurm`.
        options: of the runner, as `["cpus=4"]`.
        reuse: keep and go on with what other code or data has made.
        repeat: carry that out again.
    """
    sweep = runner_of(runner, options, jobs)
    planned = plan(experiment, overrides(settings, runs))
    return Comparison.of(planned.store, *planned.carry_out(sweep, reuse, repeat))


def retry(
    runs: Path | str,
    *,
    jobs: int | None = None,
    runner: str = "local",
    options: Sequence[str] = (),
    reuse: bool = False,
    repeat: bool = False,
) -> Comparison:
    """Carry out the failed runs of a folder again, and no others; arguments as for `compare`."""
    sweep = runner_of(runner, options, jobs)
    store = Store(runs)
    store.folders()  # what is wrong with the folder is said before torch is loaded
    from rankwise.sweep.plan import retry as carry_out

    outcome = carry_out(store, sweep, reuse, repeat)
    return Comparison.of(store, outcome, store.folders())


def train(
    config: Source | None = None,
    settings: Settings = (),
    *,
    runs: Path | str | None = None,
    reuse: bool = False,
    repeat: bool = False,
) -> Trained:
    """Carry out one run, from the start or from where it was stopped.

    Args:
        config: a file, its content, or the folder of a run; settings alone when absent.
        settings, runs, reuse, repeat: as for `compare`.
    """
    planned = one(config, overrides(settings, runs))
    return Trained(planned.folder, planned.carry_out(reuse, repeat))


def task(given: str | Mapping[str, Any]) -> Task:
    """The task that a file has at `task:`: a name, or a mapping of name (or `type`) and options.

    Raises InputError as for a file, in one line.
    """
    from rankwise.settings import Schema, load_task
    from rankwise.tasks import build, registry

    return build(load_task(given, Schema({}, registry())))


def data(config: Source | None = None, settings: Settings = (), *, row: int | None = None) -> View:
    """What the model of a run will see of its rows, without reading weights: `seen`, `lines()` and `as_json()`.

    Args:
        config, settings: as for `train`.
        row: this row alone, by its number or line in the file.
    """
    _check_readable(config)
    from rankwise.commands.data import View

    return View.of(config, overrides(settings, None), row)


def shrink(
    adapter: Path | str,
    data: Source | None = None,
    settings: Settings = (),
    *,
    tolerance: float,
    out: Path | str,
    heal: int = 0,
    retrain: bool = False,
    force: bool = False,
) -> Shrunk:
    """The smallest adapter whose score on held-out rows is not worse than the given one's by more than `tolerance`.

    Args:
        adapter: the folder of a PEFT adapter, or of a run.
        data: model and data, as for `train`; those of the run when absent. `settings` win over them.
        tolerance: in units of the task's main metric.
        out: folder to write; `force` replaces an adapter there.
        heal: optimizer steps for which each cut is trained on.
        retrain: train each size from the start, with its rank spread evenly over the layers, instead of cutting.
    """
    _check_readable(data)
    from rankwise.commands.shrink import Asked
    from rankwise.commands.shrink import shrink as carry_out

    asked = Asked.of(
        Path(adapter), data, overrides(settings, None), tolerance=tolerance, out=Path(out), heal=heal, retrain=retrain
    )
    return carry_out(asked, force)


def suggest(
    config: Source | None = None,
    settings: Settings = (),
    *,
    budget: int,
    steps: int | None = None,
    out: Path | str | None = None,
    force: bool = False,
    runs: Path | str | None = None,
    jobs: int | None = None,
    reuse: bool = False,
    repeat: bool = False,
) -> Suggestion:
    """Ranks for a LoRA of at most `budget` parameters, from two short searches on your data: see `config` and `ranks`.

    >>> mine = {"type": "classification", "dataset": "train.csv", "columns": {"text": "review", "label": "stars"}}
    >>> LoraConfig(**rw.suggest({"model": "roberta-base", "task": mine}, budget=300_000).config)

    Args:
        config, settings: model and data, as for `train`; targets and scale are those of its method.
        budget: parameters at most, without the head.
        steps: of each search; 100 when absent.
        out: file or folder to write to, see `Suggestion.write`; `force` replaces what is there.
        runs: folder in whose folder `suggest` the searches are kept; that of the configuration when absent.
        jobs, reuse, repeat: as for `compare`.
    """
    _check_readable(config)
    from rankwise.commands.suggest import STEPS, Wanted, check_free

    if out is not None:
        check_free(Path(out), force)
    runner = runner_of("local", [], jobs)
    wanted = Wanted.of(config, overrides(settings, runs), budget, STEPS if steps is None else steps)
    suggestion = wanted.carry_out(runner, reuse, repeat)
    if out is not None:
        suggestion.write(Path(out))
    return suggestion


def predict(
    source: Path | str,
    rows: Path | str | Iterable[Mapping[str, Any] | str],
    out: Path | str | None = None,
    settings: Settings = (),
    *,
    force: bool = False,
) -> list[dict[str, Any]] | Predicted:
    """Answer rows with an adapter, a run or a model: their classes with probabilities, values or texts.

    Args:
        source: folder of an adapter or of a run; or a folder or name of a model, with its task in `settings`.
        rows: mappings, or texts where the task reads one column; or a file (.csv, .jsonl, .parquet), with `out`.
        out: the file that the same rows are written to, with their answers; `-` for stdout.
        settings: win over what is saved next to the adapter, as `{"task.columns.text": "body", "batch_size": 8}`.
        force: replace `out` if it is there.

    Returns:
        The rows with their answers; for a file, how many there were.
    """
    from rankwise.commands.predict import check_files, predict_file, predict_rows
    from rankwise.commands.ready import Ready

    if isinstance(rows, str | Path) != (out is not None):
        raise InputError(
            "predict: rows from a file are written to one: give both rows=FILE and out=FILE, or rows alone"
        )
    if isinstance(rows, str | Path):
        check_files(str(rows), str(out), force)
        return predict_file(Ready.of(source, overrides(settings, None), str(rows)), str(rows), str(out))
    return predict_rows(Ready.of(source, overrides(settings, None), "rows"), rows)


def evaluate(*sources: Path | str, settings: Settings = (), rows: Path | str | None = None) -> Evaluated:
    """Score adapters, runs or models on the same rows, each against the first.

    Args:
        sources: folders of adapters or of runs; or folders or names of models, with their task in `settings`.
        settings: win over what is saved next to the adapters, as for `predict`.
        rows: a file (.csv, .jsonl, .parquet), all of whose rows are scored; those that the task holds out when absent.
    """
    if not sources:
        raise InputError("evaluate: give an adapter, the folder of a run, or a model")
    from rankwise.commands.evaluate import evaluate as score

    return score(sources, overrides(settings, None), None if rows is None else str(rows))


def plan(experiment: Source, settings: Sequence[str], dry: bool = False) -> Plan:
    """What `compare` would carry out; `dry` does not ask the hub about models that `rankwise archs` lists."""
    _check_readable(experiment)
    from rankwise.sweep.check import load_experiment
    from rankwise.sweep.plan import Plan

    return Plan.of(load_experiment(experiment, settings), dry)


def one(config: Source | None, settings: Sequence[str], dry: bool = False) -> One:
    """What `train` would carry out; `dry` as for `plan`."""
    _check_readable(config)
    from rankwise.sweep.plan import One

    return One.of(config, settings, dry)


def runner_of(name: str, options: Sequence[str], jobs: int | None) -> Runner:
    """The runner called `name`; arguments as for `compare`."""
    from rankwise.sweep.runners import runner

    return runner(name, [*options, *([f"jobs={jobs}"] if jobs else [])])


def overrides(settings: Settings, runs: Path | str | None) -> list[str]:
    """Settings as they are typed, the folder of runs among them."""
    folder = {"runs": str(runs)} if runs is not None else {}
    if not isinstance(settings, Mapping):
        return [*settings, *(f"{key}={json.dumps(value)}" for key, value in folder.items())]
    return [f"{key}={json.dumps(value, default=written)}" for key, value in {**settings, **folder}.items()]


def _check_readable(source: Source | None) -> None:
    """Say what is wrong with a file before the seconds that it takes to load torch."""
    if isinstance(source, str | Path) and not Path(source).is_dir():
        read_yaml(Path(source))
