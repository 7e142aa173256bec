"""What is to be carried out: one run (`One`), an experiment (`Plan`) or failed runs (`retry`).

Nothing is written before it is carried out.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise import tasks
from rankwise.errors import InputError, shown
from rankwise.processes.launched import is_main, launched
from rankwise.results.formats import plain
from rankwise.runs.maker import Maker, in_words
from rankwise.runs.run_file import maker_of
from rankwise.runs.store import Store
from rankwise.settings import Experiment, RunConfig, Span
from rankwise.sweep.changed import as_text, differing, dotted
from rankwise.sweep.check import Source, alone, check_models, expand, fit, load_run, memory_note
from rankwise.sweep.compare import Outcome, carry_out
from rankwise.sweep.makers import made_by_others, makers, settle, settle_begun
from rankwise.sweep.progress import counted
from rankwise.sweep.runners import Runner, typed
from rankwise.sweep.tune import RateSearch, reported, searches, tune_and_carry_out
from rankwise.train.run import run


@dataclass(frozen=True)
class One:
    """One run that is to be carried out, with nothing written yet."""

    store: Store
    folder: Path
    given: RunConfig | None = None
    """Its settings; None for the folder of a run, whose `run.yaml` has them."""
    maker: Maker | None = None
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
        maker = makers(store, [config])(config) if is_main() else None
        if maker is not None and noted is not None:
            words = in_words(differences) if (differences := maker.differs(noted)) else "the present code and data"
            differs = f"{source}: was made with {words}"
        return cls(store, store.place(config), config, maker, differs)

    @property
    def config(self) -> RunConfig:
        """Its settings. Raises InputError where the `run.yaml` of a folder is not what was written."""
        return self.given or self.store.config(self.folder)

    def carry_out(self, reuse: bool, repeat: bool) -> dict[str, Any]:
        """Settle, make the folder and train; what `result.json` then holds."""
        if is_main():
            if self.given is None or self.maker is None:
                settle_begun(self.store, [self.folder], reuse, repeat)
            else:
                self.store.check_before(self.given, self.maker)
                settle(self.store, {self.folder: self.maker}, reuse, repeat)
                self.store.create(self.given, self.maker)
        with redirect_stdout(sys.stderr):
            return run(self.folder)


def retry(store: Store, runner: Runner, reuse: bool, repeat: bool) -> Outcome:
    """Carry out the failed runs of a folder again, except rates at which training diverged: it would again."""
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
    searches: Sequence[RateSearch] = ()
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
        contests = experiment.contests
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
                how = made_by_others(store, others)
                raise InputError(f"{how}; the rest of their search needs the same; --repeat starts it again")
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
        with redirect_stdout(sys.stderr), runner.kept():  # by one round for the next
            return tune_and_carry_out(store, self.experiment.contests, create, runner)

    def made_by_others(self) -> str:
        """How many of these runs were made with other code or data, and what differs; "" for none."""
        others = self.store.others(self.wanted)
        return made_by_others(self.store, others) if others else ""

    def following(self, as_json: bool) -> list[str]:
        """How much memory the runs need if that is much, how many there are, unless that is in the JSON, and which will
        follow from their results, in words."""
        left = sum(self.store.state(folder) != "done" for folder in self.runs)
        lines = memory_note([*self.runs.values()])
        lines += [] if as_json else [f"{counted(len(self.runs))} in {self.store.folder}, {left} to carry out"]
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
