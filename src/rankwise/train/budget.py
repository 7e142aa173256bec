"""The size of a method for a run with a `budget`, a number of parameters that is the same for all methods."""

import json
import sys
from bisect import bisect_right
from functools import cache
from typing import Any

from rankwise import methods, tasks
from rankwise.errors import InputError
from rankwise.methods import Method
from rankwise.settings import RunConfig
from rankwise.train.model import peak


def fit(config: RunConfig) -> RunConfig:
    """`config` with the largest size of its method (rank, …) whose `Method.peak` without the head is within its budget.

    A size in `config` is kept if it is within the budget. For a method without sizes the budget is removed.

    Raises:
        InputError: the size in `config`, or the smallest one, is over the budget, or the method does not fit the model.
    """
    if config.budget is None:
        return config
    method = methods.build(config.method)
    if not method.sizes:
        return config.model_copy(update={"budget": None})
    task, options = json.dumps(config.task), json.dumps(config.method)
    chosen = _fitted(config.model, task, options, config.max_length, config.budget, config.trust_remote_code)
    return config.model_copy(update={"method": dict(chosen)})


@cache
def _fitted(
    model: str | None, task_options: str, options: str, max_length: int, budget: int, trust: bool
) -> dict[str, Any]:
    settings, task = json.loads(options), tasks.build(json.loads(task_options))
    method = methods.build(settings)

    def peak_of(method: Method) -> int:
        return peak(model, task, method, max_length, shipped=True, trust_remote_code=trust)

    def costs(size: int) -> int:
        try:
            return peak_of(method.sized(size))
        except InputError:
            if size == 1:
                raise
            return sys.maxsize  # too large for a layer, or for the model's positions

    if sizes := [option for option in method.sizes if option in settings]:
        if (cost := peak_of(method)) > budget:
            what = f"{method.name} with {sizes[0]} {settings[sizes[0]]} trains {cost:,} parameters"
            raise InputError(f"budget = {budget}: {what}; raise the budget, or leave {sizes[0]} out for it to choose")
        return settings
    first = costs(1)
    if first > budget:
        raise InputError(f"budget = {budget}: {method.name} trains at least {first:,} parameters; raise the budget")
    # each unit of size costs as much as the one before, or more
    most = 1 + (budget - first) // max(1, min(costs(2), budget + 1) - first)
    chosen = method.sized(bisect_right(range(1, most + 1), budget, key=costs))
    return {**settings, **{option: getattr(chosen, option) for option in method.sizes}}
