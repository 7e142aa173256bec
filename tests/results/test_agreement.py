"""How far two plans agree, against scipy, chance, and plans that only the cost of layers makes alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from rankwise.results.agreement import CHANCE, Agreement


def agreement(first, second, costs=None, kept=0.9, kept_by_uniform=0.8, uniform=4):
    names = [f"layer{place}" for place in range(len(first))]
    by_name = [dict(zip(names, each, strict=True)) for each in (first, second, costs or [8] * len(first))]
    return Agreement(*by_name[:2], dict.fromkeys(names, uniform), by_name[2], kept, kept_by_uniform)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=40))
def test_the_correlation_is_spearmans(plans) -> None:
    first, second = zip(*plans, strict=True)
    found = agreement(first, second).correlation
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(first, second)[0])


def test_plans_that_are_the_same_agree() -> None:
    plan = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    found = agreement(plan, plan)
    assert found.correlation == pytest.approx(1) and found.p == pytest.approx(1e-4) and found.doubts() == []
    assert len(found.changed) == len(found.alike) == 21


def test_opposite_plans_do_not() -> None:
    plan = [1, 2, 3, 5, 6, 7] * 4
    found = agreement(plan, [8 - rank for rank in plan])
    assert found.alike == [] and found.common < 0 and len(found.doubts()) == 2


def test_chance_agrees_as_seldom_as_it_should() -> None:
    """Of plans drawn at random a hundredth counts as beyond chance, and none of those have half in common."""
    draw = np.random.default_rng(0)
    found = [agreement(draw.integers(0, 9, 36).tolist(), draw.integers(0, 9, 36).tolist()) for _ in range(60)]
    assert sum(each.p <= CHANCE for each in found) <= 3
    assert sum(each.p <= 0.5 for each in found) == pytest.approx(30, abs=12)
    assert all(each.doubts() for each in found)


def test_what_the_cost_of_a_layer_decides_is_no_agreement() -> None:
    draw = np.random.default_rng(1)
    costs = [8, 8, 8, 40] * 9
    plans = [
        [int(rank) + (4 if cost == 8 else 0) for rank, cost in zip(draw.integers(0, 4, 36), costs, strict=True)]
        for _ in "ab"
    ]
    found = agreement(*plans, costs)
    assert found.correlation > 0.4 and found.shuffled > 0.4
    assert found.doubts()


def test_layers_that_all_cost_different_amounts_cannot_be_shuffled() -> None:
    found = agreement([1, 2, 3, 5], [1, 2, 3, 5], costs=[1, 2, 3, 4])
    assert found.correlation == pytest.approx(1) and found.p == 1 and found.common == 0
    assert found.doubts()


def test_a_plan_that_is_uniform_is_no_evidence() -> None:
    assert agreement([4] * 9, list(range(9))).doubts() == ["a search gives all layers the same rank"]


def test_agreement_alone_is_not_enough_where_uniform_ranks_keep_as_much() -> None:
    plan = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    [doubt] = agreement(plan, plan, kept=0.8).doubts()
    assert doubt == "uniform ranks keep as much of what the other seed has learnt"


def test_hundreds_of_layers_that_agree_a_little_are_no_plan() -> None:
    draw = np.random.default_rng(2)
    first = draw.integers(0, 9, 500)
    second = np.where(draw.random(500) < 0.3, first, draw.integers(0, 9, 500))
    found = agreement(first.tolist(), second.tolist())
    assert found.p <= CHANCE and found.common < 0.5
    [doubt] = found.doubts()
    assert doubt.startswith("only ") and doubt.endswith(" common to both seeds, less than 50%")
