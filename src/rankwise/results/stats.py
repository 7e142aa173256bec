"""Statistics over a few seeds: mean, standard deviation, Student's t, Holm's correction."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rankwise.errors import need
from rankwise.metrics.bootstrap import LEVEL
from rankwise.metrics.metric import Interval

ROUNDING = 1e-9  # a standard deviation up to this is what rounding leaves of equal values


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN for no values."""
    return math.fsum(values) / len(values) if values else math.nan


def sd(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1 below); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def equal(values: Sequence[float]) -> bool:
    """Whether there are two values or more and all are the same, up to rounding: no spread to judge by."""
    spread = sd(values)
    return spread is not None and spread <= ROUNDING


def t_interval(values: Sequence[float], limits: Interval = (-math.inf, math.inf)) -> Interval | None:
    """Student's interval for the mean, mean ± t(n - 1) sd / √n, as far as it lies within `limits`.

    None for fewer than two values.
    """
    spread = sd(values)
    if spread is None:
        return None
    quantile = float(need("scipy.stats", "bench").t.ppf((1 + LEVEL) / 2, len(values) - 1))
    half = quantile * spread / math.sqrt(len(values))
    return max(limits[0], mean(values) - half), min(limits[1], mean(values) + half)


def paired_p(gaps: Sequence[float]) -> float | None:
    """The two-sided p-value of Student's paired test that the mean gap is 0; None for fewer than two gaps.

    Gaps that are all alike, as whole numbers of right answers easily are, leave no spread to judge by; p is then that
    of the sign test, 2^(1 - n).
    """
    spread = sd(gaps)
    if spread is None:
        return None
    if spread <= ROUNDING:
        return 1.0 if abs(mean(gaps)) <= 1e-9 else 2.0 ** (1 - len(gaps))
    t = abs(mean(gaps)) * math.sqrt(len(gaps)) / spread
    return 2 * float(need("scipy.stats", "bench").t.sf(t, len(gaps) - 1))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979, Scand. J. Statist. 6, 65-70), in the order of `values`.

    Of m sorted values p_(i) becomes max_{j ≤ i} min(1, (m - j + 1) p_(j)). Calling those up to 0.05 a difference
    makes a false claim in 5 % of all reports at most.
    """
    found, least = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - place) * values[index]))
        found[index] = least
    return found


@dataclass(frozen=True)
class Difference:
    """How far one method is above another, seed by seed."""

    n: int
    """Seeds that both have."""
    mean: float
    seeds: Interval | None
    """95 % t-interval over the paired seeds; None at one seed."""
    examples: Interval | None = None
    """95 % paired-bootstrap interval over the examples, where predictions were kept."""
    p: float | None = None
    """Of the paired test over the seeds; None at one seed."""
    adjusted: float | None = None
    """p after Holm's correction over all comparisons of a report; None if there is no p."""
    comparisons: int = 1
    """How many comparisons the correction is over."""

    @property
    def clear(self) -> bool:
        """Whether there is an interval over the seeds, and no interval holds 0."""
        intervals = [interval for interval in (self.seeds, self.examples) if interval is not None]
        return self.seeds is not None and all(low > 0 or high < 0 for low, high in intervals)

    @property
    def alone(self) -> bool:
        """Whether there is a difference, were this the only comparison."""
        return self.clear and (self.p is None or self.p <= 1 - LEVEL)

    @property
    def shown(self) -> bool:
        """Whether there is a difference, also after Holm's correction."""
        return self.alone and (self.adjusted is None or self.adjusted <= 1 - LEVEL)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours minus theirs over the seeds that both have; None if they share none.

    Args:
        ours, theirs: score by seed. A pair shares the order of the training rows and the subset, which takes their
            part of the noise out of the difference.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    gaps = [ours[seed] - theirs[seed] for seed in shared]
    return Difference(len(gaps), mean(gaps), t_interval(gaps), p=paired_p(gaps))


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same differences, each with its p adjusted by Holm's correction over all that have one."""
    adjusted = iter(holm([each.p for each in differences if each.p is not None]))
    count = sum(each.p is not None for each in differences)
    return [gap if gap.p is None else replace(gap, adjusted=next(adjusted), comparisons=count) for gap in differences]
