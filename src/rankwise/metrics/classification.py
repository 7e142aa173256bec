"""Metrics of predicted classes: GLUE's, and those of scikit-learn's scorers that need no probabilities.

Every metric takes `predictions` and `labels`, both class numbers (n,) with n ≥ 1, and raises ValueError for shapes that
differ or for a value that is not finite. Except for accuracy, three counts of each class decide it: c, how often the
class is predicted and true, p, how often it is predicted, and t, how often it is true.

    precision   c / p               recall    c / t
    f1          2 c / (p + t)       jaccard   c / (p + t - c)       each 0 where its denominator is 0

    _macro      the mean over the classes that are predicted or true in these rows
    _weighted   the mean over the classes, weighted by t
    _micro      the fraction of the sums of c, p and t over the classes
    no ending   of class 1, for two classes
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from rankwise.errors import need
from rankwise.metrics.metric import CORRELATION, Metric, mean_of_sums, pair, share

Counts = tuple[np.ndarray, np.ndarray, np.ndarray]
Fraction = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _classes(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = pair(predictions, labels)
    if any((values != np.floor(values)).any() for values in (predicted, true)):
        raise ValueError("classes must be whole numbers; take the argmax of the logits first")
    return predicted.astype(np.int64), true.astype(np.int64)


def right(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 2): whether a prediction equals its label, and 1."""
    predicted, true = _classes(predictions, labels)
    return np.stack([predicted == true, np.ones_like(true)], axis=1).astype(np.float64)


def _of_class_1(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 3): whether class 1 is both predicted and true, predicted, and true."""
    predicted, true = (values == 1 for values in _classes(predictions, labels))
    return np.stack([predicted & true, predicted, true], axis=1).astype(np.float64)


def _by_class(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(n, 3 K) for the K classes that occur: the class that is predicted and true, predicted, true, each one-hot.

    Sparse, so that a thousand classes take no more room and time than two.
    """
    predicted, true = _classes(predictions, labels)
    numbers, places = np.unique(np.concatenate([predicted, true]), return_inverse=True)
    n, classes = len(predicted), len(numbers)
    predicted, true = np.split(places, 2)
    columns = np.concatenate([true, classes + predicted, 2 * classes + true])
    ones = np.concatenate([predicted == true, np.ones(2 * n)])
    rows = np.tile(np.arange(n), 3)
    found: np.ndarray = need("scipy.sparse", "bench").csr_array((ones, (rows, columns)), shape=(n, 3 * classes))
    return found


def _counts(sums: np.ndarray) -> Counts:
    """c, p and t of each class, (…, K) each, from the sums (…, 3 K) of `_by_class` or `_of_class_1`."""
    both, predicted, true = np.split(sums, 3, axis=-1)
    return both, predicted, true


def _macro(fraction: Fraction) -> Callable[[np.ndarray], np.ndarray]:
    def value(sums: np.ndarray) -> np.ndarray:
        c, p, t = _counts(sums)
        return share(share(*fraction(c, p, t)).sum(axis=-1), (p + t > 0).sum(axis=-1))

    return value


def _weighted(fraction: Fraction) -> Callable[[np.ndarray], np.ndarray]:
    def value(sums: np.ndarray) -> np.ndarray:
        c, p, t = _counts(sums)
        return share((t * share(*fraction(c, p, t))).sum(axis=-1), t.sum(axis=-1))

    return value


def _micro(fraction: Fraction) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: share(*fraction(*(each.sum(axis=-1) for each in _counts(sums))))


def _balanced(sums: np.ndarray) -> np.ndarray:
    """Mean recall of the classes that are true."""
    c, _, t = _counts(sums)
    return share(share(c, t).sum(axis=-1), (t > 0).sum(axis=-1))


def _matthews(sums: np.ndarray) -> np.ndarray:
    """Matthews correlation of K classes (Gorodkin 2004).

    (n Σ c - Σ p t) / √((n² - Σ p²) (n² - Σ t²)) with n = Σ t; 0 where only one class is predicted, or only one is true.
    """
    c, p, t = _counts(sums)
    n = t.sum(axis=-1)
    free = [n * n - (each * each).sum(axis=-1) for each in (p, t)]
    return share(n * c.sum(axis=-1) - (p * t).sum(axis=-1), np.sqrt(free[0] * free[1]))


_FRACTIONS: dict[str, Fraction] = {
    "precision": lambda c, p, t: (c, p),
    "recall": lambda c, p, t: (c, t),
    "f1": lambda c, p, t: (2 * c, p + t),
    "jaccard": lambda c, p, t: (c, p + t - c),
}
OF_TWO = frozenset(_FRACTIONS)
"""The metrics of class 1, which are for two classes."""

METRICS = {
    "accuracy": Metric(value=mean_of_sums, statistics=right),
    "balanced_accuracy": Metric(value=_balanced, statistics=_by_class),
    "matthews": Metric(CORRELATION, _matthews, _by_class),
    **{name: Metric(value=_micro(fraction), statistics=_of_class_1) for name, fraction in _FRACTIONS.items()},
    **{
        f"{name}_{mean.__name__.removeprefix('_')}": Metric(value=mean(fraction), statistics=_by_class)
        for name, fraction in _FRACTIONS.items()
        for mean in (_macro, _micro, _weighted)
    },
}
accuracy, f1, matthews = METRICS["accuracy"], METRICS["f1"], METRICS["matthews"]
