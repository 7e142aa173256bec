"""The parts of `benchmarks/suite.py` that its goals need: each gives its rows as JSON."""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import arms
import torch
from measures import DEVICE, in_turns, kept, over, quartiles, timed
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise as rw
from rankwise.errors import require
from rankwise.ranks.resize import resize, truncate


def result(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"machine": arms.machine(), **more, "rows": rows}


def steps(tokens: int, rounds: int, shape: str, rank: int) -> dict[str, Any]:
    """Each arm's step over the limit, over PEFT's LoRA and over ours, and the optimizer's share of it."""
    config, batch = arms.SHAPES[shape], arms.rows(tokens)
    limit = arms.Limit(config, rank, batch)
    every = {name: make(config, rank) for name, make in arms.every().items()}
    gc.collect()
    gc.disable()  # not in the middle of somebody's step
    seconds = in_turns(limit.turns() | {name: partial(arm.step, batch) for name, arm in every.items()}, rounds)
    least = limit.least(seconds)
    rows = [
        {
            "arm": name,
            "over limit": over(seconds[name], least),
            "over PEFT LoRA": over(seconds[name], seconds["PEFT LoRA"]),
            "over lora": over(seconds[name], seconds["lora"]),
            "optimizer": quartiles([a / b for a, b in zip(every[name].updates[1:], seconds[name], strict=True)]),
        }
        for name in every
    ]
    return result(rows, seconds_of_limit=statistics.median(least))


def memory(tokens: int, rounds: int, shape: str, rank: int) -> dict[str, Any]:
    """Bytes that each arm keeps for the backward pass, and by how many the process grows in a step, over the limit."""
    config, batch = arms.SHAPES[shape], arms.rows(tokens)
    found = {}
    for name, make in {"limit": partial(arms.Limit, batch=batch), **arms.every()}.items():
        arm = make(config, rank)
        arm.passes(batch)
        arm.update()  # which makes the optimizer's state
        size = kept(arm.model, partial(arm.loss, batch))
        with arms.peak() as grown:
            arm.passes(batch)
            arm.update()
        found[name] = size, grown[0]
        del arm
        gc.collect()  # so that the next one begins without it
    least = found.pop("limit")
    require(least[1] > 0, f"a step of {tokens} tokens takes no memory that can be measured: give more --tokens")
    rows = [
        {"arm": name, "kept": sizes[0], "peak": sizes[1], "kept over limit": sizes[0] / least[0],
         "peak over limit": sizes[1] / least[1]}
        for name, sizes in found.items()
    ]  # fmt: skip
    return result(rows, rounds=1, kept_by_limit=least[0], peak_of_limit=least[1])


GROUPS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "norms and activations": ("norm", "gelu", "silu", "tanh", "softmax"),
    "copies and sums": ("copy_", "add", "add_", "mul", "mul_", "sum", "cat", "clone", "fill_", "zero_"),
}
"""Kinds of operations: by their names, or for attention and norms by a part of them."""
REST = "everything else"


def profile(tokens: int, rounds: int, shape: str, rank: int) -> dict[str, Any]:
    """Seconds of a step by kind of operation, and how often the host reads a number of the device in it."""
    config, batch = arms.SHAPES[shape], arms.rows(tokens)
    makes = {name: make for name, make in arms.every().items() if name in PROFILED}
    every = {name: make(config, rank) for name, make in {"limit": partial(arms.Limit, batch=batch), **makes}.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in every}

    def once(name: str, arm: arms.Arm) -> float:
        with torch.profiler.profile() as seen:
            arm.step(batch)
        seconds = dict.fromkeys((*GROUPS, REST), 0.0)
        for event in seen.key_averages():
            own = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
            seconds[_group(event.key)] += own / 1e6
        found[name].append(seconds)
        return sum(seconds.values())

    in_turns({name: partial(once, name, arm) for name, arm in every.items()}, rounds)
    rows = []
    for name, arm in every.items():
        seconds = {group: statistics.median(each[group] for each in found[name][1:]) for group in (*GROUPS, REST)}
        with Reads(arm.optimizer) as reads:
            arm.step(batch)
        rows.append({"arm": name, "seconds": seconds, "reads": reads.count})
    return result(rows)


class Reads(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor, other than the counters of AdamW, which it keeps itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.own = {id(each["step"]) for each in optimizer.state.values() if "step" in each}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += waits and id(args[0]) not in self.own
        return func(*args, **kwargs or {})


PROFILED = ("PEFT LoRA", "lora", "lora, fast: false", "simplex-lora", "sora")


def _group(name: str) -> str:
    name = name.removeprefix("aten::")
    for group, names in GROUPS.items():
        exact = group in ("matrix products", "copies and sums")
        if any(each == name if exact else each in name for each in names):
            return group
    return REST


CHANGES, STEPS = 3, 1_000
"""Rank changes in a run of so many steps."""


def changes(tokens: int, rounds: int) -> dict[str, Any]:
    """What the rank changes of a run take, as a share of the run."""
    rows = []
    for shape in ("bert", "llama"):
        config, batch = arms.SHAPES[shape], arms.rows(tokens)
        arm = arms.ours(config, 8, "lora")
        seconds = in_turns({"step": partial(arm.step, batch), "change": rank_change(arm.model, 4, 12)}, rounds)
        share = [CHANGES / STEPS * ratio for ratio in over(seconds["change"], seconds["step"])]
        rows.append(
            {"shape": shape, "sites": len(rw.sites(arm.model)), "share": [float(f"{each:.3g}") for each in share]}
        )
    return result(rows)


def rank_change(model: Any, *ranks: int) -> Callable[[], float]:
    """The seconds in which half of the sites get one of two ranks, and the others the other one; then the reverse."""
    names = [site.name for site in rw.sites(model)]
    plans = [{name: ranks[(n + turn) % 2] for n, name in enumerate(names)} for turn in (0, 1)]

    def change() -> float:
        plans.reverse()
        return timed(lambda: resize(model, plans[0]))

    return change


def error(tokens: int, rounds: int) -> dict[str, Any]:
    """By how much a resized product is further from the old one than the nearest one of its rank, as a share."""
    torch.manual_seed(0)
    rows = []
    for inputs, outputs, before, after in ((384, 1536, 32, 8), (512, 512, 8, 4), (1024, 1024, 64, 16)):
        falling = torch.arange(1, before + 1, device=DEVICE) ** -0.7
        A = torch.randn(before, inputs, device=DEVICE) / inputs**0.5
        B = torch.randn(outputs, before, device=DEVICE) / outputs**0.5 * falling
        product = B.double() @ A.double()
        new_A, new_B, *_ = truncate(A, B, after)
        got = torch.linalg.matrix_norm(product - new_B.double() @ new_A.double())
        best = torch.linalg.svdvals(product)[after:].norm()
        rows.append({"shape": [outputs, inputs], "ranks": [before, after], "above": float(got / best - 1)})
    return result(rows, rounds=1)


def starts(tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of `rankwise --help` and of a Python that does nothing, each a new process."""

    def run(*command: str) -> Callable[[], float]:
        def once() -> float:
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - began

        return once

    seconds = in_turns({"--help": run("-m", "rankwise", "--help"), "pass": run("-c", "pass")}, rounds)
    rows = [{"command": name, "seconds": quartiles(values)} for name, values in seconds.items()]
    return result(rows)


def short_runs(tokens: int, rounds: int, *options: str) -> dict[str, Any]:
    """What `benchmarks/sweep.py` says of eight short runs: forked, or each a fresh process, next to one process."""
    rounds = max(2, rounds // 7)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "runs.json"
        command = [sys.executable, Path(__file__).parent / "sweep.py", "--rounds", rounds, "--json", file]
        subprocess.run([*map(str, command), *options], check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(file.read_text())["rows"]
    keys = {"÷ one, on the clock": "over one", "÷ one, on the cores": "cores over one"}
    return result([{keys.get(key, key): value for key, value in row.items()} for row in rows], rounds=rounds)
