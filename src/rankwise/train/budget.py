"""The size of each method in an experiment whose `budget` is one number of parameters for all of them."""

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
    """`config` with the size of its method (rank, …) chosen: the largest whole number that its budget allows.

    A size that is given is kept, and refused where it costs too much. A method without sizes is outside of any budget:
    its own then goes. What costs is `Method.peak`, without the head.

    Raises:
        InputError: a budget that even the smallest size is over, or a method that does not fit the model.
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
    given, task = json.loads(options), tasks.build(json.loads(task_options))
    method = methods.build(given)

    def peak_of(method: Method) -> int:
        return peak(model, task, method, max_length, shipped=True, trust_remote_code=trust)

    def costs(size: int) -> int:
        try:
            return peak_of(method.sized(size))
        except InputError:
            if size == 1:
                raise
            return sys.maxsize  # more than some site can hold, or the model has positions for

    if kept := [option for option in method.sizes if option in given]:
        if (least := peak_of(method)) > budget:
            what = f"{method.name} with {kept[0]} {given[kept[0]]} trains {least:,} parameters"
            raise InputError(f"budget = {budget}: {what}; raise the budget, or leave {kept[0]} out for it to choose")
        return given
    first = costs(1)
    if first > budget:
        raise InputError(f"budget = {budget}: {method.name} trains {first:,} parameters at the least; raise the budget")
    # each unit of size costs the same, or no less than the one before
    most = 1 + (budget - first) // max(1, min(costs(2), budget + 1) - first)
    chosen = method.sized(bisect_right(range(1, most + 1), budget, key=costs))
    return {**given, **{option: getattr(chosen, option) for option in method.sizes}}
