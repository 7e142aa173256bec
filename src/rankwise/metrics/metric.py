"""A metric: statistics of each example, and the score that their sums give."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rankwise.errors import NotFiniteError

Interval = tuple[float, float]

SHARE: Interval = (0.0, 1.0)
CORRELATION: Interval = (-1.0, 1.0)
FROM_ZERO: Interval = (0.0, math.inf)


@dataclass(frozen=True)
class Metric:
    """The score of a set of examples as a function of sums over them, so that bootstrap samples are scored together.

    Attributes:
        limits: the least and the most that it can be.
        value: from sums (…, k) of the examples' statistics to scores (…), NaN where there is none; None for a metric
            that is no function of sums.
        statistics: from predictions and labels (n,) to what each example adds, an array (n, k) or a sparse one; None
            if the task writes these next to its predictions. Raises ValueError for shapes that differ, for no rows
            and for values that are not finite.
        of_any_sum: whether any set of examples has the score of its summed statistics. Ranks depend on the whole set.
        least_is_best: whether a lower score is the better one.
    """

    limits: Interval = SHARE
    value: Callable[[np.ndarray], np.ndarray] | None = None
    statistics: Callable[[ArrayLike, ArrayLike], np.ndarray] | None = None
    of_any_sum: bool = True
    least_is_best: bool = False

    def __call__(self, predictions: ArrayLike, labels: ArrayLike) -> float:
        """The score of `predictions` for `labels`, both (n,) with n ≥ 1. Raises ValueError as `statistics` does."""
        if self.value is None or self.statistics is None:
            raise TypeError("this metric is no function of predictions and labels")
        return float(self.value(self.statistics(predictions, labels).sum(axis=0)))


def finite(values: ArrayLike) -> np.ndarray:
    """`values` as an array; NotFiniteError that counts the values that are not finite."""
    array = np.asarray(values)
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise NotFiniteError(
            f"{bad} of {array.size} predictions are not finite: the training has diverged; try a lower learning rate"
        )
    return array


def pair(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays (n,). ValueError for shapes that differ, for no rows and for values that are not finite."""
    predicted, true = finite(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != true.shape or not predicted.size:
        raise ValueError(
            f"predictions {predicted.shape} and labels {true.shape} must have one shape (n,), n at least 1"
        )
    if not np.isfinite(true).all():
        raise ValueError("labels must be finite numbers")
    return predicted, true


def mean_of_sums(sums: np.ndarray) -> np.ndarray:
    """Mean of something over the examples (…) from the sums (…, 2) of it and of 1."""
    mean: np.ndarray = sums[..., 0] / sums[..., 1]
    return mean


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole > 0)
