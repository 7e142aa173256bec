"""The best whole ranks by what each unit of rank is worth: the most within a budget, or the cheapest that keep a share.

A site's units are worth less and less (squared singular values fall), and all cost the same, c = in + out. So no unit
has to wait for a worse one, and the choice is a 0/1 knapsack of units. Where all sites cost the same, the best units
are the best choice. Elsewhere the best by worth / cost need not be: near a tight budget that can lose percents.

The solution is exact, by a search around the greedy choice (after Pisinger, Operations Research 45:5, 1997). Let λ be
the density (worth / cost) at which a greedy choice runs out of budget, and U = Σ_j max(v_j - λ c_j, 0) + λ P. To take
or leave unit j against the sign of v_j - λ c_j loses |v_j - λ c_j| of the bound U, so a choice is worth U minus what
its units lose in this way, minus λ times the budget left over. Units of one cost are taken by density, so a choice is
one number for each cost. The number for the cost at which the greedy choice ends follows from the others, and these are
tried as long as they lose no more than some reach, which grows until it exceeds the distance of the best choice so far
from U: no other choice can then be better.

The time depends on how many costs differ more than on how many units there are, and it does not matter if all are worth
the same. What can take long is worth proportional to cost, up to small differences, at many large costs: sums of a
subset.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-12
"""Relative error of sums of many numbers, up to which two of them count as equal."""
GROWTH = 1.25
"""Of the reach in each round: the time of a round grows by a high power of it where there are many costs."""

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
    bound = value[:first].sum() + density * (capacity - weight[:first].sum())
    loss = np.abs(value - density * weight)
    loss[loss < ROUNDING * value] = 0.0
    greedy = np.bincount(kind[:first], minlength=len(kinds))
    # Of each kind, by how many are taken: what these weigh, are worth, and lose.
    ways = [
        (_sums(weight[kind == each]), _sums(value[kind == each]), _losses(loss[kind == each], number))
        for each, number in enumerate(greedy)
    ]
    last = kind[first]
    others = [each for each in range(len(kinds)) if each != last]
    # Sums in another order may differ in their last digit, which must not shut out the greedy choice.
    capacity = max(capacity, sum(float(ways[each][0][greedy[each]]) for each in (*others, last)))
    best, chosen, reach, width = value[:first].sum(), greedy, 0.0, 1
    while True:
        states = np.zeros((1, 3))  # weight, value, loss
        numbers = greedy[None]
        for each in others:
            start = max(greedy[each] - width, 0)
            own = np.stack(ways[each], axis=1)[start : greedy[each] + width + 1]
            both = (states[:, None] + own).reshape(-1, 3)
            kept = np.flatnonzero((both[:, 2] <= reach) & (both[:, 0] <= capacity))
            kept = kept[np.lexsort((-both[kept, 1], both[kept, 0]))]
            before = np.maximum.accumulate(both[kept, 1])[:-1]
            kept = kept[np.concatenate([[True], both[kept[1:], 1] > before])]  # worth more than all that weigh less
            states, numbers = both[kept], numbers[kept // len(own)]
            numbers[:, each] = start + kept % len(own)
        rest = np.searchsorted(ways[last][0], capacity - states[:, 0], side="right") - 1
        found = states[:, 1] + ways[last][1][rest]
        top = int(found.argmax())
        if found[top] > best:
            best, chosen = found[top], numbers[top]
            chosen[last] = rest[top]
        need = bound - best - (step / 2 if step else ROUNDING * best)
        lost = [ways[each][2] for each in others]
        outside = [(*a[: max(n - width, 0)], *a[n + width + 1 :]) for a, n in zip(lost, greedy[others], strict=True)]
        if reach >= need and all(min(each, default=np.inf) > need for each in outside):
            break
        reach, width = min(max(GROWTH * reach, need / 1024), need), 2 * width
    return np.concatenate([order[kind == each][:number] for each, number in enumerate(chosen)])


def _sums(values: Numbers) -> Numbers:
    """Of the first 0, 1, 2, … values."""
    return np.concatenate([np.zeros(1), np.cumsum(values)])


def _losses(loss: Numbers, greedy: int) -> Numbers:
    """What is lost if 0, 1, 2, … units are taken instead of `greedy`."""
    return np.concatenate([np.cumsum(loss[:greedy][::-1])[::-1], np.zeros(1), np.cumsum(loss[greedy:])])
