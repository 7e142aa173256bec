"""What a few seeds allow to say: mean, sample standard deviation, Student's t."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.config import need

Interval = tuple[float, float]

LEVEL = 0.95  # of every interval
DRAWS = 500  # of the bootstrap


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN for no values."""
    return math.fsum(values) / len(values) if values else math.nan


def sd(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1 below); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval for the mean: mean ± t(n - 1) sd / √n. None for fewer than two values."""
    spread = sd(values)
    if spread is None:
        return None
    quantile = float(need("scipy.stats", "bench").t.ppf((1 + LEVEL) / 2, len(values) - 1))
    half = quantile * spread / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


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

    @property
    def shown(self) -> bool:
        """Whether there is an interval, and none of them holds 0."""
        given = [interval for interval in (self.seeds, self.examples) if interval is not None]
        return self.seeds is not None and all(low > 0 or high < 0 for low, high in given)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours minus theirs over the seeds that both have; None where they share none.

    Args:
        ours, theirs: score by seed. A pair shares the order of the training rows and the subset, which takes their
            part of the noise out of the difference.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    gaps = [ours[seed] - theirs[seed] for seed in shared]
    return Difference(len(gaps), mean(gaps), t_interval(gaps))


def paired_bootstrap(
    score: Callable[[np.ndarray, np.ndarray], float],
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    labels: np.ndarray,
) -> Interval:
    """Percentile interval of score(ours) - score(theirs), the examples drawn anew with replacement, the same for both.

    Args:
        score: (predictions (n,), labels (n,)) -> one number.
        ours, theirs: predictions of each seed, (n,) each; the mean over the seeds is compared.
        labels: (n,).
    """
    draw = np.random.default_rng(0)
    gaps = []
    for _ in range(DRAWS):
        rows = draw.integers(0, len(labels), len(labels))
        gold = labels[rows]
        gaps.append(
            mean([score(each[rows], gold) for each in ours]) - mean([score(each[rows], gold) for each in theirs])
        )
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(gaps, [tail, 1 - tail])
    return float(low), float(high)
