"""Methods that keep k of n sites: by the size of ω, or drawn at random."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import models
import rankwise as rw
from rankwise.ranks import ranks, sites
from rankwise.ranks.sites import omega


def attached(method, shape="bert", seed=1):
    model = models.model(shape)
    torch.manual_seed(seed)
    return method.attach(model, head=models.head(shape))


def test_k_sites_stay_and_the_others_leave_model_and_optimizer():
    method = rw.WeightLoRA(rank=2, keep=4, start=3, every=5, omega_rate=50.0)
    model = attached(method)
    n = len(sites(model))
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    models.train(model, optimizer, 2)
    assert omega(model).count_nonzero() == n
    models.train(model, optimizer, 2, start=2)
    assert omega(model).count_nonzero() == 4 and all(r == 2 for r in ranks(model).values())
    models.train(model, optimizer, 1, start=4)
    kept = {name for name, r in ranks(model).items() if r}
    assert len(kept) == 4
    assert kept == {s.name for s, w in zip(sites(model), omega(model).tolist(), strict=True) if w}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    models.train(model, optimizer, 3, start=5)
    assert {name for name, r in ranks(model).items() if r} == kept


def test_the_largest_weights_stay_whatever_their_sign():
    method = rw.WeightLoRA(rank=2, keep=2, start=1, every=1)
    model = attached(method)
    with torch.no_grad():
        omega(model).copy_(torch.linspace(0.1, 1, len(sites(model))))
        omega(model)[3] = -5.0
    plan = method.after_step(model, 1, 1.0)
    names = [s.name for s in sites(model)]
    assert set(names) - set(plan) == {names[3], names[-1]} and set(plan.values()) == {0}


def test_with_b_at_0_the_first_projection_is_decided_by_ties():
    method = rw.WeightLoRA(rank=2, keep=2, start=1, every=2, omega_rate=1e3)
    model = attached(method)
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), 1)
    assert omega(model).tolist() == [1.0, 1.0] + [0.0] * (len(sites(model)) - 2)


def test_a_rate_of_0_moves_no_weight():
    method = rw.WeightLoRA(rank=2, keep=2, start=1, every=9)
    model = attached(method)
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), 1)
    before = omega(model).clone()
    with torch.no_grad():
        omega(model)[0] = 7.0
    method.after_step(model, 2, 0.0)
    assert omega(model)[0] == 7.0 and torch.equal(omega(model)[1:], before[1:])


def test_the_random_choice_is_the_seeds_and_is_k_of_n():
    method = rw.RandomLoRA(rank=2, keep=5)
    first, again, other = (attached(method, seed=seed) for seed in (1, 1, 2))
    assert ranks(first) == ranks(again) != ranks(other)
    assert sorted(ranks(first).values(), reverse=True)[:6] == [2, 2, 2, 2, 2, 0]


def test_fat_lora_sets_the_weights_to_1_at_the_end_of_its_search():
    method = rw.FatLoRA(rank=2, every=2, times=1, omega_rate=100.0)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    models.train(model, optimizer, 1)
    with torch.no_grad():
        for site in sites(model):
            torch.nn.init.normal_(site.B, std=0.2)
        omega(model)[:3] = torch.tensor([0.9, 1.1, 1.0])
    kept = {site.name: site.B.detach().clone() for site in sites(model)}
    plan = method.after_step(model, 2, 0.0)
    rw.resize(model, replace(plan, ranks={}))
    assert omega(model) is None
    assert all(torch.equal(site.B, kept[site.name]) for site in sites(model))
    assert list(plan.values())[:3] == [2, 3, 2]  # rounded up


@pytest.mark.parametrize("kind", [rw.WeightLoRA, rw.RandomLoRA])
def test_bad_options_get_one_clear_line(kind):
    with pytest.raises(rw.InputError, match="keep must be at least 1"):
        kind(keep=0)
    with pytest.raises(rw.InputError, match="keep 99 is more than the 13 adapted layers"):
        kind(rank=2, keep=99).attach(models.model(), head=models.head())
    with pytest.raises(rw.InputError, match="changes ranks: init must be"):
        kind(init="svd_residual")


def test_the_projection_cannot_start_after_the_removal():
    with pytest.raises(rw.InputError, match="start must be 1 to 5"):
        rw.WeightLoRA(start=6, every=5)


def test_what_has_no_weight_is_gone_also_when_training_ends_before_the_removal(tmp_path):
    method = rw.WeightLoRA(rank=2, keep=3, start=1, every=50)
    model = attached(method)
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), 3)
    before = models.logits(model)
    rw.save(model, tmp_path / "adapter")
    again = rw.load(models.model(), tmp_path / "adapter")
    folded = method.fold(model)
    for each in (again, folded):
        assert sorted(ranks(each).values())[-4:] == ([2, 2, 2] if each is again else [0, 2, 2, 2])
        assert torch.allclose(models.logits(each), before, atol=1e-6)


def test_on_its_own_clock_omega_is_folded_where_the_sites_are_removed():
    method = rw.WeightLoRA(rank=2, keep=4, start=3, every=5)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    models.train(model, optimizer, 4)
    assert omega(model).count_nonzero() == 4
    before = models.logits(model)
    method.fold(after := deepcopy(model))
    assert torch.allclose(models.logits(after), before, atol=1e-6)
    models.train(model, optimizer, 1, start=4)
    assert omega(model) is None and sorted(ranks(model).values())[-5:] == [0, 2, 2, 2, 2]
    models.train(model, optimizer, 2, start=5)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_search_that_ties_have_decided_says_so():
    for rate, decided in ((1e-9, True), (None, False)):
        method = rw.WeightLoRA(rank=2, keep=2, start=4, every=5, omega_rate=rate)
        model = attached(method)
        optimizer = rw.SimplexAdam(method, model, lr=1e-2)
        models.train(model, optimizer, 5)
        found = optimizer.search()
        assert found.changed == 11 and ("the first sites of the model stayed" in found.advice) == decided, found
