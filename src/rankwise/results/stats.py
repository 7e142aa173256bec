"""Statistics over a few seeds: mean, standard deviation, Student's t, Holm's correction, the paired bootstrap."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankwise.errors import need
from rankwise.metrics.metric import Interval

LEVEL = 0.95  # of every interval
DRAWS = 5000  # of the bootstrap: chance then moves an end of its interval by a hundredth of the width
ROUNDING = 1e-9  # a standard deviation up to this is what rounding leaves of equal values
AT_ONCE = 2**20  # examples of several draws that are held in memory together


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


def paired_bootstrap(
    score: Callable[[np.ndarray], np.ndarray], ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]
) -> Interval | None:
    """Percentile interval of our score minus theirs, the examples resampled with replacement, the same ones for both.

    A draw of nothing but examples that do not count, such as images without a labelled pixel, has no score. It is left
    out, because such a set would never be scored; None if no draw has one.

    Args:
        score: summed statistics (…, k), as floats, -> scores (…); NaN for none.
        ours, theirs: statistics of each seed's examples, (n, k) each, whose sums decide the score; the mean score over
            the seeds is compared.
    """
    n = ours[0].shape[0]  # a sparse array has no length
    gaps = []
    for rows in drawn(n):
        places = rows + n * np.arange(len(rows))[:, None]
        times = np.bincount(places.ravel(), minlength=rows.size).reshape(rows.shape).astype(float)
        gaps.append(np.subtract(*(np.mean([score(times @ each) for each in side], axis=0) for side in (ours, theirs))))
    spread = np.concatenate(gaps)
    spread = spread[~np.isnan(spread)]
    if not spread.size:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(spread, [tail, 1 - tail])
    return float(low), float(high)


def drawn(n: int) -> Iterator[np.ndarray]:
    """Rows of n examples, drawn with replacement, (m, n) for some of the `DRAWS` draws at a time; always the same."""
    draw = np.random.default_rng(0)
    for start in range(0, DRAWS, at_once := max(1, AT_ONCE // n)):
        yield draw.integers(0, n, (min(at_once, DRAWS - start), n))
