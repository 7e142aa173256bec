"""The paired bootstrap over examples written out: every draw is scored anew, from the examples themselves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rankwise.metrics import bootstrap


@contextmanager
def few(draws: int = 100) -> Iterator[None]:
    """Fewer draws, where a score takes its time."""
    before, bootstrap.DRAWS = bootstrap.DRAWS, draws
    try:
        yield
    finally:
        bootstrap.DRAWS = before


def by_hand(
    score: Callable[[Any, Any], float], ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], labels: np.ndarray
) -> tuple[float, float]:
    """The interval of the mean score of `ours` minus that of `theirs`, of answers (n, …) to `labels` (n, …)."""
    gaps = []
    for rows in (each for several in bootstrap.drawn(len(labels)) for each in several):
        ours_now, theirs_now = ([score(each[rows], labels[rows]) for each in side] for side in (ours, theirs))
        gaps.append(np.mean(ours_now) - np.mean(theirs_now))
    low, high = np.quantile(gaps, [(1 - bootstrap.LEVEL) / 2, (1 + bootstrap.LEVEL) / 2])
    return float(low), float(high)
