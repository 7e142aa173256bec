"""Whether a loss is scaled for gradient accumulation by the one who computes it.

transformers counts the items (rows, or tokens) of all batches of an optimizer step, gives the count to every model
whose forward takes **kwargs, as `num_items_in_batch`, and leaves the scaling to it. Whether the loss looks at the
count, a signature does not tell; so the loss is asked.
"""

from collections.abc import Callable
from math import isclose, isfinite


def scales(loss: Callable[[int], float], items: int) -> bool | None:
    """Whether `loss`, of one batch, is a sum divided by the number of items that it is told; None if it does not tell.

    One of which a part alone is divided does not count: accumulated, its other part would be too large.
    """
    once, twice = loss(items), loss(2 * items)
    if not (isfinite(once) and isfinite(twice)) or once == twice == 0:
        return None
    return isclose(once, 2 * twice, rel_tol=1e-5)
