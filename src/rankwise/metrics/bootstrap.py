"""The bootstrap over examples: how far a score, or the gap between two, would move with other rows of the same kind."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rankwise.metrics import METRICS
from rankwise.metrics.metric import Interval, Metric, mean_of_sums

LEVEL = 0.95  # of every interval
DRAWS = 5000  # of the bootstrap: chance then moves an end of its interval by a hundredth of the width
AT_ONCE = 2**20  # examples of several draws that are held in memory together

Kind = Literal["score", "statistics", "prediction"]
"""The column of predictions that a main metric is computed from, the first that is there."""
KINDS: tuple[Kind, ...] = ("score", "statistics", "prediction")


class Predictions(NamedTuple):
    """The answers of one model to the examples of one split."""

    kind: Kind
    values: np.ndarray
    """Predictions or scores (n,), or statistics (n, k)."""
    labels: np.ndarray
    """(n,); the numbers of the examples where these are scores or statistics."""

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]]) -> "Predictions | None":
        """From columns of `Scored.rows`, of one split; None if there is nothing to compare, or no label."""
        kind = next((kind for kind in KINDS if kind in columns), None)
        if kind is None:
            return None
        try:
            values, labels = (np.asarray(columns[each]) for each in (kind, "label" if kind == "prediction" else "idx"))
        except ValueError:  # of numpy, for statistics of uneven length
            return None
        return None if (labels == -1).all() else cls(kind, values, labels)


def interval(score: str, ours: Sequence[Predictions], theirs: Sequence[Predictions] = ()) -> Interval | None:
    """95 % interval over the examples of the metric `score`, our mean minus theirs where both are given.

    Args:
        ours, theirs: one or several, such as those of several seeds.

    Returns:
        None if not all are answers to the same examples, and for a metric that the bootstrap cannot draw.
    """
    found = _summed(score, [*ours, *theirs])
    if found is None:
        return None
    value, counted = found
    sides = [counted[: len(ours)], counted[len(ours) :]]
    return paired_bootstrap(value, *sides) if theirs else _interval(value, sides[0])


def scored(score: str, answers: Predictions) -> float | None:
    """The metric `score` of these answers; None where `interval` has none."""
    found = _summed(score, [answers])
    return found and float(found[0](found[1][0].sum(axis=0)))


def _summed(
    score: str, given: Sequence[Predictions]
) -> tuple[Callable[[np.ndarray], np.ndarray], list[np.ndarray]] | None:
    """The function from sums of statistics to the metric `score`, and the statistics of each of `given`; or None."""
    kind, guess, labels = given[0]
    if not all(
        each.kind == kind and each.values.shape == guess.shape and np.array_equal(labels, each.labels) for each in given
    ):
        return None
    metric = METRICS.get(score, Metric())
    if kind == "score":  # whose mean is the metric
        return mean_of_sums, [np.stack([each.values, np.ones(len(labels))], axis=1) for each in given]
    if metric.value is None or not metric.of_any_sum:
        return None
    if kind == "statistics":
        return metric.value, [each.values for each in given]
    if metric.statistics is None:
        return None
    return metric.value, [metric.statistics(each.values, labels) for each in given]


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
    return _interval(score, ours, theirs)


def _interval(score: Callable[[np.ndarray], np.ndarray], *sides: Sequence[np.ndarray]) -> Interval | None:
    """Of the score of one side, or of the first's minus the second's."""
    n = sides[0][0].shape[0]  # a sparse array has no length
    found = []
    for rows in drawn(n):
        places = rows + n * np.arange(len(rows))[:, None]
        times = np.bincount(places.ravel(), minlength=rows.size).reshape(rows.shape).astype(float)
        scores = [np.mean([score(times @ each) for each in side], axis=0) for side in sides]
        found.append(scores[0] if len(sides) == 1 else np.subtract(*scores))
    spread = np.concatenate(found)
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
