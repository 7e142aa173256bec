"""GLUE's metrics over scikit-learn and scipy, with a value where theirs is undefined: 0 for constant input.

Every function takes `predictions` and `labels`, both (n,) with n ≥ 1, and raises ValueError for shapes that differ or
for a value that is not finite.
"""

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from rankwise.config import NotFiniteError, need


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
