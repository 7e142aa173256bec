"""SoRA: the proximal step on gates, what it leaves alone, and what a fold makes of closed gates."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
import rankwise as rw
from methods import one_shape
from rankwise.ranks import ranks, sites
from rankwise.ranks.fold import fold


def attached(method, shape="bert"):
    torch.manual_seed(1)
    return method.attach(models.model(shape), head=models.head(shape))


def gates(model):
    return {site.name: site.gates.detach().clone() for site in sites(model)}


def with_products(model):
    """Every B away from 0, so that each gate matters."""
    torch.manual_seed(2)
    with torch.no_grad():
        for site in sites(model):
            torch.nn.init.normal_(site.B, std=0.3)
    return model


@pytest.mark.parametrize("shape", models.SHAPES)
def test_with_gates_held_at_1_and_no_threshold_it_is_lora_step_by_step(shape):
    lora, sora = rw.LoRA(rank=3), rw.SoRA(rank=3, sparsity=0.0, gates="ones")
    a, b = attached(lora, shape), attached(sora, shape)
    for site in sites(b):
        site.gates.requires_grad_(False)
    torch.manual_seed(5)
    plain = models.train(a, rw.SimplexAdam(lora, a, lr=1e-2, weight_decay=0.1), 5)
    torch.manual_seed(5)
    assert models.train(b, rw.SimplexAdam(sora, b, lr=1e-2, weight_decay=0.1), 5) == plain
    for x, y in zip(sites(a), sites(sora.fold(b)), strict=True):
        assert torch.equal(x.A, y.A) and torch.equal(x.B, y.B)


def test_a_rate_of_0_leaves_gates_and_everything_else_where_they_are():
    method = rw.SoRA(rank=3, sparsity=1e6, gates="normal", gate_rate=0.0)
    model = with_products(attached(method))
    before = copy.deepcopy(model.state_dict())
    models.train(model, rw.SimplexAdam(method, model, lr=0.0), 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@settings(max_examples=15, deadline=None)
@given(rate=st.floats(1e-3, 1.0), sparsity=st.floats(0, 3.0))
def test_a_step_is_the_soft_threshold_of_the_gradient_step_at_rate_times_lambda(rate, sparsity):
    method = rw.SoRA(rank=3, sparsity=sparsity, gates="normal", gate_rate=rate)
    model = with_products(attached(method)).eval()
    before = gates(model)
    model(**models.batch()).loss.backward()
    slopes = {site.name: site.gates.grad.clone() for site in sites(model)}
    rw.SimplexAdam(method, model, lr=1e-3, weight_decay=0.1).step()
    for name, g in before.items():
        moved = (g - rate * slopes[name]).double()
        xi = rate * sparsity
        expected = torch.where(moved.abs() > xi, moved - xi * moved.sign(), torch.zeros_like(moved))
        assert torch.allclose(gates(model)[name].double(), expected, atol=1e-6)


def test_the_threshold_follows_the_schedule():
    method = rw.SoRA(rank=2, sparsity=1.0, gate_rate=0.1)
    model = attached(method)  # B = 0, so the gates have no gradient and only the threshold moves them
    optimizer = rw.SimplexAdam(method, model, lr=1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1.0, 0.5, 0.0)[min(step, 2)])
    for expected in (0.9, 0.85, 0.85):
        models.train(model, optimizer, 1)
        schedule.step()
        assert all(torch.allclose(g, torch.full_like(g, expected), atol=1e-6) for g in gates(model).values())


def test_gates_have_a_group_of_their_own_without_decay():
    method = rw.SoRA(rank=2, gate_rate=0.3, gate_rule="adamw")
    model = attached(method)
    [group] = [g for g in rw.SimplexAdam(method, model, lr=0.1, weight_decay=0.5).param_groups if g["name"] == "gates"]
    assert (group["lr"], group["rule"], group["weight_decay"]) == (0.3, "adamw", 0.0)
    assert sum(p.numel() for p in group["params"]) == 2 * len(sites(model))


def test_no_step_walks_the_modules_in_search_of_gates(monkeypatch):
    method = rw.SoRA(rank=2)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    models.train(model, optimizer, 1)
    model(**models.batch()).loss.backward()

    def walk(*_, **__):
        raise AssertionError("a walk over all modules")

    monkeypatch.setattr(torch.nn.Module, "named_modules", walk)
    before = [site.clone() for site in optimizer.param_groups[-1]["params"]]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[-1]["params"], strict=True))


def test_gates_that_a_state_brings_back_are_stepped_by_the_optimizer():
    method = rw.SoRA(rank=2, gates="normal")
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    state = copy.deepcopy(model.state_dict())
    method.fold(model)
    assert not optimizer.param_groups[-1]["params"]
    model.load_state_dict(state)
    group = optimizer.param_groups[-1]["params"]
    assert [id(p) for p in group] == [id(site.gates) for site in sites(model)]


def test_a_larger_lambda_leaves_fewer_ranks():
    left = []
    for sparsity in (0.0, 1.0, 4.0, 400.0):
        method = rw.SoRA(rank=4, sparsity=sparsity, gates="normal", gate_rate=0.05)
        model = attached(method)
        models.train(model, rw.SimplexAdam(method, model, lr=1e-2), 6)
        left.append(sum(ranks(model).values()))
    assert left[0] == 4 * len(sites(model)) > left[1] > left[2] > left[3] == 0


@one_shape
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_fold_cuts_closed_gates_and_changes_no_output(shape, data):
    method = rw.SoRA(rank=3)
    model = with_products(attached(method, shape)).double()  # in fp32 T5 rounds by more than the bound itself
    live = {}
    with torch.no_grad():
        for site in sites(model):
            values = data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, -1.5, 2.0]), min_size=3, max_size=3))
            site.gates.copy_(torch.tensor(values)[:, None])
            live[site.name] = sum(v != 0 for v in values)
    before = models.logits(model)
    assert ranks(model) == live
    assert rw.rank_report(model).total == sum(live[s.name] * s.cost for s in sites(model))
    folded = method.fold(model)
    assert torch.allclose(models.logits(folded), before, atol=1e-5)
    if any(live.values()):
        assert ranks(folded) == live and all(s.A.shape[0] == live[s.name] for s in sites(folded) if s.present)
    else:
        assert sum(ranks(folded).values()) == 1  # PEFT knows no adapter without sites


def test_when_all_gates_are_closed_what_is_saved_is_the_base(tmp_path):
    method = rw.SoRA(rank=2)
    model = with_products(attached(method))
    with torch.no_grad():
        for site in sites(model):
            site.gates.zero_()
    rw.save(model, tmp_path / "adapter")
    again = rw.load(models.model(), tmp_path / "adapter")
    assert torch.allclose(models.logits(again), models.logits(model), atol=1e-6)
    assert torch.allclose(models.logits(again), models.logits(models.model()), atol=1e-6)


def test_the_moments_follow_a_fold():
    method = rw.SoRA(rank=3, sparsity=0.0, gates="normal")
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    models.train(model, optimizer, 3)
    first = sites(model)[0]
    with torch.no_grad():
        first.gates[1] = 0.0
    g, old = first.gates.detach().clone()[[0, 2]].T, optimizer.state[first.B]["exp_avg"].clone()
    kept = optimizer.state[first.A]["exp_avg"][[0, 2]].clone()
    fold(model)
    first = sites(model)[0]
    assert torch.allclose(optimizer.state[first.B]["exp_avg"], old[:, [0, 2]] / g)
    assert torch.equal(optimizer.state[first.A]["exp_avg"], kept)
    assert not next(group for group in optimizer.param_groups if group["name"] == "gates")["params"]
    models.train(model, optimizer, 2, start=3)


def test_a_state_brings_its_gates_or_takes_them_away():
    method = rw.SoRA(rank=3, sparsity=2.0, gate_rate=0.1, gates="normal")
    gated = with_products(attached(method))
    models.train(gated, rw.SimplexAdam(method, gated, lr=1e-2), 2)
    state, before = copy.deepcopy(gated.state_dict()), models.logits(gated)
    folded = method.fold(gated)
    other = attached(method)
    other.load_state_dict(folded.state_dict())
    assert ranks(other) == ranks(folded) and torch.equal(models.logits(other), models.logits(folded))
    other.load_state_dict(state)
    assert torch.equal(models.logits(other), before) and all(site.gates is not None for site in sites(other))


def test_ranks_cannot_be_set_by_hand_while_gates_are_on():
    model = attached(rw.SoRA(rank=3))
    name = sites(model)[0].name
    with pytest.raises(rw.InputError, match="fold the model first"):
        rw.resize(model, {name: 1})
    rw.resize(rw.SoRA(rank=3).fold(model), {name: 1})


def test_a_diverged_gate_ends_the_training():
    method = rw.SoRA(rank=2)
    model = attached(method)
    with torch.no_grad():
        sites(model)[0].gates[0] = float("inf")
    with pytest.raises(ValueError, match="not finite after step 1"):
        method.after_step(model, 1, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": -1}, "sparsity must not be negative"),
        ({"gates": "zeros"}, "gates must be one of normal, ones"),
        ({"gate_rule": "adam"}, "gate_rule must be one of sgd, adamw"),
        ({"init": "svd"}, "init must be kaiming or normal"),
    ],
)
def test_bad_options_get_one_clear_line(options, message):
    with pytest.raises(rw.InputError, match=message):
        rw.SoRA(**options)
