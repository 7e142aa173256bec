"""How learning rates were chosen, by the runs that only try one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rankwise.metrics import worth
from rankwise.results.labels import CHAIN
from rankwise.results.stats import mean, sd
from rankwise.runs.result import Finished, Split

Edge = Literal["lowest", "highest", ""]
_PHASE = {"tuning", "eval_every"}
"""Settings in which a run that tries a rate differs from one that is reported, besides rate and seed."""


@dataclass(frozen=True)
class Rate:
    """A learning rate that was tried and trained to its end. `scores`: by seed."""

    learning_rate: float
    scores: Mapping[int, float]

    @property
    def n(self) -> int:
        """How many seeds it was tried at."""
        return len(self.scores)

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean(list(self.scores.values()))

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over the seeds; None for one."""
        return sd(list(self.scores.values()))

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        named = {"learning_rate": self.learning_rate, "scores": dict(self.scores)}
        return {**named, "n": self.n, "mean": self.mean, "sd": self.sd}


@dataclass(frozen=True)
class Tuned:
    """How a learning rate was chosen.

    Attributes:
        split: the rows it was chosen on.
        score: name of the metric.
        seeds: those at which rates were tried.
        rates: those that trained to their end, the lowest first.
        learning_rate: the one that was chosen.
        tied: other rates that scored the same at as many seeds.
        edge: where the best rate is alone the best and is the lowest or the highest of those tried, which.
    """

    split: Split
    score: str
    seeds: Sequence[int]
    rates: Sequence[Rate]
    learning_rate: float
    tied: Sequence[float] = ()
    edge: Edge = ""

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "split": self.split.name,
            "rows": self.split.rows,
            "note": self.split.note,
            "score": self.score,
            "seeds": list(self.seeds),
            "rates": [rate.as_json() for rate in self.rates],
            "learning_rate": self.learning_rate,
            "tied": list(self.tied),
            "edge": self.edge,
        }


def tuned(results: Sequence[Finished]) -> Tuned | None:
    """The rate chosen from runs that differ only in rate and seed; None if none of them has a score."""
    by_rate: dict[float, dict[int, float]] = {}
    for result in sorted(results, key=lambda result: (result.learning_rate, result.seed)):
        if result.score in result.metrics:
            by_rate.setdefault(result.learning_rate, {})[result.seed] = result.metrics[result.score]
    if not by_rate:
        return None
    rates = [Rate(rate, scores) for rate, scores in by_rate.items()]
    (chosen, *tied), edge = best(rates, results[0].score)
    return Tuned(
        results[0].splits.evaluation[0],
        results[0].score,
        sorted({seed for scores in by_rate.values() for seed in scores}),
        rates,
        chosen.learning_rate,
        [rate.learning_rate for rate in tied],
        edge,
    )


def best(rates: Sequence[Rate], score: str) -> tuple[Sequence[Rate], Edge]:
    """Of the rates with the most seeds those with the best mean of `score`, the lowest first, which is chosen; and its
    edge, as in Tuned. `rates` has all that were tried, the lowest first."""
    worths = [(rate.n, worth(score, rate.mean)) for rate in rates]
    chosen, *tied = [rate for rate, each in zip(rates, worths, strict=True) if each == max(worths)]
    if tied or len(rates) == 1:
        return [chosen, *tied], ""
    return [chosen], "lowest" if chosen is rates[0] else "highest" if chosen is rates[-1] else ""


class Contests:
    """The rate chosen for each combination of an experiment, from the runs that only try one."""

    def __init__(self, tries: Sequence[Finished]) -> None:
        groups: dict[str, dict[float, list[Finished]]] = {}
        for result in tries:
            groups.setdefault(_combination(result), {}).setdefault(result.config["tuning"], []).append(result)
        # once, or once for each share or number of rows to choose by, the one on the most rows first
        self._found = {
            key: sorted(
                (found for members in by_part.values() if (found := tuned(members))), key=lambda each: -each.split.rows
            )
            for key, by_part in groups.items()
        }

    def of(self, reported: Finished) -> Tuned | None:
        """How the rate of a reported run was chosen: by the tuning that chose it, if one did."""
        if not reported.tuned:
            return None
        found = self._found.get(_combination(reported), [])
        chosen = (each for each in found if each.learning_rate == reported.learning_rate)
        return next(chosen, next(iter(found), None))


def _combination(result: Finished) -> str:
    """What the runs of a combination that try rates have in common with those that are reported."""
    differing = {"seed", "learning_rate", "method", *_PHASE, *CHAIN}
    settings = {key: value for key, value in result.config.items() if key not in differing}
    return json.dumps([result.method, result.options, settings], sort_keys=True)
