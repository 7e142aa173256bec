"""Optimizers go along with every parameter that is replaced."""

import pytest
import torch

import models
import rankwise as rw
from rankwise.ranks import RankPlan, ranks, sites


@pytest.mark.parametrize("moments", ["reset", "keep"])
@pytest.mark.parametrize("rank", [2, 6])
def test_moments_are_reset_or_carried_and_those_of_other_sites_stay(moments, rank):
    model = models.adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    models.train(model, optimizer, 2)
    first, second, *_ = sites(model)
    others = {k: v.clone() for k, v in optimizer.state[second.A].items()}
    rw.resize(model, RankPlan({first.name: rank}, moments=moments), optimizer)
    if moments == "reset":
        assert first.A not in optimizer.state and first.B not in optimizer.state
    else:
        assert optimizer.state[first.A]["exp_avg"].shape == first.A.shape
        assert optimizer.state[first.B]["exp_avg_sq"].shape == first.B.shape
        assert (optimizer.state[first.B]["exp_avg_sq"] >= 0).all()
        assert optimizer.state[first.A]["step"] == 2
    assert all(torch.equal(optimizer.state[second.A][k], v) for k, v in others.items())
    before = first.B.detach().clone()
    models.train(model, optimizer, 1)
    assert not torch.equal(first.B, before)


def test_a_site_that_returns_joins_the_other_sites_in_an_optimizer_without_group_names():
    model = models.adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    name = sites(model)[0].name
    rw.resize(model, {name: 0}, optimizer)
    rw.resize(model, {name: 2})
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == trained


@pytest.mark.parametrize(
    "made",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.RMSprop(p),
    ],
)
@pytest.mark.parametrize("rank", [2, 6])
def test_moments_of_other_optimizers_fit_the_new_factors_too(made, rank):
    model = models.adapted()
    optimizer = made([p for p in model.parameters() if p.requires_grad])
    models.train(model, optimizer, 2)
    rw.resize(model, RankPlan(dict.fromkeys(ranks(model), rank), moments="keep"), optimizer)
    for site in sites(model):
        for value in optimizer.state.get(site.A, {}).values():
            assert value.dim() == 0 or value.shape == site.A.shape
    models.train(model, optimizer, 1)
