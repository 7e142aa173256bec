"""From weights on a simplex to integer ranks (SimplexLoRA, step 2), and ranks that nothing was learnt for."""

from collections.abc import Hashable, Sequence
from math import ceil, floor
from typing import Literal, get_args

import numpy as np

EDGE = 1e-4  # so that ω r0 = 7.9999999, rounding noise of a projection, gives 8

GOLDEN = (5**0.5 - 1) / 2  # whose multiples are spread evenly over the unit interval, however many there are

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


def evenly(kinds: Sequence[Hashable], costs: Sequence[int], limits: Sequence[int], budget: int) -> list[int]:
    """Ranks as equal as the budget allows: the same everywhere, and one more at some sites that are spaced evenly.

    To choose these, sites are put in order by kind, so that every kind of layer gets its share, and within a kind by
    depth, starting at a different depth for each kind, so that the extra units are not all in the same blocks. Of N
    sites in this order, n get one: those at ⌊(j + ½) N / n⌋, with the largest n that the budget allows. What is left is
    spent in the same way on sites that still fit. Kinds with the same cost and number of
    sites end with shares that differ by one unit at most.

    Args:
        kinds: what makes two sites alike, such as their name in all blocks. costs: c_i, parameters per unit of rank.
        limits: largest rank of a site.
    """
    rank = equal_rank(costs, limits, budget)
    ranks = [min(rank, limit) for limit in limits]
    left = budget - sum(r * cost for r, cost in zip(ranks, costs, strict=True))
    groups, order, added = alike(kinds), list[int](), list[int]()
    for turn, places in enumerate(groups):
        begin = floor(GOLDEN * turn % 1 * len(places))
        order += places[begin:] + places[:begin]
    while True:
        able = [i for i in order if ranks[i] < min(limits[i], rank + 1) and costs[i] <= left]
        for n in range(len(able), 0, -1):
            chosen = [able[(2 * j + 1) * len(able) // (2 * n)] for j in range(n)]
            if sum(costs[i] for i in chosen) <= left:
                break
        else:
            break
        for i in chosen:
            ranks[i] += 1
            left -= costs[i]
        added += chosen
    peers: dict[tuple[int, ...], list[list[int]]] = {}
    for places in groups:
        peers.setdefault((len(places), *sorted({costs[i] for i in places})), []).append(places)
    for each in peers.values():
        _level(each, ranks, [min(rank + 1, limit) for limit in limits], added)
    return ranks


def _level(peers: list[list[int]], ranks: list[int], most: list[int], added: list[int]) -> None:
    """Move units, the last added first, from kinds with more to kinds with fewer, at a depth nearby."""
    while True:
        shares = [sum(ranks[i] for i in places) for places in peers]
        rich, poor = peers[shares.index(max(shares))], peers[shares.index(min(shares))]
        spare = [i for i in added if i in rich]
        free = [i for i in poor if ranks[i] < most[i]]
        if max(shares) - min(shares) < 2 or not spare or not free:
            return
        depth = rich.index(spare[-1])
        given = min(free, key=lambda i: abs(poor.index(i) - depth))
        ranks[spare[-1]] -= 1
        ranks[given] += 1
        added.remove(spare[-1])
        added.append(given)


def equal_rank(costs: Sequence[int], limits: Sequence[int], budget: int) -> int:
    """The largest rank that all sites can have within the budget, less only where a site cannot use it; 0 for none."""
    rank = 0
    while rank < max(limits, default=0):
        if sum(min(rank + 1, limit) * cost for cost, limit in zip(costs, limits, strict=True)) > budget:
            break
        rank += 1
    return rank


def alike(kinds: Sequence[Hashable]) -> list[list[int]]:
    """The indices of each kind, in the order of their first ones."""
    places: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        places.setdefault(kind, []).append(index)
    return [*places.values()]


def shuffled(kinds: Sequence[Hashable], draws: np.random.Generator) -> list[int]:
    """All indices, those of each kind shuffled among their places."""
    order = list(range(len(kinds)))
    for places in alike(kinds):
        for i, j in zip(places, draws.permutation(places).tolist(), strict=True):
            order[i] = j
    return order


def at_random(costs: Sequence[int], limits: Sequence[int], budget: int, draws: np.random.Generator) -> list[int]:
    """Ranks by units drawn one after the other, each if it still fits. Arguments as for `evenly`."""
    ranks = [0] * len(costs)
    for i in draws.permutation(np.repeat(np.arange(len(costs)), limits)).tolist():
        if costs[i] <= budget:
            ranks[i] += 1
            budget -= costs[i]
    return ranks
