import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rankwise.optim.project import simplex
from rankwise.ranks import allocate
from rankwise.ranks.allocate import at_random, evenly, shuffled


@st.composite
def problems(draw):
    n = draw(st.integers(1, 12))
    raw = draw(st.lists(st.floats(-2, 6, width=32), min_size=n, max_size=n))
    costs = draw(st.lists(st.integers(2, 4000), min_size=n, max_size=n))
    limits = draw(st.lists(st.integers(1, 64), min_size=n, max_size=n))
    return simplex(torch.tensor(raw), n).tolist(), costs, limits, draw(st.integers(1, 16))


@given(problems())
def test_budget_is_never_exceeded_and_nothing_that_fits_is_left(problem):
    weights, costs, limits, rank = problem
    ranks = allocate(weights, costs, limits, rank, "budget")
    left = rank * sum(costs) - sum(r * c for r, c in zip(ranks, costs, strict=True))
    assert left >= 0
    assert all(0 <= r <= limit for r, limit in zip(ranks, limits, strict=True))
    rows = zip(weights, costs, ranks, limits, strict=True)
    assert all(c > left for w, c, r, limit in rows if w > 0 and r < limit)


@given(problems())
def test_a_site_without_weight_gets_no_rank(problem):
    weights, costs, limits, rank = problem
    for rounding in ("floor", "ceil", "budget"):
        ranks = allocate(weights, costs, limits, rank, rounding)
        assert all(r == 0 for w, r in zip(weights, ranks, strict=True) if w == 0)


@given(problems())
def test_floor_spends_at_most_and_ceil_at_least_what_the_weights_say(problem):
    weights, _, _, rank = problem
    n, costs, limits = len(weights), [2] * len(weights), [10**6] * len(weights)
    low, high = (allocate(weights, costs, limits, rank, how) for how in ("floor", "ceil"))
    assert sum(low) <= n * rank + 1e-3 * n <= sum(high) + 2e-3 * n + n * rank * 1e-6
    assert all(0 <= b - a <= 1 for a, b in zip(low, high, strict=True))


@given(st.integers(1, 40), st.integers(1, 32), st.floats(-1e-6, 1e-6))
def test_uniform_weights_keep_uniform_ranks_on_the_knife_edge(n, rank, noise):
    weights = [1 + (noise if i % 2 else -noise) for i in range(n)]
    for rounding in ("floor", "ceil", "budget"):
        assert allocate(weights, [768 + 64 * (i % 3) for i in range(n)], [100] * n, rank, rounding) == [rank] * n


def test_budget_by_hand():
    # P = 2·(10 + 10 + 20) = 80; Σωc = 15 + 10 + 10 = 35; quotas 3.43, 2.29, 1.14 cost 30 + 20 + 20, and 10 are left.
    assert allocate([1.5, 1.0, 0.5], [10, 10, 20], [9, 9, 9], 2, "budget") == [4, 2, 1]


def test_a_full_site_passes_its_share_on():
    assert allocate([2.0, 0.5, 0.5], [10, 10, 10], [2, 9, 9], 3, "budget") == [2, 4, 3]


def test_no_weight_at_all_is_an_error():
    with pytest.raises(ValueError, match="no weight is above 0, so ranks cannot be allocated"):
        allocate([0.0, 0.0], [1, 1], [4, 4], 2, "budget")


def test_an_unknown_rounding_is_an_error():
    with pytest.raises(ValueError, match="floor, ceil, budget"):
        allocate([1.0], [1], [4], 2, "ciel")


@given(problems())
def test_below_half_a_rank_no_rank_changes_where_costs_are_equal(problem):
    """What a search that has changed nothing tells its user."""
    weights, _, _, rank = problem
    farthest = rank * max(abs(w - 1) for w in weights)
    near = [1 + (w - 1) * 0.49 / max(farthest, 0.49) for w in weights]
    assert allocate(near, [7] * len(near), [64] * len(near), rank) == [rank] * len(near)


@st.composite
def rooms(draw):
    n = draw(st.integers(1, 12))
    costs = draw(st.lists(st.integers(2, 40_000), min_size=n, max_size=n))
    limits = draw(st.lists(st.integers(0, 8), min_size=n, max_size=n))
    most = sum(cost * limit for cost, limit in zip(costs, limits, strict=True))
    return costs, limits, draw(st.integers(0, most + 10))


@given(rooms(), st.integers(0, 9))
def test_ranks_by_no_weight_stay_within_budget_and_limits_and_leave_less_than_a_unit(problem, seed):
    costs, limits, budget = problem
    for ranks in (evenly(costs, costs, limits, budget), at_random(costs, limits, budget, np.random.default_rng(seed))):
        left = budget - sum(r * c for r, c in zip(ranks, costs, strict=True))
        assert left >= 0
        assert all(0 <= r <= limit for r, limit in zip(ranks, limits, strict=True))
        able = [c for c, r, limit in zip(costs, ranks, limits, strict=True) if r < limit]
        assert not able or left < max(able)


@given(st.lists(st.integers(2, 40_000), min_size=1, max_size=40), st.integers(1, 9))
def test_even_ranks_are_equal_where_the_budget_allows_it(costs, rank):
    assert evenly(costs, costs, [10] * len(costs), rank * sum(costs)) == [rank] * len(costs)


@given(st.integers(2, 60), st.integers(1, 60))
def test_sites_of_one_cost_get_a_unit_every_so_many(n, units):
    ranks = evenly([1] * n, [100] * n, [9] * n, 100 * min(units, n))
    assert sum(ranks) == min(units, n) and max(ranks) <= 1
    places = [i for i, rank in enumerate(ranks) if rank]
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.lists(st.integers(2, 4000), min_size=1, max_size=7), st.integers(1, 24), st.floats(0, 3))
@example([6, 6, 6, 2, 6], 17, 1.625)  # what is left after the first units goes to a kind that had one more
def test_each_kind_of_layer_gets_its_share_and_at_all_depths(kinds, depth, mean):
    """As in a model of equal blocks, whose layers cost what `kinds` says."""
    costs = kinds * depth
    places = [*range(len(kinds))] * depth
    budget = int(mean * sum(costs))
    ranks = np.array(evenly(places, costs, [9] * len(costs), budget)).reshape(depth, len(kinds))
    assert ranks.max() - ranks.min() <= 1
    shares = ranks.sum(axis=0)
    dearest = max(kinds)
    spent = int((ranks * np.array(kinds)).sum())
    assert budget - spent < dearest or ranks.min() == 9
    of_the_dearest = [shares[i] for i, cost in enumerate(kinds) if cost == dearest]
    assert min(of_the_dearest) >= min(shares) - 1 and max(of_the_dearest) - min(of_the_dearest) <= 1


@given(st.lists(st.integers(0, 2), max_size=12), st.integers(0, 99))
def test_each_kind_is_shuffled_among_its_own_places(kinds, seed):
    order = shuffled(kinds, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(kinds))) and [kinds[i] for i in order] == kinds
