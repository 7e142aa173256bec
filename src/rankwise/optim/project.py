"""Projections and proximal maps for ω and g, which compute in fp64 and return the dtype of their input.

They decide nothing by a look at a value: on a GPU that would wait, in every step, for all that is queued there.
"""

import torch
from torch import Tensor

from rankwise.errors import NotFiniteError


def at_hand(x: Tensor) -> bool:
    """Whether to read a value of x costs nothing, as on a CPU."""
    return x.device.type == "cpu"


@torch.no_grad()
def check_finite(scales: Tensor, which: str, rate: str, step: int, due: bool) -> None:
    """Raise NotFiniteError if `scales` are not finite: `which` (ω is, gates are), after steps of the option `rate`.

    Without a name for `rate` they have the learning rate's.

    Where it is not `due`, a GPU is not made to wait for the answer: all of them become NaN there, and so does the loss.
    """
    if not due and not at_hand(scales):
        scales.add_(0 * scales.sum())
    elif not torch.isfinite(scales).all():
        lower = " or ".join(filter(None, ["the learning rate", rate]))
        raise NotFiniteError(f"{which} not finite after step {step}: the training has diverged; lower {lower}")


def simplex(x: Tensor, total: float) -> Tensor:
    """argmin_y ‖y − x‖² over {y ≥ 0, Σy = total}: the exact sort-based algorithm (Held et al. 1974; Duchi et al. 2008).

    A point that is already in the set (within 1e-9 of its total, or its dtype's precision) is returned bit for bit.

    Args:
        x: (n,). total: > 0.
    Raises:
        ValueError: x is empty or, where it is `at_hand`, not finite, or total is not positive.
    """
    v = x.double()
    if x.numel() == 0:
        raise ValueError("the simplex projection needs at least one entry")
    if not total > 0 or (at_hand(x) and not torch.isfinite(v).all()):
        raise ValueError("the simplex projection needs finite entries and a total above 0")
    slack = max(1e-9, x.numel() * torch.finfo(x.dtype).eps / 2) * total
    inside = (v >= 0).all() & ((v.sum() - total).abs() <= slack)
    v = v - v.max()  # same projection, but the total is not lost in the rounding of huge entries
    # The largest k with x_(k) > θ_k, where θ_k makes the k largest sum to the total; then y = (x − θ)₊.
    descending = v.sort(descending=True).values
    theta = (descending.cumsum(0) - total) / torch.arange(1, v.numel() + 1, device=v.device)
    k = (descending > theta).sum()
    return torch.where(inside, x, (v - theta.take(k - 1)).clamp_min(0).to(x.dtype))


def softmax(x: Tensor, total: float, weights: Tensor | None = None) -> Tensor:
    """y_i = total · w_i e^{x_i} / Σ_j w_j e^{x_j}, with w = 1 or, rank-weighted, w_i = r_i (SimplexLoRA's code).

    The result is on the simplex, but this is not a projection: applying it again changes the result.

    Args:
        x, weights: (n,). total: > 0.
    """
    v = x.double()
    if weights is not None:
        v = v + weights.double().log()  # log 0 = −inf: a site without rank gets nothing
    return (total * torch.softmax(v, 0)).to(x.dtype)


def top_k(x: Tensor, k: int) -> Tensor:
    """argmin_y ‖y − x‖² over {‖y‖₀ ≤ k}: keeps the k entries of largest |x|, the first ones of a tie (WeightLoRA).

    Args:
        x: (n,). k: 0 to n.
    Raises:
        ValueError: k is outside 0..n.
    """
    if not 0 <= k <= x.numel():
        raise ValueError(f"cannot keep {k} of {x.numel()} entries: keep 0 to {x.numel()}")
    kept = x.abs().sort(descending=True, stable=True).indices[:k]
    return torch.zeros_like(x).index_copy(0, kept, x[kept])


def prox_l1(x: Tensor, xi: float) -> Tensor:
    """argmin_y ½‖y − x‖² + ξ‖y‖₁: the soft threshold sign(x) max(|x| − ξ, 0) (SoRA, eq. 5).

    Args:
        x: any shape. xi: ≥ 0.
    Raises:
        ValueError: ξ is negative.
    """
    if xi < 0:
        raise ValueError(f"the threshold must be 0 or more, not {xi}")
    return x.sign() * (x.abs() - xi).clamp_min(0)
