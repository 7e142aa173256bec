"""From weights on a simplex to integer ranks (SimplexLoRA, step 2), and ranks that nothing was learnt for."""

from collections.abc import Sequence
from math import ceil, floor
from typing import Literal, get_args

import numpy as np

EDGE = 1e-4  # so that ω r0 = 7.9999999, rounding noise of a projection, gives 8

Rounding = Literal["floor", "ceil", "budget"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


def allocate(
    weights: Sequence[float], costs: Sequence[int], limits: Sequence[int], rank: int, rounding: str = "budget"
) -> list[int]:
    """Integer ranks r_i for weights ω_i ≥ 0 with Σω = n.

    floor:  r_i = ⌊ω_i r0 + 1e-4⌋, as in the slides and the abstract.
    ceil:   r_i = ⌈ω_i r0 − 1e-4⌉, as in the authors' code; it may cost more than uniform ranks.
    budget: quotas q_i = ω_i P / Σ_j ω_j c_j with P = r0 Σ_j c_j, rounded by largest remainder. The cost Σ r_i c_i never
            exceeds P, and the rest is less than one more unit of any site with ω > 0 that could take it.

    Args:
        weights: ω, one per site. costs: c_i = in + out, parameters per unit of rank. limits: largest rank of a site.
        rank: r0, the uniform rank at the start.
    Raises:
        ValueError: an unknown rounding, arguments of different lengths, or no weight above 0 (`budget`).
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
    if rounding == "floor":
        return [min(floor(w * rank + EDGE), limit) for w, limit in zip(weights, limits, strict=True)]
    if rounding == "ceil":
        return [min(max(ceil(w * rank - EDGE), 0), limit) for w, limit in zip(weights, limits, strict=True)]
    return _within(rank * sum(costs), weights, costs, limits)


def may_exceed(rounding: str, costs: Sequence[int]) -> bool:
    """Whether ranks rounded so may cost more than uniform ones, at sites with these costs per unit of rank."""
    return rounding == "ceil" or (rounding == "floor" and len(set(costs)) > 1)


def _within(budget: int, weights: Sequence[float], costs: Sequence[int], limits: Sequence[int]) -> list[int]:
    spent = sum(w * c for w, c in zip(weights, costs, strict=True))
    if not spent > 0:
        raise ValueError("no weight is above 0, so ranks cannot be allocated")
    quotas = [w * budget / spent for w in weights]
    ranks = [min(floor(q + EDGE), limit) for q, limit in zip(quotas, limits, strict=True)]
    left = budget - sum(r * c for r, c in zip(ranks, costs, strict=True))
    while left < 0:  # only if EDGE rounded several sites up
        i = min((i for i, r in enumerate(ranks) if r), key=lambda i: quotas[i] - ranks[i])
        ranks[i] -= 1
        left += costs[i]
    while True:
        able = [i for i, w in enumerate(weights) if w > 0 and ranks[i] < limits[i] and costs[i] <= left]
        if not able:
            return ranks
        i = max(able, key=lambda i: quotas[i] - ranks[i])  # ties: the first site
        ranks[i] += 1
        left -= costs[i]


def evenly(costs: Sequence[int], limits: Sequence[int], budget: int) -> list[int]:
    """Ranks of about the same share of `budget` per parameter everywhere: some sites get none if it is small.

    Sites in their order save up their share c_i / Σ_j c_j of the budget, and buy units as soon as they can, with what
    sites before them could not spend (error diffusion).

    Args:
        costs: c_i, parameters per unit of rank. limits: largest rank of a site; those at 0 have no share.
    """
    ranks, saved = [0] * len(costs), 0.0
    total = sum(cost for cost, limit in zip(costs, limits, strict=True) if limit)
    for share in (budget / max(1, total), 0.0):  # a second time around for what is left
        for i, (cost, limit) in enumerate(zip(costs, limits, strict=True)):
            saved += share * cost if limit else 0.0
            bought = min(floor(saved / cost + 1e-9), limit - ranks[i])  # sums of shares are rounded
            ranks[i] += bought
            saved -= bought * cost
    return ranks


def at_random(costs: Sequence[int], limits: Sequence[int], budget: int, draws: np.random.Generator) -> list[int]:
    """Ranks by units drawn one after the other, each if it still fits. Arguments as for `evenly`."""
    ranks = [0] * len(costs)
    for i in draws.permutation(np.repeat(np.arange(len(costs)), limits)).tolist():
        if costs[i] <= budget:
            ranks[i] += 1
            budget -= costs[i]
    return ranks
