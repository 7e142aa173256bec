"""The ranks of a knapsack are the best there are, which trying all of them shows for small ones."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.ranks.knapsack import _choose, cheapest, most_within

Gains = list[list[float]]
# Whole numbers, of which many are equal, and fractions of very different sizes.
worth = st.one_of(st.integers(0, 5).map(float), st.floats(1e-9, 1e9))
site = st.lists(worth, max_size=4).map(lambda gains: sorted(gains, reverse=True))
problems = st.lists(st.tuples(site, st.integers(1, 40)), min_size=1, max_size=4)


def worth_of(gains: Gains, ranks: tuple[int, ...]) -> float:
    return sum(sum(each[:rank]) for each, rank in zip(gains, ranks, strict=True))


def every_choice(gains: Gains, costs: list[int]) -> list[tuple[int, float]]:
    """Cost and worth of all ranks that there can be."""
    choices = product(*(range(len(each) + 1) for each in gains))
    return [(sum(r * c for r, c in zip(ranks, costs, strict=True)), worth_of(gains, ranks)) for ranks in choices]


@given(problems, st.integers(0, 200))
def test_nothing_within_the_budget_is_worth_more(sites: list[tuple[list[float], int]], budget: int) -> None:
    gains, costs = [gain for gain, _ in sites], [cost for _, cost in sites]
    ranks = most_within([np.array(gain) for gain in gains], costs, budget)
    assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget
    best = max(value for cost, value in every_choice(gains, costs) if cost <= budget)
    assert worth_of(gains, tuple(ranks)) == pytest.approx(best, rel=1e-11)
    assert all(0 not in gain[:rank] for gain, rank in zip(gains, ranks, strict=True))


@given(problems, st.floats(0, 1))
def test_nothing_cheaper_keeps_the_share(sites: list[tuple[list[float], int]], share: float) -> None:
    gains, costs = [gain for gain, _ in sites], [cost for _, cost in sites]
    ranks = cheapest([np.array(gain) for gain in gains], costs, share)
    total = sum(map(sum, gains))
    kept = [(cost, value) for cost, value in every_choice(gains, costs) if value >= (share - 2e-12) * total]
    spent = sum(r * c for r, c in zip(ranks, costs, strict=True))
    assert worth_of(gains, tuple(ranks)) >= (share - 2e-12) * total
    # What keeps the share by a hair, or misses it by one, may be cheaper or not.
    surely = [cost for cost, value in kept if value >= share * total]
    assert min(cost for cost, _ in kept) <= spent <= min(surely, default=spent)
    assert worth_of(gains, tuple(ranks)) >= max(value for cost, value in kept if cost == spent) * (1 - 1e-11)


@pytest.mark.parametrize("units", [1, 7, 10, 64])
def test_a_share_that_whole_units_meet_exactly_takes_no_unit_more(units: int) -> None:
    """kohya's resizing once took one unit too many there, and none when one was enough."""
    for kept in range(units + 1):
        assert cheapest([np.full(units, 0.1)], [3], kept / units) == [kept]
    assert cheapest([np.array([0.9, 0.05, 0.05])], [1], 0.8) == [1]


def test_of_what_costs_the_same_the_best_is_taken() -> None:
    rng = np.random.default_rng(0)
    gains = [np.sort(rng.random(9))[::-1] for _ in range(20)]
    for units in (0, 1, 50, 179, 500):
        ranks = most_within(gains, [6] * 20, 6 * units + 5)
        best = np.sort(np.concatenate(gains))[::-1][:units].sum()
        assert worth_of([list(each) for each in gains], tuple(ranks)) == pytest.approx(best)


def test_the_best_by_worth_per_cost_is_not_the_best() -> None:
    assert most_within([np.array([10.0]), np.array([9.0, 9.0])], [6, 5], 10) == [0, 2]


@pytest.mark.parametrize("costs", [[8192] * 4 + [15104] * 3, [9973, 8191, 7919, 5003, 101, 20011, 3001]])
def test_large_ones_come_within_a_unit_of_the_bound_and_beat_the_greedy_choice(costs: list[int]) -> None:
    rng = np.random.default_rng(1)
    costs = costs * 32
    gains = [np.sort(rng.normal(size=64) ** 2)[::-1] * rng.random() for _ in costs]
    unit = sorted(((g / c, c, g) for gain, c in zip(gains, costs, strict=True) for g in gain), reverse=True)
    for budget in (0, 100, 300_000, 20_000_001):
        greedy, left, bound = 0.0, budget, None
        for density, cost, gain in unit:
            if bound is None and cost > left:
                bound = greedy + left * density
            if cost <= left:
                greedy, left = greedy + gain, left - cost
        ranks = most_within(gains, costs, budget)
        value = worth_of([list(each) for each in gains], tuple(ranks))
        assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget
        assert bound is not None and greedy * (1 - 1e-12) <= value <= bound * (1 + 1e-12)


@pytest.mark.parametrize("costs", [[8192, 15104], [8192, 5120, 18432], [9973, 8191, 7919, 5003, 101, 20011, 3001]])
def test_where_all_units_are_worth_the_same_as_many_as_fit_are_taken(costs: list[int]) -> None:
    """A search by units once took a minute for so many."""
    costs = (costs * 112)[:224]
    gains, each = [np.ones(64)] * 224, np.cumsum(np.sort(np.repeat(costs, 64)))
    for budget in (100, 40_000_003, 70_000_000, int(each[-1]) - 1):
        ranks = most_within(gains, costs, budget)
        assert sum(ranks) == np.searchsorted(each, budget, side="right")
        assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget
    assert sum(r * c for r, c in zip(cheapest(gains, costs, 0.5), costs, strict=True)) == each[224 * 32 - 1]


def test_where_they_are_worth_nearly_the_same_it_is_the_best_of_all_pairs_of_numbers() -> None:
    rng = np.random.default_rng(0)
    costs = [8192, 15104] * 40
    gains = [np.sort(1 + 1e-6 * rng.random(64))[::-1] for _ in costs]
    one, two = (np.cumsum(np.append(0, np.sort(np.concatenate(gains[start::2]))[::-1])) for start in (0, 1))
    for budget in (10_000_001, 20_000_000, 30_000_000, 55_555_555):
        cheap = np.arange(len(one))[: budget // costs[0] + 1]
        dear = np.minimum((budget - costs[0] * cheap) // costs[1], len(two) - 1)
        found = worth_of([list(each) for each in gains], tuple(most_within(gains, costs, budget)))
        assert found == pytest.approx((one[cheap] + two[dear]).max(), rel=1e-11)


def test_a_capacity_that_the_greedy_choice_fills_exactly_is_not_missed_by_rounding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        weight, cost = rng.random(8), rng.integers(1, 4, size=8)
        order = np.argsort(-cost / weight, kind="stable")
        capacity = float(np.cumsum(weight[order])[4])
        taken = _choose(cost.astype(float), weight, cost, capacity, 1)
        assert cost[taken].sum() >= cost[order[:5]].sum() and weight[taken].sum() <= capacity * (1 + 1e-15)


def test_no_site_and_no_worth_give_no_rank() -> None:
    assert most_within([], [], 5) == [] and cheapest([], [], 0.5) == []
    assert most_within([np.zeros(3), np.zeros(0)], [2, 3], 100) == [0, 0] == cheapest([np.zeros(3)] * 2, [2, 3], 1)
