"""GLUE's metrics, with a value where scikit-learn and scipy have none: 0 for constant input.

Every metric takes `predictions` and `labels`, both (n,) with n ≥ 1, and raises ValueError for shapes that differ or
for a value that is not finite.
"""

import numpy as np
from numpy.typing import ArrayLike

from rankwise.errors import NotFiniteError, need
from rankwise.metrics.metric import CORRELATION, Metric, mean_of_sums


def finite(values: ArrayLike) -> np.ndarray:
    """`values` as an array; NotFiniteError that counts the values that are not finite."""
    array = np.asarray(values)
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise NotFiniteError(
            f"{bad} of {array.size} predictions are not finite: the training has diverged; try a lower learning rate"
        )
    return array


def _pair(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, wanted = finite(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != wanted.shape or not predicted.size:
        raise ValueError(
            f"predictions {predicted.shape} and labels {wanted.shape} must have one shape (n,), n at least 1"
        )
    if not np.isfinite(wanted).all():
        raise ValueError("labels must be finite numbers")
    return predicted, wanted


def _classes(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    pair = _pair(predictions, labels)
    if any((values != np.floor(values)).any() for values in pair):
        raise ValueError("classes must be whole numbers; take the argmax of the logits first")
    return pair[0].astype(np.int64), pair[1].astype(np.int64)


def right(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 2): whether a prediction equals its label, and 1."""
    predicted, wanted = _classes(predictions, labels)
    return np.stack([predicted == wanted, np.ones_like(wanted)], axis=1).astype(np.float64)


def _of_class_1(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 2): whether class 1 is both predicted and true, and in how many of the two it occurs."""
    predicted, wanted = (values == 1 for values in _classes(predictions, labels))
    return np.stack([predicted & wanted, predicted.astype(int) + wanted], axis=1).astype(np.float64)


def _f1(sums: np.ndarray) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN), 0 where class 1 is neither given nor true; sums (…, 2) of `_of_class_1`."""
    both, total = np.moveaxis(sums, -1, 0)
    return np.divide(2 * both, total, out=np.zeros_like(both), where=total > 0)


def _by_class(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 2 + 2 K) for K classes: 1, whether the prediction is right, the class given and the true one, one-hot."""
    pair = _classes(predictions, labels)
    numbers = np.unique(np.concatenate(pair))
    given, true = (values[:, None] == numbers for values in pair)
    whole = np.ones((len(given), 1))
    return np.concatenate([whole, (pair[0] == pair[1])[:, None], given, true], axis=1).astype(np.float64)


def _matthews(sums: np.ndarray) -> np.ndarray:
    """Matthews correlation of K classes (Gorodkin 2004) from the sums (…, 2 + 2 K) of `_by_class`.

    (n c - Σ p_k t_k) / √((n² - Σ p_k²) (n² - Σ t_k²)), c the number of right ones, p_k and t_k how often class k was
    given and is true; 0 where only one class is predicted, or only one is true.
    """
    n, c = sums[..., 0], sums[..., 1]
    given, true = np.split(sums[..., 2:], 2, axis=-1)
    free = [n * n - (each * each).sum(axis=-1) for each in (given, true)]
    return _over_root(n * c - (given * true).sum(axis=-1), free[0] * free[1])


def _moments(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 6): 1, x, y, x², y² and xy of predictions x and labels y, each less its mean for precision."""
    x, y = (np.asarray(values, dtype=np.float64) for values in _pair(predictions, labels))
    x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _ranks(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """`_moments` of the ranks among all examples, ties at their mean rank."""
    rank = need("scipy.stats", "bench").rankdata
    predicted, wanted = _pair(predictions, labels)
    return _moments(rank(predicted), rank(wanted))


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Pearson correlation from the sums (…, 6) of `_moments`."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    return np.clip(_over_root(n * xy - x * y, _spread(n, x, xx) * _spread(n, y, yy)), *CORRELATION)


def _spread(n: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """n² times the variance; 0 where it is no more than rounding error."""
    found = n * squares - total * total
    return np.where(found > 1e-12 * n * squares, found, 0.0)


def _over_root(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / √below, 0 where `below` is 0, as for a constant input."""
    return np.divide(above, np.sqrt(below), out=np.zeros_like(above), where=below > 0)


accuracy = Metric(value=mean_of_sums, statistics=right)
"""Share of predictions that equal their label, 0 to 1."""
f1 = Metric(value=_f1, statistics=_of_class_1)
"""F1 of class 1, 0 to 1; 0 where no row has or gets class 1."""
matthews = Metric(CORRELATION, _matthews, _by_class)
"""Matthews correlation, -1 to 1; 0 where predictions or labels are all one class."""
pearson = Metric(CORRELATION, _pearson, _moments)
"""Pearson correlation, -1 to 1; 0 where predictions or labels are constant."""
spearman = Metric(CORRELATION, _pearson, _ranks, of_any_sum=False)
"""Spearman rank correlation, ties at their mean rank, -1 to 1; 0 where predictions or labels are constant."""

METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}
