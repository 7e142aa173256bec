import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from bootstrap import by_hand, few
from rankwise import tasks
from rankwise.metrics import METRICS, bootstrap
from rankwise.metrics.bootstrap import paired_bootstrap
from rankwise.metrics.classification import right
from rankwise.metrics.metric import mean_of_sums
from rankwise.results.stats import (
    Difference,
    corrected,
    difference,
    holm,
    mean,
    paired_p,
    sd,
    t_interval,
)

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
        interval = paired_bootstrap(mean_of_sums, [right(ours, labels)], [right(theirs, labels)])
        assert interval is not None
        assert interval[0] <= accuracy(ours, labels) - accuracy(theirs, labels) <= interval[1]
        widths.append(interval[1] - interval[0])
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.3)


def test_the_ends_of_an_interval_do_not_hang_on_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    ours, theirs = (right(draw.random(480) < each, np.ones(480, bool)) for each in (0.72, 0.69))
    found = []
    for seed in range(20):
        made = np.random.default_rng(seed)
        monkeypatch.setattr(np.random, "default_rng", lambda _, made=made: made)
        found.append(paired_bootstrap(mean_of_sums, [ours], [theirs]))
    ends = np.array(found)
    assert (ends.std(axis=0) < 0.015 * (ends[:, 1] - ends[:, 0]).mean()).all()


def test_what_is_held_in_memory_does_not_grow_with_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = right(np.arange(7) < 4, np.ones(7, bool))
    monkeypatch.setattr(bootstrap, "AT_ONCE", 70)
    shapes = [each.shape for each in bootstrap.drawn(7)]
    assert set(shapes) == {(10, 7)} and len(shapes) == bootstrap.DRAWS // 10
    found = paired_bootstrap(mean_of_sums, [rows], [right(np.arange(7) < 2, np.ones(7, bool))])
    assert found is not None and found[0] < found[1]


def ratio(sums: np.ndarray) -> np.ndarray:
    """Two numbers to the first's share of the second, NaN for 0 / 0: no mean over examples."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)


@st.composite
def counted(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Statistics (n, 2) of the seeds of two methods."""
    shape = (draw(st.integers(1, 6)), 2)
    sides = st.lists(arrays(np.int64, shape, elements=st.integers(1, 9)), min_size=1, max_size=3)
    return draw(sides), draw(sides)


@settings(deadline=None, max_examples=25)
@given(counted())
def test_the_bootstrap_is_that_of_the_rows_themselves(sides: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    def score(rows: np.ndarray, _: np.ndarray) -> float:
        return float(ratio(rows.sum(axis=0)))

    with few():
        assert paired_bootstrap(ratio, *sides) == pytest.approx(by_hand(score, *sides, np.arange(len(sides[0][0]))))


@given(arrays(np.int64, (5, 2), elements=st.integers(0, 9)).filter(lambda rows: rows[:, 1].any()))
@settings(deadline=None, max_examples=25)
def test_the_bootstrap_of_equal_examples_is_zero_and_repeats_itself(rows: np.ndarray) -> None:
    assert paired_bootstrap(ratio, [rows, rows + 1], [rows.copy(), rows + 1]) == (0.0, 0.0)
    assert paired_bootstrap(ratio, [rows], [rows + 1]) == paired_bootstrap(ratio, [rows], [rows + 1])


def test_a_draw_without_a_score_is_left_out_of_the_bootstrap() -> None:
    """One example in four counts, so that 0.75⁴ of the draws have none that does; the others say what it says."""
    ours, theirs, nothing = np.zeros((4, 2)), np.zeros((4, 2)), np.zeros((4, 2))
    ours[1], theirs[1] = (3, 4), (1, 4)
    assert paired_bootstrap(ratio, [ours], [theirs]) == (0.5, 0.5)
    assert paired_bootstrap(ratio, [nothing], [nothing]) is None


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_p_agrees_with_scipy_and_with_the_interval(gaps: list[float]) -> None:
    p, interval, spread = paired_p(gaps), t_interval(gaps), sd(gaps)
    assert p is not None and interval is not None and spread is not None
    if spread > 1e-6:
        assert p == pytest.approx(scipy_stats.ttest_1samp(gaps, 0).pvalue, rel=1e-6)
        if abs(p - 0.05) > 1e-6:
            assert (p < 0.05) == (interval[0] > 0 or interval[1] < 0)


def test_p_without_spread_or_without_a_second_seed() -> None:
    assert (paired_p([0.1, 0.1]), paired_p([0.0, 0.0]), paired_p([0.1]), paired_p([])) == (0.5, 1.0, None, None)


@pytest.mark.parametrize("n", range(2, 8))
def test_a_gap_that_is_the_same_at_few_seeds_is_no_difference(n: int) -> None:
    """32 rows, one more right at each seed, as rounded numbers: n coins that fall on one side, no more."""
    found = difference(dict.fromkeys(range(n), 20 / 32 + 1e-16), {seed: 19 / 32 + seed * 1e-16 for seed in range(n)})
    assert found is not None and found.clear
    assert found.p == 2 * 0.5**n
    assert found.alone == found.shown == (n > 5)
    assert corrected([found])[0].shown == (n > 5)


PS = st.lists(st.floats(0, 1), min_size=1, max_size=7)


@given(PS, st.floats(0.001, 0.999))
def test_holm_rejects_what_its_steps_reject(values: list[float], level: float) -> None:
    """By the definition: from the smallest on, reject while p_(i) ≤ level / (m - i + 1), and stop for good."""
    rejected = set()
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        if values[index] * (len(values) - place) > level:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(values)) if p <= level} == rejected


@given(PS)
def test_holm_keeps_the_order_and_lowers_nothing(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, adjusted, strict=True))
    assert holm(values[::-1]) == adjusted[::-1]
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)
    assert holm(values[:1]) == values[:1]


def test_without_a_difference_few_reports_claim_one() -> None:
    """Six comparisons of three seeds, nothing but noise: 5 % of the reports may claim something, uncorrected 26 %."""
    draw, reports, claims, uncorrected = np.random.default_rng(0), 1000, 0, 0
    for _ in range(reports):
        scores = draw.normal(0.8, 0.02, (2, 6, 3))
        pairs = [
            difference(dict(enumerate(ours)), dict(enumerate(theirs)))
            for ours, theirs in zip(*scores.tolist(), strict=True)
        ]
        found = corrected([each for each in pairs if each is not None])
        claims += any(each.shown for each in found)
        uncorrected += any(each.alone for each in found)
    most = 0.05 + 4 * math.sqrt(0.05 * 0.95 / reports)
    assert claims / reports <= most < uncorrected / reports


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw, times = np.random.default_rng(1), 2000
    covered = 0
    for _ in range(times):
        interval = t_interval(draw.normal(0.3, 1.0, 3).tolist())
        covered += interval is not None and interval[0] <= 0.3 <= interval[1]
    assert abs(covered / times - 0.95) <= 4 * math.sqrt(0.05 * 0.95 / times)


def test_a_correction_is_over_those_with_a_p() -> None:
    pairs = [difference({0: 1.0, 1: 1.1, 2: 1.2}, {0: 0.0, 1: 0.1, 2: 0.201}), difference({0: 1.0}, {0: 0.5})]
    first, single = corrected([each for each in pairs if each is not None])
    assert (first.comparisons, first.adjusted, first.shown) == (1, first.p, True)
    assert (single.p, single.adjusted, single.shown) == (None, None, False)


def test_an_interval_stays_within_what_a_metric_can_be() -> None:
    wide = [0.95, 0.99, 1.0]
    low, high = t_interval(wide)
    assert high > 1 and t_interval(wide, METRICS["accuracy"].limits) == (low, 1.0)
    assert t_interval([-0.9, 0.9], METRICS["matthews"].limits) == (-1.0, 1.0)
    assert t_interval([1.0, 9.0], METRICS["nist"].limits)[0] == 0.0


def test_every_metric_of_every_task_has_its_limits() -> None:
    named = {name for task in tasks.registry().values() for name in (task.main, *task.metrics) if name}
    assert named <= METRICS.keys()
