"""Two phases: learning rates are tried and scored on rows that are not reported, then the chosen ones are run for real.

What has been tried lies in the folder of runs, and nothing else is kept: started again, a search is played through from
its beginning, finds the runs that are done, and goes on where it was. So the rates that Optuna gives must follow from
the seed and from the scores before them alone, whatever the machine and the number of jobs.
"""

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rankwise.errors import need, shown
from rankwise.metrics import worth
from rankwise.results.tuning import Tuned, tuned
from rankwise.runs.store import Store
from rankwise.settings import Contest, RunConfig, Span
from rankwise.sweep.compare import Outcome, carry_out
from rankwise.sweep.progress import counted
from rankwise.sweep.runners import Runner

Place = Callable[[RunConfig], Path]
"""The folder of a run, made or only named."""
Rounds = Generator[list[float], Mapping[float, float], None]
"""Gives the rates to try next and takes what each is worth; a rate that is missing did not train to its end."""


class RateSearch:
    """One contest on its way to a rate."""

    def __init__(self, store: Store, contest: Contest, place: Place) -> None:
        self.contest = contest
        self._store, self._place = store, place
        self._rounds = rounds(contest)
        self._now: dict[float, list[Path]] = {}
        self.configs: dict[Path, RunConfig] = {}
        """The runs asked for until now."""
        if not self.contest.settled:
            self._ask(next(self._rounds))
            self.go_on()

    def go_on(self) -> None:
        """Past every round whose runs are all over."""
        while self._now and not self.left():
            scores = {rate: self._found(folders) for rate, folders in self._now.items()}
            try:
                self._ask(self._rounds.send({rate: _worth(found) for rate, found in scores.items() if found}))
            except StopIteration:
                self._now = {}

    def left(self) -> list[Path]:
        """The runs of this round that are not over; none when the search is."""
        return [
            folder
            for folders in self._now.values()
            for folder in folders
            if self._store.result(folder) is None and not self._store.failure(folder).diverged
        ]

    @property
    def rate(self) -> float | None:
        """The rate to report at, once the search is over; None before, and if no rate trained to its end."""
        if self.contest.settled:
            return self.contest.lowest
        return how.learning_rate if (how := self.chosen) else None

    @property
    def chosen(self) -> Tuned | None:
        """How the rate was chosen; None if it is not yet, or there was nothing to choose."""
        return None if self._now else self._found(list(self.configs))

    def _ask(self, rates: Sequence[float]) -> None:
        self._now = {}
        for rate in rates:
            configs = {self._place(config): config for config in self.contest.tried(rate)}
            self.configs |= configs
            self._now[rate] = list(configs)

    def _found(self, folders: Sequence[Path]) -> Tuned | None:
        done = [folder for folder in folders if self._store.result(folder) is not None]
        # a rate counts only if it trained to its end at every seed
        whole = len(self.contest.tune.seeds)
        found = tuned(self._store.results(done)) if done else None
        return found if found and any(rate.n == whole for rate in found.rates) else None


def rounds(contest: Contest) -> Rounds:
    """The rates of a list, all at once; of a range `trials` rates, `at_once` at a time."""
    if isinstance(contest.rates, Span):
        yield from _sampled(contest.rates, contest.tune.trials or 1, contest.tune.at_once, contest.tune.seeds[0])
    else:
        yield sorted(contest.rates)


def _sampled(span: Span, trials: int, at_once: int, seed: int) -> Rounds:
    """Optuna's tree-structured Parzen estimator on a logarithmic scale; half of the trials are drawn at random."""
    optuna = need("optuna", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=(trials + 1) // 2)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for begun in range(0, trials, at_once):
        drawn: list[tuple[Any, float]] = []
        for _ in range(min(at_once, trials - begun)):
            trial = study.ask()
            rate = trial.suggest_float("learning_rate", span.low, span.high, log=True)
            # three digits, which people can read and write again
            drawn.append((trial, min(max(float(f"{rate:.3g}"), span.low), span.high)))
        scores = yield list(dict.fromkeys(rate for _, rate in drawn))
        for trial, rate in drawn:
            if rate in scores:
                study.tell(trial, scores[rate])
            else:  # which counts as worse than all others
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def searches(store: Store, contests: Sequence[Contest], place: Place) -> list[RateSearch]:
    """A search for each contest, as far as finished runs take it; equal ones, such as of a method that has no size at
    two budgets, once."""
    known: dict[frozenset[Path], RateSearch] = {}
    for contest in contests:
        search = RateSearch(store, contest, place)
        # without runs that try a rate, those to be reported are as good
        asked = frozenset(search.configs or map(place, contest.reported(contest.lowest)))
        known.setdefault(asked, search)
    return list(known.values())


def reported(searches: Sequence[RateSearch]) -> list[RunConfig]:
    """The runs at the rates chosen, of the searches that are over: all of one seed before the next."""
    configs = [config for search in searches if (rate := search.rate) for config in search.contest.reported(rate)]
    return sorted(configs, key=lambda config: config.seed)


def tune_and_carry_out(
    store: Store, contests: Sequence[Contest], place: Place, runner: Runner, console: Console | None = None
) -> tuple[Outcome, list[Path]]:
    """Try rates until every contest has chosen one, carry out the runs at those, and return what became of all runs.

    A rate at which the training diverges is out of the contest and no failure. A contest of which another run fails, or
    in which every rate diverges, waits for `retry` or for the same call again; the others go on. Stopping and going on
    are those of `compare.carry_out`, and so are the errors; `place` makes the folders.
    """
    console = console or Console(file=sys.stderr)

    def say(text: str) -> None:
        console.print(shown(text), markup=False, highlight=False, soft_wrap=True)

    found = searches(store, contests, place)
    total, tried = Outcome(), set[Path]()
    while folders := _pending(found, tried):
        say(f"trying learning rates: {counted(len(folders))} on rows that are not reported")
        outcome = carry_out(store, folders, runner, console)
        tried.update(folders)
        total.stopped += outcome.stopped
        total.failed += [folder for folder in outcome.failed if not store.failure(folder).diverged]
        for search in found:
            search.go_on()
        store.plan(folder for search in found for folder in search.configs)  # also finished ones of later rounds
    for search in found:
        if search.contest.settled:
            say(f"{_called(search)}: learning rate {search.rate:g}, the only one given")
        elif (how := search.chosen) is None and not search.left():
            say(f"{_called(search)}: no rate trained to its end; try lower ones")
            total.failed += list(search.configs)
        elif how is None:
            say(f"{_called(search)}: not tuned yet")
        else:
            score = next(rate.mean for rate in how.rates if rate.learning_rate == how.learning_rate)
            where = f"{how.score} {score:.3f} on {how.split.rows:,} rows of {how.split.name}"
            say(f"{_called(search)}: learning rate {how.learning_rate:g} of {len(how.rates)} tried, {where}")
    total.done += [folder for search in found for folder in search.configs if store.state(folder) == "done"]
    final = list(dict.fromkeys(map(place, reported(found))))
    outcome = carry_out(store, final, runner, console)
    for state in ("done", "failed", "stopped"):
        getattr(total, state).extend(getattr(outcome, state))
    return total, [*dict.fromkeys(folder for search in found for folder in search.configs), *final]


def _pending(searches: Sequence[RateSearch], tried: set[Path]) -> list[Path]:
    """What is left of the rounds that are on, without what has been carried out and is not over all the same."""
    left = {folder: search.configs[folder].seed for search in searches for folder in search.left()}
    return sorted((folder for folder in left if folder not in tried), key=left.__getitem__)


def _worth(chosen: Tuned) -> float:
    """What the only rate of `chosen` is worth."""
    return worth(chosen.score, chosen.rates[0].mean)


def _called(search: RateSearch) -> str:
    config = search.contest.reported(search.contest.lowest)[0]
    size = "".join(f" {key} {config.method[key]}" for key in ("rank", "size") if key in config.method)
    return f"{config.task['name']} {config.method['name']}{size}"
