"""Metrics of predicted numbers, with a value where scikit-learn and scipy have none: 0 for constant input.

Every metric takes `predictions` x and `labels` y, both (n,) with n ≥ 1, and raises ValueError for shapes that differ or
for a value that is not finite.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from rankwise.errors import need
from rankwise.metrics.metric import CORRELATION, FROM_ZERO, Metric, mean_of_sums, pair, share


def _numbers(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = pair(predictions, labels)
    return predicted.astype(np.float64), true.astype(np.float64)


def _moments(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 6): 1, x, y, x², y² and xy, x and y each less its mean for precision."""
    x, y = (values - values.mean() for values in _numbers(predictions, labels))
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _ranks(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """`_moments` of the ranks among all examples, ties at their mean rank."""
    rank = need("scipy.stats", "bench").rankdata
    predicted, true = pair(predictions, labels)
    return _moments(rank(predicted), rank(true))


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Pearson correlation from the sums (…, 6) of `_moments`, 0 where x or y is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    return np.clip(share(n * xy - x * y, np.sqrt(_spread(n, x, xx) * _spread(n, y, yy))), *CORRELATION)


def _spread(n: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """n² times the variance; 0 where it is no more than rounding error."""
    found = n * squares - total * total
    return np.where(found > 1e-12 * n * squares, found, 0.0)


def _of_errors(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 4): 1, (x - y)², and y and y² of labels less their mean."""
    x, y = _numbers(predictions, labels)
    about = y - y.mean()
    return np.stack([np.ones_like(y), (x - y) ** 2, about, about**2], axis=1)


def _r2(sums: np.ndarray) -> np.ndarray:
    """1 - Σ (x - y)² / Σ (y - ȳ)² from the sums (…, 4) of `_of_errors`."""
    n, squares, y, yy = np.moveaxis(sums, -1, 0)
    return _explained(n * squares, _spread(n, y, yy))


def _errors_and_labels(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """`_moments` of x - y and y."""
    x, y = _numbers(predictions, labels)
    return _moments(x - y, y)


def _explained_variance(sums: np.ndarray) -> np.ndarray:
    """1 - var(x - y) / var(y) from the sums (…, 6) of `_errors_and_labels`."""
    n, error, y, squares, yy, _ = np.moveaxis(sums, -1, 0)
    return _explained(_spread(n, error, squares), _spread(n, y, yy))


def _explained(unexplained: np.ndarray, total: np.ndarray) -> np.ndarray:
    """1 - unexplained / total; where `total` is 0, 1 if there is nothing unexplained, else 0."""
    return np.where(total > 0, 1 - share(unexplained, total), np.where(unexplained > 0, 0.0, 1.0))


def _mean(error: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[ArrayLike, ArrayLike], np.ndarray]:
    """Statistics (n, 2) for the mean of an error of x and y."""

    def statistics(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
        errors = error(*_numbers(predictions, labels))
        return np.stack([errors, np.ones_like(errors)], axis=1)

    return statistics


def _error(error: Callable[[np.ndarray, np.ndarray], np.ndarray], root: bool = False) -> Metric:
    value = (lambda sums: np.sqrt(mean_of_sums(sums))) if root else mean_of_sums
    return Metric(FROM_ZERO, value, _mean(error), least_is_best=True)


METRICS = {
    "pearson": Metric(CORRELATION, _pearson, _moments),
    "spearman": Metric(CORRELATION, _pearson, _ranks, of_any_sum=False),
    "r2": Metric((-math.inf, 1.0), _r2, _of_errors),
    "explained_variance": Metric((-math.inf, 1.0), _explained_variance, _errors_and_labels),
    "mean_absolute_error": _error(lambda x, y: np.abs(x - y)),
    "mean_squared_error": _error(lambda x, y: (x - y) ** 2),
    "root_mean_squared_error": _error(lambda x, y: (x - y) ** 2, root=True),
    # a label of 0 counts as scikit-learn's smallest, 2e-16
    "mean_absolute_percentage_error": _error(lambda x, y: np.abs(x - y) / np.maximum(np.abs(y), np.finfo(float).eps)),
}
pearson, spearman = METRICS["pearson"], METRICS["spearman"]
