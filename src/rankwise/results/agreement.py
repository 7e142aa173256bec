"""How far the ranks that two searches have chosen agree, and whether that is more than chance.

Two searches that learn the same about layers put their ranks on the same ones; two that learn nothing put them anywhere
among layers that cost the same. (Among layers that cost different amounts the cost alone makes plans alike.) So the
rank correlation of the two plans is compared with what remains of it after one plan is shuffled among layers of equal
cost. It counts as agreement if

    p ≤ 0.01                      at most one shuffle in a hundred agrees as well
    (ρ - ρ₀) / (1 - ρ₀) ≥ 0.5     with ρ₀ the mean over the shuffles

The correlation of two measurements is the share of their variance that they have in common, so the second line asks
that at least half of where a plan puts its ranks is not the luck of its seed; with hundreds of layers a correlation of
0.2 is not due to chance either, but then four fifths of a plan are luck.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rankwise.errors import need

DRAWS = 9_999
"""Shuffles that a correlation is compared with."""
AT_ONCE = 2**20
"""Ranks of several shuffles that are held in memory together."""
CHANCE = 0.01
"""The largest share of shuffles that may agree as well."""
COMMON = 0.5
"""The least share of the variance of a plan that is not the luck of its seed."""


@dataclass(frozen=True)
class Agreement:
    """How far two plans agree, which give the layers of `costs` their ranks.

    Attributes:
        first, second: the ranks, by layer.
        uniform: the ranks of the uniform plan, by layer.
        costs: parameters of one unit of rank, by layer.
        kept: share of what one search has learnt, Σσ², that the ranks of the other one keep; the mean of both ways.
        kept_by_uniform: the same of the uniform ranks.
    """

    first: Mapping[str, int]
    second: Mapping[str, int]
    uniform: Mapping[str, int]
    costs: Mapping[str, int]
    kept: float
    kept_by_uniform: float

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation over the layers; None if a plan gives all layers the same rank."""
        return self._correlations and self._correlations[0]

    @property
    def shuffled(self) -> float | None:
        """What remains of it on average when a plan is shuffled among layers of equal cost."""
        return self._correlations and self._correlations[1]

    @property
    def p(self) -> float:
        """The share of shuffles, with the plan as it is among them, that agree as well."""
        return self._correlations[2] if self._correlations else 1.0

    @property
    def common(self) -> float:
        """(ρ - ρ₀) / (1 - ρ₀), 0 where there is no correlation or where shuffling changes nothing."""
        if not self._correlations or 1 - self._correlations[1] < 1e-9:
            return 0.0
        correlation, shuffled, _ = self._correlations
        return (correlation - shuffled) / (1 - shuffled)

    @property
    def changed(self) -> list[str]:
        """The layers at which both plans have another rank than the uniform one."""
        return [name for name, rank in self.uniform.items() if rank not in (self.first[name], self.second[name])]

    @property
    def alike(self) -> list[str]:
        """Those of them that both plans change in the same direction."""
        return [
            name
            for name in self.changed
            if (self.first[name] > self.uniform[name]) == (self.second[name] > self.uniform[name])
        ]

    def doubts(self) -> list[str]:
        """Why the plans are no evidence for other ranks than uniform ones, in words; [] if they are."""
        if self.correlation is None:
            return ["a search gives all layers the same rank"]
        found = []
        if self.p > CHANCE:
            found.append(f"too many plans shuffled among layers of equal cost agree as well (p = {self.p:.2g})")
        if self.common < COMMON:
            share = max(0.0, self.common)
            found.append(f"only {share:.0%} of what decides the ranks is common to both seeds, less than {COMMON:.0%}")
        if self.kept <= self.kept_by_uniform:
            found.append("uniform ranks keep as much of what the other seed has learnt")
        return found

    @cached_property
    def _correlations(self) -> tuple[float, float, float] | None:
        """The correlation, its mean over the shuffles, and p."""
        names = [*self.costs]
        x, y = (_standardised([plan[name] for name in names]) for plan in (self.first, self.second))
        if x is None or y is None:
            return None
        draw, costs = np.random.default_rng(0), np.array([self.costs[name] for name in names])
        sums = np.zeros(DRAWS)
        for cost in np.unique(costs):
            [group] = np.nonzero(costs == cost)
            for start in range(0, DRAWS, at_once := max(1, AT_ONCE // len(group))):
                part = sums[start : start + at_once]
                part += draw.permuted(np.tile(y[group], (len(part), 1)), axis=1) @ x[group]
        found = float(x @ y)
        return found, float(sums.mean()), float((1 + (sums >= found - 1e-9).sum()) / (1 + DRAWS))


def _standardised(ranks: Sequence[int]) -> np.ndarray | None:
    """The places of `ranks` in their order, ties at their mean, centred and of length 1; None if all are equal."""
    places = need("scipy.stats", "bench").rankdata(ranks)
    places = places - places.mean()
    length = np.linalg.norm(places)
    return places / length if length > 0 else None
