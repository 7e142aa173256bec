"""Whether a loss scales itself for gradient accumulation.

transformers counts the items (rows, or tokens) of all batches of an optimizer step, passes the count as
`num_items_in_batch` to every model whose forward takes **kwargs, and leaves the scaling to it. A signature does not
show whether the loss uses the count, so the loss is computed with two counts and compared.
"""

from collections.abc import Callable
from math import isclose, isfinite


def scales(loss: Callable[[int], float], items: int) -> bool | None:
    """Whether `loss`, of one batch, is divided by the number of items that it is passed; None if that is not clear.

    If only a part of it is divided, it is not: accumulated, the other part would be too large.
    """
    once, twice = loss(items), loss(2 * items)
    if not (isfinite(once) and isfinite(twice)) or once == twice == 0:
        return None
    return isclose(once, 2 * twice, rel_tol=1e-5)
