"""GLUE's metrics over scikit-learn and scipy, with a value where theirs is undefined: 0 for constant input.

Every function takes `predictions` and `labels`, both (n,) with n ≥ 1, and raises ValueError for shapes that differ or
for a value that is not finite.
"""

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from rankwise.errors import NotFiniteError, need


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


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of predictions that equal their label, 0 to 1."""
    predicted, wanted = _classes(predictions, labels)
    return float(need("sklearn.metrics", "bench").accuracy_score(wanted, predicted))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1 of class 1, 0 to 1; 0 where no row has or gets class 1."""
    predicted, wanted = _classes(predictions, labels)
    return float(need("sklearn.metrics", "bench").f1_score(wanted == 1, predicted == 1, zero_division=0.0))


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation, -1 to 1; 0 where predictions or labels are all one class."""
    predicted, wanted = _classes(predictions, labels)
    if np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
        return 0.0
    return float(need("sklearn.metrics", "bench").matthews_corrcoef(wanted, predicted))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson correlation, -1 to 1; 0 where predictions or labels are constant."""
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Spearman rank correlation, ties at their mean rank, -1 to 1; 0 where predictions or labels are constant."""
    return _correlation("spearmanr", predictions, labels)


def _correlation(function: str, predictions: ArrayLike, labels: ArrayLike) -> float:
    predicted, wanted = (np.asarray(values, dtype=np.float64) for values in _pair(predictions, labels))
    if (predicted == predicted[0]).all() or (wanted == wanted[0]).all():
        return 0.0
    with warnings.catch_warnings():
        # scipy warns of nearly constant input, which a collapsed model really gives; the value is still defined
        warnings.simplefilter("ignore")
        value = float(getattr(need("scipy.stats", "bench"), function)(predicted, wanted).statistic)
    return value if np.isfinite(value) else 0.0


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def right(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 2): whether a prediction equals its label, and 1; `share` of their sums is `accuracy`."""
    predicted, wanted = _classes(predictions, labels)
    return np.stack([predicted == wanted, np.ones_like(wanted)], axis=1).astype(np.float64)


def share(sums: np.ndarray) -> np.ndarray:
    """Mean of something over the examples (…) from the sums (…, 2) of it and of 1."""
    return sums[..., 0] / sums[..., 1]


def confusion(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 4): 1 for a true positive, false positive, false negative or true negative of class 1, of two classes."""
    predicted, wanted = (values == 1 for values in _classes(predictions, labels))
    cells = [predicted & wanted, predicted & ~wanted, ~predicted & wanted, ~predicted & ~wanted]
    return np.stack(cells, axis=1).astype(np.float64)


def matthews_of(sums: np.ndarray) -> np.ndarray:
    """`matthews` (…) from the sums (…, 4) of `confusion`."""
    tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    return _over_root(tp * tn - fp * fn, (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def moments(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 6): 1, x, y, x², y² and xy of predictions x and labels y, both less the mean label for precision."""
    x, y = (np.asarray(values, dtype=np.float64) for values in _pair(predictions, labels))
    x, y = x - y.mean(), y - y.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def pearson_of(sums: np.ndarray) -> np.ndarray:
    """`pearson` (…) from the sums (…, 6) of `moments`."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    return _over_root(n * xy - x * y, _spread(n, x, xx) * _spread(n, y, yy))


def _spread(n: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """n² times the variance; 0 where nothing but rounding is left of it."""
    found = n * squares - total * total
    return np.where(found > 1e-12 * n * squares, found, 0.0)


def _over_root(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / √below, 0 for 0 below, which is that of a constant input."""
    return np.divide(above, np.sqrt(below), out=np.zeros_like(above), where=below > 0)


STATISTICS: dict[str, Callable[[ArrayLike, ArrayLike], np.ndarray]] = {
    "accuracy": right,
    "matthews": confusion,
    "pearson": moments,
}
"""What the examples add to each metric that runs are compared by, (n, k), from predictions and labels (n,)."""
