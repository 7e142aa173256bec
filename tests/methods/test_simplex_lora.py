"""What decides ranks in SimplexLoRA: ω itself, or a control that knows less."""

from collections import Counter, defaultdict

import pytest
import torch

import models
import rankwise as rw
from rankwise.ranks import sites
from rankwise.ranks.sites import kind, omega


def planned(score, seed=1, every=1, step=1):
    """The rank and the size of each site where ω is drawn by chance, and the method."""
    torch.manual_seed(7)
    method = rw.SimplexLoRA(rank=4, every=every, times=2, omega_rate=0.0, score=score)
    model = method.attach(models.model("bert"), head=models.head("bert"))
    for site in sites(model):
        torch.nn.init.normal_(site.B)
    weights = omega(model)
    with torch.no_grad():
        weights.copy_(torch.rand(len(weights)))
        weights.mul_(len(weights) / weights.sum())
    before = weights.clone()
    torch.manual_seed(seed)
    torch.rand(3)  # how far a stream has gone does not matter
    plan = method.after_step(model, step, 1e-2)
    torch.testing.assert_close(omega(model), before, atol=1e-5, rtol=0)  # no score changes what the layers multiply by
    return {site.name: (plan[site.name], (site.in_features, site.out_features), site.cost) for site in sites(model)}


def test_a_permutation_gives_each_size_of_site_the_same_ranks_in_another_order():
    found = {score: planned(score) for score in ("omega", "permuted")}
    by_size = {}
    for score, plan in found.items():
        by_size[score] = defaultdict(list)
        for rank, shape, _ in plan.values():
            by_size[score][shape].append(rank)
    assert found["omega"] != found["permuted"]
    for shape, own in by_size["omega"].items():  # what is left of the budget goes to the largest remainders, wherever
        moved = by_size["permuted"][shape]
        assert sum((Counter(own) - Counter(moved)).values()) <= 1


def test_a_permutation_is_that_of_the_seed_and_the_same_at_each_change():
    assert planned("permuted") == planned("permuted", step=2) != planned("permuted", seed=2)


def test_one_type_gets_one_rank_but_for_what_is_left_of_the_budget():
    plan = planned("type")
    ranks = defaultdict(set)
    for name, (rank, _, _) in plan.items():
        ranks[kind(name)].add(rank)
    assert len(ranks) == 7 and len({frozenset(each) for each in ranks.values()}) > 1
    assert all(max(each) - min(each) <= 1 for each in ranks.values())


@pytest.mark.parametrize("score", ["omega", "permuted", "type"])
def test_no_score_spends_more_than_uniform_ranks(score):
    plan = planned(score)
    assert sum(rank * cost for rank, _, cost in plan.values()) <= 4 * sum(cost for _, _, cost in plan.values())


def test_a_score_that_there_is_not_is_refused():
    with pytest.raises(rw.InputError, match="score"):
        rw.methods.build({"name": "simplex-lora", "score": "spectrum"})
