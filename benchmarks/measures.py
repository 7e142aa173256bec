"""Times of what takes turns, and the bytes that a forward pass keeps for the backward pass."""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.train.memory_need import Alive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(run: Callable[[], object], often: int = 1) -> float:
    """Seconds of a call: on a CPU those of this process, whatever else the machine does, and on a GPU the clock's."""
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    start = clock()
    for _ in range(often):
        run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / often


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each run gives in each round. They start with another one each time, and the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = [*runs]
    for turn in range(rounds + 1):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            value = runs[name]()
            if turn:
                found[name].append(value)
    return found


def quartiles(values: list[float]) -> list[float]:
    """The median between the quartiles, or the least and the most of fewer than four values."""
    few = [min(values), statistics.median(values), max(values)]
    return [float(f"{each:.5g}") for each in (statistics.quantiles(values, n=4) if len(values) > 3 else few)]


def over(one: list[float], other: list[float]) -> list[float]:
    """Quartiles of the ratios of a round."""
    return quartiles([a / b for a, b in zip(one, other, strict=True)])


def kept(model: torch.nn.Module, call: Callable[[], Tensor]) -> int:
    """The bytes that a forward pass of `model` leaves for the backward pass, each storage once."""
    gc.collect()
    with Alive(model) as alive:
        y = call()
        gc.collect()
        return alive.now - y.untyped_storage().nbytes()
