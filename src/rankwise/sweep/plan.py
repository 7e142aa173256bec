"""From a command to the runs that it is to carry out, with all that can be refused before a folder is made.

The settings are read and expanded, methods get the sizes that their budgets allow, and models and data are checked.
What would make each run now, its code and its data, is compared with what has made the runs that are there.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise import methods, published, tasks
from rankwise.errors import InputError, shown
from rankwise.methods import Method
from rankwise.processes.launched import is_main, launched
from rankwise.results.formats import plain
from rankwise.runs import grid
from rankwise.runs.maker import Maker, in_words
from rankwise.runs.run_file import maker_of
from rankwise.runs.store import Store
from rankwise.settings import Experiment, RunConfig, Schema, Span, load
from rankwise.sweep.changed import as_text, differing, dotted
from rankwise.sweep.compare import Outcome, carry_out
from rankwise.sweep.progress import counted
from rankwise.sweep.runners import Runner, typed
from rankwise.sweep.tune import Search, reported, searches, tune_and_carry_out
from rankwise.tasks.base import subset
from rankwise.train import budget, model
from rankwise.train.run import code_for, run

Source = str | Path | Mapping[str, Any]
"""A YAML file, or its content as a mapping."""


def schema() -> Schema:
    """All methods and tasks that there are."""
    return Schema(methods.registry(), tasks.registry())


def load_run(source: Source | None, settings: Sequence[str]) -> RunConfig:
    """The settings of one run. Raises InputError for an experiment, and for everything that is wrong with them."""
    config = load(source, settings, schema())
    if not isinstance(config, RunConfig):
        name = _named(source)
        raise InputError(f"{name}: has `vary:`, so it is an experiment: rankwise compare {name}")
    return config


def load_experiment(source: Source, settings: Sequence[str]) -> Experiment:
    """An experiment. Raises InputError for the settings of one run, and for everything that is wrong with them."""
    config = load(source, settings, schema())
    if isinstance(config, RunConfig):
        name = _named(source)
        raise InputError(f"{name}: has no `vary:`, so it is one run: rankwise train {name}")
    check_tables(config)
    return config


def _named(source: Source | None) -> str:
    return str(source) if isinstance(source, str | Path) else "these settings"


def check_tables(experiment: Experiment) -> None:
    """Refuse the name of a table that no paper has, before hours of training."""
    for table in experiment.published.tables if experiment.published else ():
        published.find(table)


def check_models(configs: Sequence[RunConfig], shipped: bool) -> None:
    """Refuse what does not fit its model, a rank, a target or a prefix, before anything is written.

    `shipped` does not ask the hub for what `rankwise archs` lists: nothing is to be trained.
    """
    settings = ("model", "task", "max_length", "label_smoothing", "trust_remote_code")
    wanted: dict[str, dict[str, Method]] = {}
    for config in configs:
        given = json.dumps({key: getattr(config, key) for key in settings}, sort_keys=True)
        option = json.dumps(config.method, sort_keys=True)
        if option not in (known := wanted.setdefault(given, {})):
            known[option] = methods.build(config.method)
    with redirect_stdout(sys.stderr):
        for given, known in sorted(wanted.items()):
            own = json.loads(given)
            task = tasks.build(own.pop("task"))
            model.check(own.pop("model"), task, [*known.values()], shipped=shipped, **own)


def fit(config: RunConfig) -> RunConfig:
    """With the size that its budget allows."""
    with redirect_stdout(sys.stderr):
        return budget.fit(config)


def alone(config: RunConfig, tries: bool = False) -> RunConfig:
    """A run without an experiment around it, at the size that its budget allows; `tries` if it may try a rate."""
    if config.tuning is not None and not tries:
        raise InputError("tuning: only the runs of an experiment with `tune:` hold rows out; leave it out")
    fitted = fit(config)
    if fitted.budget != config.budget:
        raise InputError(f"budget: {config.method['name']} has no size to choose; leave it out")
    return fitted


def expand(experiment: Experiment) -> list[RunConfig]:
    """The runs of an experiment, at the sizes that their budgets allow."""
    configs = grid.expand(experiment, fit)
    asked = experiment.base.get("budget") or "budget" in experiment.vary
    if asked and all(config.budget is None for config in configs):
        raise InputError("budget: none of the methods has a size to choose; leave it out")
    return configs


def _data(config: RunConfig) -> tuple[str, bool]:
    """What tells apart the data of runs: the task, and whether rows to choose a rate by are read."""
    return json.dumps(config.task, sort_keys=True), config.tuning is not None


def _revisions(configs: Sequence[RunConfig]) -> dict[tuple[str, bool], str]:
    """The revisions of the data of `configs`, by `_data`; each task is read once.

    Raises InputError where there are too few rows to train on and to choose a rate by.
    """
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(_data(config)[0], []).append(config)
    found = {}
    for name, group in groups.items():
        task = tasks.build(group[0].task)
        splits = [task.train(), *task.evaluation()]
        for rows, share in {(each.train_rows, each.tuning) for each in group}:
            if share is not None:
                task.tuning(subset(splits[0], rows), share)
        for tuning in {each.tuning is not None for each in group}:
            found[name, tuning] = task.revision(splits, tuning=tuning)
    return found


def makers(store: Store, configs: Sequence[RunConfig]) -> Callable[[RunConfig], Maker]:
    """What would make each of `configs` now, or another run of their tasks. Raises InputError as `_revisions` does."""
    revisions = _revisions(configs)
    known = {config.id: config for config in configs}

    def maker(config: RunConfig) -> Maker:
        before = ""
        if config.after is not None:
            first = known.get(config.after)
            before = maker(first).name if first else store.named(config.after)
        return Maker.now(revisions[_data(config)], code_for(config), before)

    return maker


def settle(store: Store, wanted: Mapping[Path, Maker], reuse: bool, repeat: bool) -> None:
    """Refuse runs that others have begun or done than are `wanted`, unless the user says what is to become of them."""
    if reuse and repeat:
        raise InputError("--reuse and --repeat: choose one")
    others = store.others(wanted)
    if others and not (reuse or repeat):
        raise InputError(f"{made_by_others(store, others)}; --reuse keeps them, --repeat carries them out again")
    for folder in others:
        if repeat:
            store.clear(folder)
        elif store.result(folder) is None:
            store.take_over(folder, wanted[folder])


def settle_begun(store: Store, folders: Sequence[Path], reuse: bool, repeat: bool) -> None:
    """`settle` for what has been begun of the runs in `folders`, which are to go on."""
    begun = {folder: store.config(folder) for folder in folders if store.begun(folder) and store.maker(folder)}
    maker = makers(store, list(begun.values()))
    settle(store, {folder: maker(config) for folder, config in begun.items()}, reuse, repeat)


def made_by_others(store: Store, others: Mapping[Path, list[str]]) -> str:
    """How many runs other code or data has made, and what differs."""
    done = sum(store.result(folder) is not None for folder in others)
    counts = [f"{count} {what}" for count, what in ((done, "finished"), (len(others) - done, "begun")) if count]
    runs = "run was" if len(others) == 1 else "runs were"
    return f"{' and '.join(counts)} {runs} made with {in_words(each for found in others.values() for each in found)}"


@dataclass(frozen=True)
class Checked:
    """Settings in which nothing is wrong, and the runs that they mean."""

    config: RunConfig | Experiment
    runs: Sequence[RunConfig]

    @classmethod
    def of(cls, source: Source, settings: Sequence[str]) -> "Checked":
        """Raises InputError for all that a run would refuse before it reads weights."""
        config = load(source, settings, schema())
        if isinstance(config, RunConfig):
            config = alone(config)
            runs = [config]
        else:
            check_tables(config)
            runs = expand(config)
        check_models(runs, shipped=True)
        return cls(config, runs)

    def __str__(self) -> str:
        if isinstance(self.config, RunConfig):
            return "one run"
        tuned = ", after those that choose their learning rates" if self.config.tune else ""
        return f"an experiment of {counted(len(self.runs))}{tuned}"


@dataclass(frozen=True)
class One:
    """One run that is to be carried out, with nothing written yet."""

    store: Store
    folder: Path
    given: RunConfig | None = None
    """Its settings; None for the folder of a run, whose `run.yaml` has them."""
    made: Maker | None = None
    """What would make it now; None for the folder of a run."""
    differs: str = ""
    """How that differs from what made the run whose `run.yaml` was given, in words."""

    @classmethod
    def of(cls, source: Source | None, settings: Sequence[str], shipped: bool) -> "One":
        """From a file, its content or the folder of a run. InputError for all that the run would refuse.

        `shipped`: see `check_models`.
        """
        launched()  # says what is wrong with the environment before a folder is made
        if isinstance(source, str | Path) and Path(source).is_dir():
            if settings:
                raise InputError(f"{settings[0]}: the settings of a run are in its run.yaml and stay as they are")
            folder = Path(source)
            return cls(Store(folder.parent), folder)
        noted = maker_of(Path(source)) if isinstance(source, str | Path) else None
        config = alone(load_run(source, settings), tries=noted is not None)
        check_models([config], shipped)
        store, differs = Store(config.runs), ""
        made = makers(store, [config])(config) if is_main() else None
        if made is not None and noted is not None:
            words = in_words(differences) if (differences := made.differs(noted)) else "the code and data that are here"
            differs = f"{source}: was made with {words}"
        return cls(store, store.place(config), config, made, differs)

    @property
    def config(self) -> RunConfig:
        """Its settings. Raises InputError where the `run.yaml` of a folder is not what was written."""
        return self.given or self.store.config(self.folder)

    def carry_out(self, reuse: bool, repeat: bool) -> dict[str, Any]:
        """Settle, make the folder and train; what `result.json` then holds."""
        if is_main():
            if self.given is None or self.made is None:
                settle_begun(self.store, [self.folder], reuse, repeat)
            else:
                self.store.check_before(self.given, self.made)
                settle(self.store, {self.folder: self.made}, reuse, repeat)
                self.store.create(self.given, self.made)
        with redirect_stdout(sys.stderr):
            return run(self.folder)


def retry(store: Store, runner: Runner, reuse: bool, repeat: bool) -> Outcome:
    """Carry out the failed runs of a folder again, but for rates at which training diverged: it would again."""
    failed = [
        folder
        for folder in store.folders()
        if store.state(folder) == "failed" and not (store.tries(folder) and store.failure(folder).diverged)
    ]
    if not failed:
        print(shown(f"{store.folder}: no run has failed"), file=sys.stderr)
    settle_begun(store, failed, reuse, repeat)
    return carry_out(store, failed, runner)


@dataclass(frozen=True)
class Plan:
    """What `compare` is to carry out, with nothing written yet."""

    store: Store
    experiment: Experiment
    runs: Mapping[Path, RunConfig]
    """By its folder each run; with `tune:` those known by now."""
    maker: Callable[[RunConfig], Maker]
    searches: Sequence[Search] = ()
    """With `tune:` the choices of a learning rate."""

    @classmethod
    def of(cls, experiment: Experiment, shipped: bool) -> "Plan":
        """All that a run would refuse before it reads weights is an InputError here. `shipped`: see `check_models`."""
        store, configs = Store(experiment.runs), expand(experiment)
        check_models(configs, shipped)
        if experiment.tune is None:
            return cls(store, experiment, {store.place(each): each for each in configs}, makers(store, configs))
        for task in (tasks.build(config.task) for config in configs):
            if not task.main:
                raise InputError(f"tune: {task.name} has no score to choose a learning rate by; leave it out")
        contests = list(experiment.contests())
        tried = [config for contest in contests if not contest.settled for config in contest.tried(contest.lowest)]
        maker = makers(store, [*configs, *map(fit, tried)])
        found = searches(store, contests, lambda config: store.place(fit(config)))
        known = [*(config for search in found for config in search.configs.values()), *reported(found)]
        return cls(store, experiment, {store.place(each): each for each in map(fit, known)}, maker, found)

    @property
    def wanted(self) -> dict[Path, Maker]:
        """By its folder what would make each run now."""
        return {folder: self.maker(config) for folder, config in self.runs.items()}

    def carry_out(self, runner: Runner, reuse: bool, repeat: bool) -> tuple[Outcome, list[Path]]:
        """Settle, make the folders and carry out; what became of the runs, and all of their folders."""
        store, wanted = self.store, self.wanted
        if reuse and not repeat:
            unsettled = {
                each: wanted[each] for search in self.searches if search.rate is None for each in search.configs
            }
            if others := store.others(unsettled):
                raise InputError(
                    f"{made_by_others(store, others)}; what is left of their search cannot be tried with this: --repeat"
                )
        if self.experiment.tune is None or not repeat:  # else each is dropped when its turn comes, if it does
            settle(store, wanted, reuse, repeat)
        if self.experiment.tune is None:
            folders = [store.create(config, wanted[folder]) for folder, config in self.runs.items()]
            store.note(self.experiment, folders)
            return carry_out(store, folders, runner), folders

        def create(config: RunConfig) -> Path:
            config = fit(config)
            settle(store, {store.place(config): self.maker(config)}, reuse, repeat)
            return store.create(config, self.maker(config))

        store.note(self.experiment, self.runs)
        return tune_and_carry_out(store, list(self.experiment.contests()), create, runner)

    def made_by_others(self) -> str:
        """How many of these runs other code or data has made, and what differs; empty for none."""
        others = self.store.others(self.wanted)
        return made_by_others(self.store, others) if others else ""

    def following(self, as_json: bool) -> list[str]:
        """How many runs there are, unless that is in the JSON, and what will follow from what they find, in words."""
        left = sum(self.store.state(folder) != "done" for folder in self.runs)
        lines = [] if as_json else [f"{counted(len(self.runs))} in {self.store.folder}, {left} to carry out"]
        if self.experiment.tune is None:
            return lines
        waiting = [search.contest for search in self.searches if search.rate is None]
        further = any(isinstance(contest.rates, Span) for contest in waiting)
        runs = sum(len(contest.seeds) for contest in waiting)
        last = f"then {counted(runs)}, each at the learning rate chosen for it"
        return [*lines, *(["further rates follow from what these score"] if further else []), last]

    def text(self, everything: bool) -> str:
        """A row for each run, and with `everything` the settings of the experiment."""
        table = plain(*self.table())
        return f"{table}\n\n{as_text(self.experiment, everything)}" if everything else table

    def as_json(self) -> list[dict[str, Any]]:
        """What `rankwise compare --dry-run --json` prints."""
        return [
            {
                "run": folder.name,
                "state": self.store.state(folder),
                "config": config.model_dump(mode="json", exclude={"runs"}),
            }
            for folder, config in self.runs.items()
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A head and a row for each run, with a column for each setting that differs and, last, how the run stands."""
        settings = [dotted(config) for config in self.runs.values()]
        more = [key for key in differing(settings) if key not in ("method", "seed")]
        chosen = any(config.tuning is not None for config in self.runs.values())
        rows = [
            [
                folder.name,
                config.method["name"],
                f"{config.learning_rate:g}",
                str(config.seed),
                *(typed(own[key]) if key in own else "" for key in more),
                *(["reporting" if config.tuning is None else "choosing"] if chosen else []),
                self.store.state(folder),
            ]
            for (folder, config), own in zip(self.runs.items(), settings, strict=True)
        ]
        return ["run", "method", "learning rate", "seed", *more, *(["for"] if chosen else []), "state"], rows
