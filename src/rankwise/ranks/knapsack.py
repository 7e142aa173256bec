"""The best whole ranks by what each unit of rank is worth: the most within a budget, or the cheapest that keep a share.

A site's units are worth less and less (squared singular values fall), and all cost the same, c = in + out. So no unit
has to wait for a worse one, and the choice is a 0/1 knapsack of units. Where all sites cost the same, the best units
are the best choice. Elsewhere the best by worth / cost need not be: near a tight budget that can lose percents.

The solution is exact, by a dynamic programme over a core of the units (after Pisinger, Operations Research 45:5, 1997).
Let λ be the density (worth / cost) at which a greedy choice runs out of budget, and U = Σ_j max(v_j - λ c_j, 0) + λ P.
To take or leave unit j against its sign of v_j - λ c_j loses d_j = |v_j - λ c_j| of the bound U, so a choice that
differs from the greedy one in the units D is worth U - Σ_D d_j - λ (budget left over). Units come into play by rising
d_j, and the search ends when d_j exceeds the distance of the best choice so far from U: no later one can improve on it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-12
"""Relative error of sums of many numbers, up to which two of them count as equal."""

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]


def most_within(gains: Sequence[Numbers], costs: Sequence[int], budget: int) -> list[int]:
    """Ranks r_i that maximise Σ_i Σ_{k ≤ r_i} gains_i[k] while Σ_i r_i c_i ≤ budget. Units worth nothing are left out.

    Args:
        gains: of each site what its units are worth, falling and not below 0. costs: of one unit at each site.
    """
    site, gain, cost = _units(gains, costs)
    step = int(np.gcd.reduce(cost)) if len(cost) else 1
    taken = _choose(gain, cost.astype(float), cost, budget // step * step)
    return np.bincount(site[taken], minlength=len(costs)).tolist()


def cheapest(gains: Sequence[Numbers], costs: Sequence[int], share: float) -> list[int]:
    """Ranks that minimise Σ_i r_i c_i while they keep at least `share` of all gains, and among these the most.

    The units to leave out are a knapsack as well: the most cost within a share 1 - `share` of the gains. Arguments as
    for `most_within`.
    """
    site, gain, cost = _units(gains, costs)
    room = (1 - share + ROUNDING) * gain.sum()
    out = _choose(cost.astype(float), gain, cost, room, step=int(np.gcd.reduce(cost)) if len(cost) else 1)
    return most_within(gains, costs, int(cost.sum() - cost[out].sum()))


def _units(gains: Sequence[Numbers], costs: Sequence[int]) -> tuple[Indices, Numbers, Indices]:
    """Site, gain and cost of every unit that is worth anything."""
    gain = np.concatenate([np.zeros(0), *(np.asarray(each, dtype=float) for each in gains)])
    site = np.repeat(np.arange(len(gains)), [len(each) for each in gains])[gain > 0]
    return site, gain[gain > 0], np.asarray(costs, dtype=np.int64)[site]


def _choose(value: Numbers, weight: Numbers, cost: Indices, capacity: float, step: int = 0) -> Indices:
    """The items of the greatest total value whose total weight is at most `capacity`.

    Args:
        value, weight: of each item, above 0.
        cost: one of the two. Items of equal cost are taken by density, so only their number has to be decided.
        step: of which all values are multiples, if any.
    """
    order = np.argsort(-value / weight, kind="stable")
    value, weight = value[order], weight[order]
    kinds, kind = np.unique(cost[order], return_inverse=True)
    total = np.cumsum(weight)
    first = int(np.searchsorted(total, capacity, side="right"))  # the first item that does not fit
    if first == len(order):
        return order
    density = value[first] / weight[first]
    loss = np.abs(value - density * weight)
    loss[loss < ROUNDING * value] = 0.0
    # States, sorted by weight: their weight, value, and by how many of each kind they differ from the greedy choice.
    weights = np.array([total[first - 1] if first else 0.0])
    values = np.array([value[:first].sum()])
    changes = np.zeros((1, len(kinds)), dtype=np.int32)
    best, change = values[0], changes[0]
    useless = None
    for item in np.lexsort((np.abs(np.arange(len(order)) - first), loss)):
        must = best + (step * (1 - ROUNDING) if step else ROUNDING * best)
        alive = values + density * (capacity - weights) - loss[item] >= must
        if not alive.any():
            break
        weights, values, changes = weights[alive], values[alive], changes[alive]
        sign = -1 if item < first else 1
        if useless == (kind[item], sign):  # another such item is worth no more
            continue
        changed = changes.copy()
        changed[:, kind[item]] += sign
        weights = np.concatenate([weights, weights + sign * weight[item]])
        values = np.concatenate([values, values + sign * value[item]])
        by_weight = np.lexsort((-values, weights))
        weights, values = weights[by_weight], values[by_weight]
        better = np.concatenate([[True], values[1:] > np.maximum.accumulate(values)[:-1]])  # than all that weigh less
        weights, values = weights[better], values[better]
        useless = (kind[item], sign) if (by_weight[better] < len(changes)).all() else None
        changes = np.concatenate([changes, changed])[by_weight][better]
        fitting = int(np.searchsorted(weights, capacity, side="right"))
        if fitting and values[fitting - 1] > best:
            best, change = values[fitting - 1], changes[fitting - 1]
    taken = np.bincount(kind[:first], minlength=len(kinds)) + change
    return np.concatenate([order[kind == each][:number] for each, number in enumerate(taken)])
