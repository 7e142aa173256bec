"""The smallest adapter whose score on rows held out is not worse than the given one's by more than a tolerance.

Budgets from one unit of rank up to the whole adapter, each 2^¼ times the one before, are bisected. For each, the best
cut within it (`adapters.cut`) is made, and trained on for some steps where that is asked for; or an adapter of that
size is trained from the start. It passes if the 95 % interval of its score minus the given one's, by the paired
bootstrap over the rows, is within the tolerance; where the interval cannot tell, it does not pass. It is assumed that a
smaller adapter is never better.

The best of several on some rows looks better on these than it is. So one half of the rows chooses, and the other half,
on which nothing was chosen, reports.

What has been tried is kept in OUT.partly until the end, from where the same command goes on after a kill.
"""

import hashlib
import json
import math
import shutil
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np

from rankwise import tasks
from rankwise.adapters.cut import Limit, cut
from rankwise.adapters.stored import StoredAdapter, check_free, stored
from rankwise.commands.ready import Ready, config_of, trained_by
from rankwise.commands.smaller import check_retrainable, heal, largest, retrain, retraining
from rankwise.errors import InputError, need
from rankwise.files import ADAPTER, check_replaceable, read_json, replace_folder, tidy, unfinished, write_whole
from rankwise.metrics import METRICS, Metric, with_direction, worth
from rankwise.metrics.bootstrap import Predictions, interval, scored
from rankwise.metrics.metric import Interval
from rankwise.pictures.style import COLOURS, legend, new_figure, set_title, styled, svg
from rankwise.processes.stop import Stop, stoppable
from rankwise.results.formats import plain, size, span
from rankwise.results.predictions import predictions
from rankwise.runs.maker import Maker
from rankwise.settings import RunConfig
from rankwise.sweep.check import Source, load_one
from rankwise.tasks import subset
from rankwise.train import model as models
from rankwise.train.run import code_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = 2**0.25
"""Ratio of neighbouring budgets."""
ROUNDING = 1e-9
"""What the ends of an interval may be off by."""
NOTE = "asked.json"
"""In the folder of what has been tried: what it is for."""
ATTEMPT = "attempt.json"
"""Written last into the folder of an adapter that has been tried: its parameters and bytes."""
PREDICTIONS = "predictions.parquet"
CONFIG, _, WEIGHTS = ADAPTER[:3]


@dataclass(frozen=True)
class Half:
    """What an adapter scores on one half of the rows, how far that is above the given one, and the 95 % interval."""

    score: float
    gap: float
    interval: Interval


@dataclass(frozen=True)
class Attempt:
    """An adapter that has been tried.

    Attributes:
        budget: parameters that it was allowed. parameters: those of its factors. bytes: of the file with its weights.
        chosen: on the rows that choose. reported: on the others.
        passes: whether the interval on the rows that choose is within the tolerance.
    """

    budget: int
    parameters: int
    bytes: int
    chosen: Half
    reported: Half
    passes: bool


@dataclass(frozen=True)
class Asked:
    """What is to be shrunk, and how.

    Attributes:
        adapter: the given one. config: model and data to score it on. training: the settings to heal or retrain with.
        tolerance: by how much the score may be worse. heal: steps for which each cut is trained on.
        retrain: whether each size is trained from the start instead of cut. out: the folder to write.
    """

    adapter: StoredAdapter
    config: RunConfig
    tolerance: float
    heal: int
    retrain: bool
    out: Path
    training: RunConfig | None = None

    @classmethod
    def of(
        cls,
        path: Path,
        source: Source | None,
        settings: Sequence[str],
        *,
        tolerance: float,
        out: Path,
        heal: int = 0,
        retrain: bool = False,
    ) -> "Asked":
        """`path` is an adapter, or the folder of a run; without `source`, it is scored on what is saved next to it.

        Raises InputError where it is not known what to score it on, or the score of some rows is not a sum over them.
        """
        adapter = stored(path)
        adapter.check_linear("a cut")
        config = config_of(path, settings) if source is None else load_one(source, settings)
        task = tasks.build(config.task)
        if not METRICS.get(task.main, Metric()).of_any_sum or not task.main:
            what = f"{task.main} of some rows is not a sum over them" if task.main else f"{task.name} has no score"
            raise InputError(f"{what}, so adapters cannot be compared by it: choose another metric or task")
        if adapter.config is None:
            raise InputError(f"{path}: is a single file, which PEFT does not load: shrink the folder of a PEFT adapter")
        if retrain and heal:
            raise InputError("heal is for cuts, and with retrain nothing is cut: leave one of them out")
        training = None
        if heal or retrain:
            training = trained_by(path, settings) if source is None else config
        if retrain and training:
            check_retrainable(adapter, training)
        return cls(adapter, config, tolerance, heal, retrain, out, training)

    @property
    def total(self) -> int:
        """Parameters of the given adapter's factors."""
        return sum(layer.rank * sum(layer.size) for layer in self.adapter.layers.values())

    @property
    def budgets(self) -> list[int]:
        """What may be tried, from the least that leaves any rank to less than all."""
        costs = [self.adapter.cost(name) for name in self.adapter.names]
        fixed = self.total - sum(self.adapter.rank(name) * self.adapter.cost(name) for name in self.adapter.names)
        least = max(costs, default=self.total) if self.retrain else fixed + min(costs, default=self.total)
        most = min(self.total, largest(self.adapter) * sum(costs)) if self.retrain else self.total
        found, budget = list[int](), most / STEP
        while budget > least:
            found.append(int(budget))
            budget /= STEP
        return [*([least] if least < self.total else []), *reversed(found)]

    @cached_property
    def digest(self) -> str:
        """16 hex digits of all that decides what is found, the rows and the code among them."""
        maker = Maker.now(tasks.build(self.config.task).revision(), code_for(self.config))
        asked = [self.config.id, self.training and self.training.id, self.heal, self.retrain, maker.name]
        found = hashlib.sha256(json.dumps(asked).encode())
        for file in self.adapter.tensors.files:
            with file.open("rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
        found.update(json.dumps(self.adapter.config, sort_keys=True, default=str).encode())
        return found.hexdigest()[:16]

    def within(self, half: Half) -> bool:
        """Whether the interval says that the score is not worse by more than the tolerance."""
        return min(worth(self.metric, end) for end in half.interval) >= -self.tolerance - ROUNDING

    @property
    def metric(self) -> str:
        """The score that is compared."""
        return tasks.build(self.config.task).main


@dataclass(frozen=True)
class Shrunk:
    """What has been found.

    Attributes:
        asked: what was to be shrunk. given: the given adapter.
        attempts: what was tried, the smallest first. best: the smallest that passes; None if none does.
        rows: how many rows choose, and how many report.
    """

    asked: Asked
    given: Attempt
    attempts: Sequence[Attempt]
    best: Attempt | None
    rows: tuple[int, int]

    @property
    def folder(self) -> Path:
        """The folder of the smallest adapter; of the given one's copy if no smaller one passes."""
        return self.asked.out

    def lines(self) -> Iterator[str]:
        """The curve of score against bytes, and what was chosen, in words."""
        asked, metric = self.asked, with_direction(self.asked.metric)
        choose, report = self.rows
        yield f"{metric} on {choose:,} rows that choose and {report:,} that report, and the gap to the given adapter"
        yield ""
        header = ["parameters", "bytes", asked.metric, "gap", "95 % interval", "reported", "gap", "95 % interval", ""]
        rows = []
        for attempt in [*self.attempts, self.given]:
            halves = (
                half for each in (attempt.chosen, attempt.reported) for half in _cells(each, attempt is self.given)
            )
            best = self.best is not None and attempt.parameters == self.best.parameters
            verdict = "given" if attempt is self.given else "chosen" if best else "passes" * attempt.passes
            rows.append([f"{attempt.parameters:,}", size(attempt.bytes), *halves, verdict])
        yield plain(header, rows)
        yield ""
        within = f"not worse by more than {asked.tolerance:g}"
        if self.best is None:
            yield f"no smaller adapter is shown to be {within}; {asked.out} is a copy of the given one"
            if self.attempts:
                most = -min(worth(asked.metric, end) for end in self.attempts[-1].chosen.interval)
                yield f"the largest of them may be worse by {most:.3f}: score on more rows, or allow more"
            return
        how = f", trained on for {asked.heal} steps" if asked.heal else ""
        if asked.retrain and asked.training:
            rate = retraining(asked.adapter, asked.training, self.best.budget).learning_rate
            how = f", trained from the start at rate {rate:g}"
        yield (
            f"the smallest that is {within}: {self.best.parameters:,} parameters{how}, {size(self.best.bytes)} of "
            f"{size(self.given.bytes)}"
        )
        low, high = self.best.chosen.interval
        if low == high:
            count = self.rows[0]
            unseen = 1 - 0.05 ** (1 / count)  # what happens more often is seen in so many rows, 95 times in 100
            yield (
                f"none of the {count:,} rows that chose it scores differently; of other rows, up to {unseen:.1%} may "
                "(95 %)"
            )
        half = self.best.reported
        yield f"on the rows that did not choose it: {half.gap:+.3f} (95 %: {span(half.interval)})"
        if not asked.within(half):
            yield f"these rows alone do not show that it is {within}"

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "folder": str(self.folder),
            "metric": self.asked.metric,
            "tolerance": self.asked.tolerance,
            "heal": self.asked.heal,
            "retrain": self.asked.retrain,
            "rows": {"choose": self.rows[0], "report": self.rows[1]},
            "given": asdict(self.given),
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "best": self.best and asdict(self.best),
        }

    def save_picture(self, file: Path) -> Path:
        """Draw score against bytes as an SVG file."""
        write_whole(file, svg(self.picture()))
        return file

    @styled
    def picture(self) -> "Figure":
        """Score against bytes on both halves of the rows, each with the interval of its gap to the given adapter."""
        figure, axes = new_figure(3.4)
        attempts = [*self.attempts, self.given]
        for place, name in enumerate(("chosen", "reported")):
            halves: list[Half] = [getattr(attempt, name) for attempt in attempts]
            given: Half = getattr(self.given, name)
            scores = np.array([half.score for half in halves])
            ends = np.array([[given.score + end for end in half.interval] for half in halves]).T
            axes.errorbar(
                [attempt.bytes * (1 + 0.03 * place) for attempt in attempts],
                scores,
                yerr=np.abs(ends - scores),
                fmt="os"[place],
                color=COLOURS[place],
                capsize=2,
                label=("rows that choose", "rows that report")[place],
            )
        allowed = worth(self.asked.metric, 1.0) * self.asked.tolerance
        axes.axhline(self.given.chosen.score - allowed, color="#777777", linewidth=0.8, linestyle=":")
        if self.best is not None:
            axes.axvline(self.best.bytes, color="#777777", linewidth=0.8)
        axes.set(xscale="log", xlabel="size of the adapter's weights", ylabel=with_direction(self.asked.metric))
        low, high = (math.log2(end) for end in axes.get_xlim())
        ticks = [2.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
        ticks = ticks or [each.bytes for each in attempts]
        ticks = ticks[:: len(ticks) // 6 + 1]
        axes.set_xticks(ticks, [size(tick) for tick in ticks])
        axes.minorticks_off()
        set_title(axes, f"{self.asked.metric} and size, with 95 % intervals of the gap to the given adapter")
        legend(figure, axes, "dotted: the least that the tolerance allows; line: what was chosen")
        return figure


def shrink(asked: Asked, force: bool = False) -> Shrunk:
    """Try budgets until the smallest that passes is known, and write it to `asked.out`, complete or not at all.

    What an earlier call with the same adapter, data and settings has tried is used again. Raises SystemExit(75) at
    SIGTERM and SystemExit(130) at Ctrl-C; the same call goes on from there.
    """
    check_free(asked.out, asked.adapter, force)
    work = asked.out.with_name(f"{asked.out.name}.partly")
    if not (work / NOTE).exists():
        tidy(work)  # of a kill before the note was whole
        check_replaceable(work, {"lock"}, "an unfinished `rankwise shrink`")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(work / "lock", timeout=0), stoppable() as stop, models.quiet():
            found = _search(asked, work, stop)
            chosen = found.best or found.given
            with unfinished(asked.out, folder=True) as temporary:
                new = temporary / "adapter"
                shutil.copytree(work / str(chosen.budget) / "adapter", new)
                replace_folder(asked.out, new)
    except filelock.Timeout:
        raise InputError(f"{work}: another process is at work on it; wait for it, or end it") from None
    except InputError:
        if not any(work.glob(f"*/{ATTEMPT}")):  # nothing to go on from
            shutil.rmtree(work)
        raise
    except SystemExit:
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise
    shutil.rmtree(work)
    return found


def _search(asked: Asked, work: Path, stop: Stop) -> Shrunk:
    tries = _Tries(asked, work, stop)
    given, budgets = tries.attempt(asked.total), asked.budgets
    place = bisect_left(budgets, True, key=lambda budget: tries.attempt(budget).passes)
    best = tries.attempt(budgets[place]) if place < len(budgets) else None
    # cuts within several budgets may be the same
    attempts = {each.parameters: each for each in tries.attempts.values() if each is not given}
    rows = len(tries.halves[0]), len(tries.halves[1])
    return Shrunk(asked, given, [attempts[parameters] for parameters in sorted(attempts)], best, rows)


class _Tries:
    """What has been tried, in memory and in the folder `work`."""

    def __init__(self, asked: Asked, work: Path, stop: Stop) -> None:
        self.asked, self.work, self.stop = asked, work, stop
        self.attempts: dict[int, Attempt] = {}
        note = work / NOTE
        if not note.is_file() or read_json(note) != asked.digest:
            for path in work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            write_whole(note, json.dumps(asked.digest))
        self.given = self._answers(asked.total)
        order = np.random.default_rng(0).permutation(len(self.given.labels))
        self.halves = [np.sort(order[half::2]) for half in (0, 1)]

    def attempt(self, budget: int) -> Attempt:
        """An adapter within a budget; the given one if that is all of it."""
        if budget not in self.attempts:
            answers = self._answers(budget)
            chosen, reported = (self._half(answers, rows) for rows in self.halves)
            made = read_json(self.work / str(budget) / ATTEMPT)
            attempt = Attempt(budget, made["parameters"], made["bytes"], chosen, reported, self.asked.within(chosen))
            self.attempts[budget] = attempt
            print(f"{attempt.parameters:,} parameters: {chosen.gap:+.4f} ({span(chosen.interval)})", file=sys.stderr)
        return self.attempts[budget]

    def _half(self, answers: Predictions, rows: np.ndarray) -> Half:
        metric = self.asked.metric
        ours, theirs = (
            each._replace(values=each.values[rows], labels=each.labels[rows]) for each in (answers, self.given)
        )
        found, score, given = interval(metric, [ours], [theirs]), scored(metric, ours), scored(metric, theirs)
        if found is None or score is None or given is None:
            raise InputError(f"{metric} has no interval on these rows: choose another metric, or score more rows")
        return Half(score, score - given, found)

    def _answers(self, budget: int) -> Predictions:
        """The answers of the adapter within a budget, which is made, trained on and asked unless it has been."""
        folder = self.work / str(budget)
        if not (folder / ATTEMPT).is_file():
            config = self.asked.config
            training = self.asked.training if budget < self.asked.total else None
            if self.asked.retrain and training:
                parameters = retrain(self.asked.adapter, training, budget, folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                parameters = cut(
                    self.asked.adapter, self.asked.adapter, Limit(budget=budget), folder / "adapter"
                ).parameters
                if training:
                    heal(folder / "adapter", training.model_copy(update={"max_steps": self.asked.heal}), self.stop)
            ready = Ready.by(folder / "adapter", config)
            split = subset(ready.task.evaluation()[0], config.eval_rows)
            rows = ready.score(ready.encoded(split), final=True).rows  # some scores are not computed before the end
            need("pyarrow.parquet", "bench").write_table(rows, folder / PREDICTIONS)
            made = {"parameters": parameters, "bytes": (folder / "adapter" / WEIGHTS).stat().st_size}
            write_whole(folder / ATTEMPT, json.dumps(made))
        found = predictions(folder)
        if found is None:
            raise InputError(f"{self.asked.metric}: the rows have no labels to score adapters by")
        return found


def _cells(half: Half, given: bool) -> list[str]:
    return [f"{half.score:.3f}", *(["", ""] if given else [f"{half.gap:+.3f}", span(half.interval)])]
