import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from rankwise.runs.stats import Difference, difference, mean, paired_bootstrap, sd, t_interval

VALUES = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


@given(VALUES)
def test_mean_sd_and_interval_agree_with_scipy(values: list[float]) -> None:
    spread, interval = sd(values), t_interval(values)
    assert spread is not None
    assert interval is not None
    assert mean(values) == pytest.approx(np.mean(values))
    assert spread == pytest.approx(np.std(values, ddof=1), abs=1e-7)
    if spread > 1e-6:
        theirs = scipy_stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy_stats.sem(values))
        assert interval == pytest.approx(theirs)


def test_three_seeds_by_hand() -> None:
    """t(0.975, 2 degrees of freedom) is 4.3027."""
    assert t_interval([0.7, 0.8, 0.9]) == pytest.approx(
        (0.8 - 4.3027 * 0.1 / math.sqrt(3), 0.8 + 4.3027 * 0.1 / math.sqrt(3)), abs=1e-5
    )


def test_one_value_has_a_mean_and_nothing_else() -> None:
    assert (mean([0.5]), sd([0.5]), t_interval([0.5])) == (0.5, None, None)
    assert math.isnan(mean([]))
    assert sd([0.5, math.nan]) is None


def test_a_difference_is_taken_seed_by_seed() -> None:
    """Seeds differ by much, the methods by 0.01 within each: paired, that is a difference."""
    found = difference({0: 0.51, 1: 0.71, 2: 0.91, 3: 0.2}, {0: 0.5, 1: 0.7001, 2: 0.9, 9: 0.1})
    assert found is not None
    assert (found.n, found.mean) == (3, pytest.approx(0.01, abs=1e-4))
    assert found.shown
    assert difference({0: 0.5}, {1: 0.5}) is None


@pytest.mark.parametrize(
    ("seeds", "examples", "shown"),
    [
        ((0.1, 0.2), None, True),
        ((-0.2, -0.1), (-0.3, -0.1), True),
        ((-0.1, 0.2), None, False),
        ((0.1, 0.2), (-0.1, 0.2), False),
        ((0.0, 0.0), None, False),
        (None, (0.1, 0.2), False),
    ],
)
def test_a_difference_is_shown_when_no_interval_holds_0(
    seeds: tuple[float, float] | None, examples: tuple[float, float] | None, shown: bool
) -> None:
    assert Difference(3, 0.1, seeds, examples).shown is shown


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def test_the_bootstrap_covers_the_difference_and_narrows_with_the_examples() -> None:
    draw = np.random.default_rng(0)
    widths = []
    for n in (100, 1600):
        labels = draw.integers(0, 2, n)
        ours = np.where(draw.random(n) < 0.8, labels, 1 - labels)
        theirs = np.where(draw.random(n) < 0.6, labels, 1 - labels)
        low, high = paired_bootstrap(accuracy, [ours], [theirs], labels)
        assert low <= accuracy(ours, labels) - accuracy(theirs, labels) <= high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.3)


def test_the_bootstrap_of_equal_predictions_is_zero_and_repeats_itself() -> None:
    labels = np.array([0, 1, 1, 0])
    assert paired_bootstrap(accuracy, [labels], [labels], labels) == (0.0, 0.0)
    pair = ([np.array([0, 1, 0, 0])], [np.array([1, 1, 1, 0])])
    assert paired_bootstrap(accuracy, *pair, labels) == paired_bootstrap(accuracy, *pair, labels)
