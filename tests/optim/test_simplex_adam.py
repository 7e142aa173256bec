import pytest
import torch

import models
import rankwise as rw
from rankwise.ranks import ranks, sites
from rankwise.ranks.sites import omega

SEARCH = rw.SimplexLoRA(rank=4, every=3, times=2, omega_rate=20.0)


def attached(method, shape="bert"):
    torch.manual_seed(1)
    return method.attach(models.model(shape), head=models.head(shape))


def test_lora_under_simplex_adam_is_adamw_step_by_step():
    method = rw.LoRA(rank=2)
    ours, theirs = attached(method), attached(method)
    mine = rw.SimplexAdam(method, ours, lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW(method.param_groups(theirs), lr=1e-2, weight_decay=0.1)
    torch.manual_seed(2)
    a = models.train(ours, mine, 5)
    torch.manual_seed(2)
    b = models.train(theirs, other, 5)
    assert a == b
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_an_sgd_group_takes_a_plain_step_and_keeps_its_gradient():
    model = attached(SEARCH)
    optimizer = rw.SimplexAdam(SEARCH, model, lr=1e-2)
    weights = omega(model)
    weights.grad = torch.zeros_like(weights)
    weights.grad[0], weights.grad[1] = 0.01, -0.01  # their sum is 0, so the step stays on the simplex
    optimizer.step()
    assert torch.allclose(weights[:2], torch.tensor([1 - 0.2, 1 + 0.2]))
    assert weights.grad[0] == 0.01 and weights not in optimizer.state


def test_rate_0_leaves_omega_and_the_factors_where_they_are():
    model = attached(SEARCH)
    optimizer = rw.SimplexAdam(SEARCH, model, lr=0.0)
    with torch.no_grad():
        omega(model)[:2] = torch.tensor([0.3, 1.7])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    models.train(model, optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("rounding", ["floor", "ceil", "budget"])
@pytest.mark.parametrize("change", ["svd", "reinit"])
def test_the_search_moves_rank_within_the_budget_and_ends_as_plain_lora(rounding, change):
    method = rw.SimplexLoRA(rank=4, every=3, times=2, omega_rate=50.0, rounding=rounding, change=change)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    budget = sum(s.parameters for s in sites(model))
    models.train(model, optimizer, 3)
    assert sum(omega(model).tolist()) == pytest.approx(len(sites(model)), rel=1e-6)
    models.train(model, optimizer, 4, start=3)
    assert omega(model) is None and not any("parametrizations" in n for n, _ in model.named_parameters())
    assert len(set(ranks(model).values())) > 1
    if rounding != "ceil":
        assert sum(s.parameters for s in sites(model)) <= budget
    trainable = [p for p in model.parameters() if p.requires_grad]
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in trainable} == {id(p) for p in grouped} and len(trainable) == len(grouped)


def test_folding_at_the_end_does_not_move_the_function():
    method = rw.SimplexLoRA(rank=4, every=100, omega_rate=20.0)
    model = attached(method)
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), 4)
    assert omega(model).std() > 0.01
    before = models.logits(model)
    method.fold(model)
    assert omega(model) is None
    assert torch.allclose(models.logits(model), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore:no gradient has reached 13 of 13 sites")  # there is no loss
def test_an_emptied_site_comes_back_when_its_weight_rises():
    method = rw.SimplexLoRA(rank=2, every=1, times=4)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    first = sites(model)[0]
    with torch.no_grad():
        omega(model)[0], omega(model)[1] = 0.0, 2.0
    optimizer.step()
    assert first.rank == 0
    with torch.no_grad():
        omega(model)[0], omega(model)[1] = 1.5, 0.5
    optimizer.step()
    assert first.rank == 3 and first.scale is not None and not first.B.any()
    models.train(model, optimizer, 1)
    assert first.B.any()


def test_restart_draws_every_site_afresh():
    method = rw.SimplexLoRA(rank=4, every=2, times=1, finish="restart")
    model = attached(method)
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), 2)
    assert all(not s.B.any() for s in sites(model) if s.present)


def test_rewarming_scales_the_rate_and_leaves_the_schedule_alone():
    method = rw.SimplexLoRA(rank=4, every=2, times=1, rewarm=4, omega_rate=50.0)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    models.train(model, optimizer, 2)
    assert optimizer.changed == 2
    site = next(s for s in sites(model) if s.present)
    moved = []
    for step in range(2, 8):
        before = site.A.detach().clone()
        models.train(model, optimizer, 1, start=step)
        moved.append((site.A - before).abs().max().item())
        assert optimizer.param_groups[0]["lr"] == 1e-2
    assert moved[0] < 0.5 * moved[3]


def test_decay_pulls_omega_to_1():
    method = rw.SimplexLoRA(rank=4, every=100, omega_rate=1.0, omega_decay=0.5)
    model = attached(method)
    with torch.no_grad():
        omega(model)[:2] = torch.tensor([0.0, 2.0])
    method.after_step(model, 1, lr=1.0)
    assert torch.allclose(omega(model)[:2], torch.tensor([0.5, 1.5]))


def test_state_of_other_ranks_is_refused():
    model = attached(SEARCH)
    optimizer = rw.SimplexAdam(SEARCH, model, lr=1e-2)
    models.train(model, optimizer, 4)
    fresh = attached(SEARCH)
    with pytest.raises(RuntimeError, match="other ranks"):
        rw.SimplexAdam(SEARCH, fresh, lr=1e-2).load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="not written by SimplexAdam"):
        optimizer.load_state_dict(torch.optim.AdamW(fresh.parameters()).state_dict())


def test_a_checkpoint_from_before_groups_of_scales_were_marked_is_read_too():
    model = attached(SEARCH)
    optimizer = rw.SimplexAdam(SEARCH, model, lr=1e-2)
    models.train(model, optimizer, 1)
    state = optimizer.state_dict()
    assert [group.pop("scale", False) for group in state["param_groups"]] == [False, False, False, True]
    optimizer.load_state_dict(state)
    assert [group.get("scale", False) for group in optimizer.param_groups] == [False, False, False, True]


def test_a_step_that_a_gradient_scaler_skips_changes_nothing():
    method = rw.SimplexLoRA(rank=4, every=1, times=3)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.no_grad():
        omega(model)[:2] = torch.tensor([0.0, 2.0])
    scaler.scale(model(**models.batch()).loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.steps == 0 and set(ranks(model).values()) == {4}


@pytest.mark.filterwarnings("ignore:no gradient has reached 13 of 13 sites")  # there is no loss
def test_a_restart_leaves_sites_empty_that_were_empty_already():
    method = rw.SimplexLoRA(rank=2, every=1, times=2, finish="restart")
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model)
    for _ in range(2):
        with torch.no_grad():
            omega(model)[:2] = torch.tensor([0.0, 2.0])
        optimizer.step()
    assert omega(model) is None and list(ranks(model).values())[:3] == [0, 4, 2]


def test_rewarming_begins_at_a_thousandth_and_is_over_after_its_steps():
    method = rw.SimplexLoRA(rank=4, every=100, rewarm=2)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1.0)
    optimizer.changed = 10
    shares = []
    for optimizer.steps in (11, 12, 13):
        with optimizer._rewarmed():
            shares.append(optimizer.param_groups[0]["lr"])
    assert shares == pytest.approx([0.001, 0.5005, 1.0])


def test_folding_carries_the_moments_of_b_to_its_new_gradient():
    """B' = ωB has the gradient ∂L/∂B / ω; with moments left as they were, Adam's step on B would be 1/ω too long."""
    method = rw.SimplexLoRA(rank=2, every=100)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-3)
    models.train(model, optimizer, 2)
    with torch.no_grad():
        omega(model)[0] = 0.25
    site = sites(model)[0]
    A, B = ({k: v.clone() for k, v in optimizer.state[p].items()} for p in (site.A, site.B))
    method.fold(model)
    assert torch.equal(optimizer.state[site.A]["exp_avg"], A["exp_avg"])
    assert torch.allclose(optimizer.state[site.B]["exp_avg"], B["exp_avg"] / 0.25)
    assert torch.allclose(optimizer.state[site.B]["exp_avg_sq"], B["exp_avg_sq"] / 0.25**2)


def test_an_omega_that_is_not_finite_is_called_a_divergence():
    model = attached(SEARCH)
    optimizer = rw.SimplexAdam(SEARCH, model)
    omega(model).grad = torch.full_like(omega(model), float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        optimizer.step()


def test_a_group_that_is_added_later_is_stepped_too():
    method = rw.LoRA(rank=2)
    optimizer = rw.SimplexAdam(method, attached(method), lr=0.1)
    late = torch.nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(1)
    optimizer.step()
    assert late.item() < 1


# --- ω on its own clock -----------------------------------------------------------------------------------------------

CLOCK = rw.WeightLoRA(rank=2, keep=3, start=50, every=50)  # ω is not projected within these tests


def steps_of_omega(gradients, method=CLOCK, rates=(), lr=1e-2):
    """ω before and after each step on these gradients of ω, at these rates of the run."""
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=lr)
    weights = omega(model)
    seen = [weights.detach().clone()]
    for step, gradient in enumerate(gradients):
        for group in optimizer.param_groups if rates else ():
            group["lr"] = rates[step]
        weights.grad = gradient.clone()
        optimizer.step()
        seen.append(weights.detach().clone())
    return torch.stack(seen)


@pytest.mark.parametrize("growth", [1.0, 10.0, 0.1])
def test_no_step_of_the_clock_is_longer_than_its_share_of_the_search(growth):
    gradients = [growth**step * torch.arange(-6.0, 7.0) for step in range(8)]
    moved = steps_of_omega(gradients).diff(dim=0)
    assert moved.abs().max() <= 1.5 / 50 * (1 + 1e-4)  # ω itself is rounded
    assert moved[0, 0] > 0.99 * 1.5 / 50 and not moved[:, 6].any()  # where there is no gradient nothing moves


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_the_clock_is_the_same_whatever_the_size_of_the_loss_and_the_rate_of_the_run(size):
    torch.manual_seed(3)
    gradients = [torch.randn(13) for _ in range(6)]
    expected = steps_of_omega(gradients)
    assert torch.allclose(steps_of_omega([size * g for g in gradients], lr=1e-5), expected, atol=1e-6)
    assert torch.equal(steps_of_omega(gradients, rates=[1e-3, 1e-8, 0.5, 1.0, 3.0, 1e-4]), expected)


def test_the_clock_stands_still_while_the_rate_is_0():
    gradients = [torch.ones(13)] * 3
    moved = steps_of_omega(gradients, rates=[0.0, 1e-3, 0.0]).diff(dim=0)
    assert not moved[0].any() and moved[1].all() and not moved[2].any()


def test_neither_a_re_warm_up_nor_a_schedule_nor_a_checkpoint_rewrites_the_clock():
    method = rw.SimplexLoRA(rank=4, every=3, times=2, rewarm=3)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    for step in range(5):
        models.train(model, optimizer, 1, start=step)
        schedule.step()
    [group] = [group for group in optimizer.state_dict()["param_groups"] if group["name"] == "omega"]
    assert group["clock"] == 1.5 / 6 and group["lr"] < 1e-2


def test_the_moments_of_omega_go_along_with_a_rank_change():
    method = rw.SimplexLoRA(rank=4, every=3, times=2)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    models.train(model, optimizer, 3)
    assert optimizer.changed == 3 and set(ranks(model).values()) != {4}
    state = optimizer.state[omega(model)]
    assert state["step"] == 3 and state["exp_avg"].any()


def test_decay_follows_the_clock():
    method = rw.SimplexLoRA(rank=4, every=5, times=1, omega_decay=0.5)  # a step of 0.3
    model = attached(method)
    with torch.no_grad():
        omega(model)[:2] = torch.tensor([0.0, 2.0])
    omega(model).grad = torch.zeros_like(omega(model))
    rw.SimplexAdam(method, model).step()
    assert torch.allclose(omega(model)[:2], torch.tensor([0.15, 1.85]))


def test_the_clock_moves_ranks_at_any_rate_of_the_run():
    for rate in (1e-5, 1e-2):
        method = rw.SimplexLoRA(rank=4, every=5, times=2)
        model = attached(method)
        optimizer = rw.SimplexAdam(method, model, lr=rate)
        models.train(model, optimizer, 10)
        found = optimizer.search()
        assert found.changed >= found.sites / 3 and found.moved > 0.5, found
