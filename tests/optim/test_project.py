import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize, minimize_scalar

from rankwise.optim import project

vectors = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12).map(torch.tensor)
totals = st.floats(0.125, 64, width=32)


@given(vectors, totals)
def test_simplex_is_feasible_and_idempotent(x, total):
    y = project.simplex(x, total)
    assert (y >= 0).all()
    assert y.double().sum().item() == pytest.approx(total, rel=1e-6)
    assert torch.equal(project.simplex(y, total), y)


@given(vectors, totals)
def test_no_point_of_the_simplex_is_nearer(x, total):
    """The projection y is the one point with (x − y)·(z − y) ≤ 0 for every z of the set; its corners suffice."""
    x = x.double()
    y = project.simplex(x, total)
    corners = total * torch.eye(len(x), dtype=torch.float64)
    assert (((corners - y) @ (x - y)) <= 1e-6 * (1 + x.abs().max() ** 2 + total**2)).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0.5, 8))
def test_simplex_agrees_with_a_qp_solver(x, total):
    x = np.array(x)
    solved = minimize(
        lambda y: ((y - x) ** 2).sum(),
        np.full(len(x), total / len(x)),
        jac=lambda y: 2 * (y - x),
        method="SLSQP",
        bounds=[(0, None)] * len(x),
        constraints={"type": "eq", "fun": lambda y: y.sum() - total, "jac": np.ones_like},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert LinearConstraint(np.ones(len(x)), total, total).residual(solved.x)[0] == pytest.approx(0, abs=1e-9)
    ours = project.simplex(torch.tensor(x), total).numpy()
    assert np.abs(ours - solved.x).max() < 1e-6


def test_simplex_refuses_what_it_cannot_project():
    with pytest.raises(ValueError, match="finite"):
        project.simplex(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="above 0"):
        project.simplex(torch.ones(2), 0)


@given(vectors, totals)
def test_softmax_lands_on_the_simplex(x, total):
    y = project.softmax(x, total)
    assert (y >= 0).all()
    assert y.double().sum().item() == pytest.approx(total, rel=1e-5)


def test_rank_weighted_softmax_weighs_by_rank_and_gives_nothing_to_rank_0():
    y = project.softmax(torch.zeros(3), 6.0, torch.tensor([1.0, 2.0, 0.0]))
    assert torch.allclose(y, torch.tensor([2.0, 4.0, 0.0]))


@given(vectors, st.data())
def test_top_k_keeps_the_largest(x, data):
    k = data.draw(st.integers(0, len(x)))
    y = project.top_k(x, k)
    assert (y != 0).sum() <= k
    assert torch.equal(project.top_k(y, k), y)
    # No k-sparse vector is nearer: what is lost is the n − k smallest squares.
    assert ((y - x) ** 2).sum().item() == pytest.approx(x.abs().sort().values[: len(x) - k].square().sum().item())


def test_top_k_breaks_ties_by_position():
    assert project.top_k(torch.tensor([1.0, -1.0, 1.0]), 2).tolist() == [1.0, -1.0, 0.0]
    with pytest.raises(ValueError, match="keep 4 of 3"):
        project.top_k(torch.ones(3), 4)


@given(st.floats(-20, 20), st.floats(0, 10))
def test_prox_minimises_its_objective(g, xi):
    """½(x − g)² + ξ|x| at the prox is no larger than at the minimum a scalar solver finds."""
    x = project.prox_l1(torch.tensor([g], dtype=torch.float64), xi).item()

    def objective(x):
        return 0.5 * (x - g) ** 2 + xi * abs(x)

    found = minimize_scalar(objective, bounds=(-21, 21), method="bounded", options={"xatol": 1e-9})
    assert objective(x) <= found.fun + 1e-9
    assert x == pytest.approx(found.x, abs=1e-5)


@given(vectors)
def test_prox_at_threshold_0_moves_nothing(x):
    assert torch.equal(project.prox_l1(x, 0.0), x)
    with pytest.raises(ValueError, match="must be 0 or more"):
        project.prox_l1(x, -1.0)


def test_a_huge_entry_does_not_lose_the_total_in_rounding():
    assert project.simplex(torch.tensor([1e20, 0.0]), 1.0).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least one"):
        project.simplex(torch.tensor([]), 1.0)
