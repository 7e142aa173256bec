"""Squeeze cuts in mid-training, by what units are worth or by a control, and never above its budget."""

import re
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch

import models
import rankwise as rw
from rankwise.errors import InputError, NotFiniteError
from rankwise.methods import build
from rankwise.methods.squeeze import Score
from rankwise.ranks import rank_report, ranks, sites
from rankwise.ranks.sites import omega
from rankwise.ranks.spectrum import gains

SCORES = get_args(Score)


def attached(method, seed=1):
    torch.manual_seed(seed)
    return method.attach(models.model("bert"), head=models.head("bert"))


def trained(method, steps):
    model = attached(method)
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), steps)
    return model


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mean_rank", [0.3, 1.0, 1.7])
def test_every_score_stays_within_the_budget_of_every_cut(score, mean_rank):
    method = rw.Squeeze(rank=4, mean_rank=mean_rank, every=2, times=3, score=score)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    uniform = sum(site.cost for site in sites(model))
    before = ranks(model)
    for cut in (1, 2, 3):
        models.train(model, optimizer, 2, start=2 * cut - 2)
        after, limit = ranks(model), 4 * (mean_rank / 4) ** (cut / 3) * uniform
        assert limit - max(site.cost for site in sites(model)) < rank_report(model).total <= limit + 1e-6
        assert all(after[name] <= before[name] for name in after)
        before = after
    assert omega(model) is None
    models.train(model, optimizer, 2, start=6)
    assert ranks(model) == before and method.search(model).advice == ""


def test_the_best_units_of_all_sites_stay():
    """Against a choice by hand on sites of one size: the largest of all singular values of s B A."""
    method = rw.Squeeze(rank=3, mean_rank=1, every=3, targets=["query", "key", "value"])
    model = trained(method, 2)
    worth = {}
    for site in sites(model):
        values = torch.linalg.svdvals(site.scaling * site.B.double() @ site.A.double()).detach().numpy() ** 2
        assert np.allclose(gains(site), values[:3], rtol=1e-9, atol=1e-18)
        worth |= {(site.name, unit): value for unit, value in enumerate(values[:3])}
    best = sorted(worth, key=worth.get, reverse=True)[: len(sites(model))]
    assert {n: r for n, r in method.after_step(model, 3, 1e-2).items() if r} == Counter(name for name, _ in best)


def test_a_cut_keeps_what_the_best_units_output_and_the_moments_of_the_rest():
    method = rw.Squeeze(rank=4, mean_rank=0.5, every=4)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    models.train(model, optimizer, 3)
    products = {site.name: site.B.detach() @ site.A.detach() for site in sites(model)}
    plan = method.after_step(model, 4, 1e-2)
    rw.resize(model, plan)
    for site in sites(model):
        if site.present:
            U, S, Vh = torch.linalg.svd(products[site.name])
            r = site.rank
            assert torch.allclose(site.B @ site.A, (U[:, :r] * S[:r]) @ Vh[:r], atol=1e-6)
            assert all(optimizer.state[p]["exp_avg"].any() for p in (site.A, site.B))
    assert {name for name, r in ranks(model).items() if not r}


def test_a_cut_at_the_last_step_is_a_cut_after_training():
    """The ranks and products are those that `resize_adapter` finds for the adapter trained alike, without a cut."""
    whole = trained(rw.LoRA(rank=3), 4)
    method = rw.Squeeze(rank=3, mean_rank=0.5, every=4)
    model = trained(method, 4)
    plan = rw.Squeeze(rank=3, mean_rank=0.5, every=1).after_step(whole, 1, 1e-2)
    rw.resize(whole, plan)
    assert ranks(whole) == ranks(model)
    assert torch.allclose(models.logits(whole), models.logits(model), atol=1e-6)


def test_rank_of_one_type_is_spread_evenly_over_its_blocks():
    method = rw.Squeeze(rank=4, mean_rank=0.8, every=2, score="type")
    found = {}
    for name, rank in ranks(trained(method, 2)).items():
        found.setdefault(re.sub(r"\d+", "*", name), []).append(rank)
    assert len(found) == 7  # with the pooler
    assert all(max(each) - min(each) <= 1 for each in found.values())
    assert len({tuple(each) for each in found.values()}) > 1


@pytest.mark.parametrize("score", ["permuted", "random"])
def test_draws_are_those_of_the_seed(score):
    method = rw.Squeeze(rank=2, mean_rank=0.5, every=1, score=score)

    def plan(seed, step=1):
        model = trained(rw.Squeeze(rank=2, mean_rank=0.5, every=9), 1)
        torch.manual_seed(seed)
        torch.rand(3)  # how far a stream has gone does not matter
        return dict(rw.Squeeze(rank=2, mean_rank=0.5, every=1, times=step, score=score).after_step(model, step, 1e-2))

    assert plan(1) == plan(1) != plan(2)
    assert method.score == score


@pytest.mark.parametrize("score", SCORES)
def test_before_anything_is_learnt_a_cut_is_even(score):
    method = rw.Squeeze(rank=2, mean_rank=1, every=1, score=score)
    model = attached(method)
    plan = method.after_step(model, 1, 0.0)
    spent = sum(plan[site.name] * site.cost for site in sites(model))
    assert spent <= sum(site.cost for site in sites(model))
    if score != "random":
        assert set(plan.values()) == {1}


def test_a_site_without_part_in_the_loss_gets_nothing():
    method = rw.Squeeze(rank=2, mean_rank=0.5, every=2)
    model = trained(method, 1)
    quiet = sites(model)[0]
    with torch.no_grad():
        quiet.B.zero_()
    assert method.after_step(model, 2, 1e-2)[quiet.name] == 0


def test_a_training_that_ends_before_its_last_cut_says_so():
    method = rw.Squeeze(rank=2, mean_rank=0.5, every=5)
    model = trained(method, 3)
    assert "the last cut is due after step 5: train longer" in str(method.search(model))


def test_numbers_that_are_not_finite_are_reported_at_the_cut():
    method = rw.Squeeze(rank=2, mean_rank=0.5, every=2)
    model = trained(method, 1)
    with torch.no_grad():
        sites(model)[0].B.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="not finite after step 2: the training has diverged"):
        method.after_step(model, 2, 1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "mean_rank": 3}, "mean_rank must be at most 2 (rank), not 3"),
        ({"mean_rank": 0}, "mean_rank"),
        ({"score": "guess"}, "score"),
        ({"omega_rate": 5.0}, "omega_rate is for score omega, and the score is spectrum: leave one of them out"),
        ({"every": 0}, "every"),
        ({"init": "pissa"}, "squeeze changes ranks: init must be kaiming or normal, not pissa"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(options, message):
    with pytest.raises(InputError) as error:
        build({"name": "squeeze", **options})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("method", [rw.Squeeze, rw.SpacedLoRA])
def test_a_budget_below_one_unit_is_refused_with_the_least(method):
    with pytest.raises(InputError, match=r"mean_rank 0.001 leaves .* parameters, .* raise it to 0\.\d+ or more"):
        attached(method(mean_rank=0.001))


@pytest.mark.parametrize("mean_rank", [0.25, 1, 1.5])
def test_spaced_units_are_evenly_spaced_and_the_same_for_every_seed(mean_rank):
    method = rw.SpacedLoRA(rank=4, mean_rank=mean_rank)
    models_of_seeds = [attached(method, seed=seed) for seed in (1, 2)]
    found = [ranks(model) for model in models_of_seeds]
    assert found[0] == found[1] and max(found[0].values()) == np.ceil(mean_rank)
    limit = mean_rank * sum(site.cost for site in sites(models_of_seeds[0]))
    assert limit - 160 < rank_report(models_of_seeds[0]).total <= limit
    assert {site.scaling for site in sites(models_of_seeds[0])} == {4.0}


def test_spaced_units_start_as_those_of_lora_do():
    model = attached(rw.SpacedLoRA(rank=8, mean_rank=0.5))
    A = torch.cat([site.A.detach().flatten() * site.in_features**0.5 for site in sites(model) if site.present])
    assert A.abs().max() <= 1 and float(A.std()) == pytest.approx(3**-0.5, rel=0.1)  # uniform in ± 1/√in
    assert not any(site.B.any() for site in sites(model) if site.present)
