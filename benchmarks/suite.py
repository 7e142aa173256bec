"""Time and memory of a training step next to the least that it can take, and next to PEFT's: the project's goals.

    make bench          # what has not been measured yet, into benchmarks/results.json and docs/performance.md
    make bench-quick    # a few rows with few rounds, in two minutes; nothing is written
    OMP_NUM_THREADS=1 python benchmarks/suite.py steps-bert-8 --again       # one part again
    OMP_NUM_THREADS=1 python benchmarks/suite.py --json gpu.json            # another machine, such as a GPU

Each part is a process of its own, in which all that is compared takes turns; a number is the median of the ratios of a
round, with their quartiles. The time is that of the process, whatever else the machine does, and on a GPU that of the
clock. On a GPU weights and products are bf16, and wider models take part too.
"""

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import page

from rankwise.errors import INPUT, InputError
from rankwise.files import write_whole

RESULTS = Path(__file__).parent / "results.json"
WIDE = ("llama-2048", "llama-4096")
QUICK = ["steps-bert-8", "memory-bert-8", "error", "help"]
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="all by default: " + ", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="measure also what has been measured")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="of the results; %(default)s")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}, with few rounds; writes nothing")
    parser.add_argument("--rounds", type=int, help="15, or 3 with --quick")
    parser.add_argument("--tokens", type=int, help="in a step: 512, or 128 with --quick")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.rounds = asked.rounds or (3 if asked.quick else 15)
    asked.tokens = asked.tokens or (128 if asked.quick else 512)
    if unknown := [name for name in asked.parts if name not in PARTS]:
        raise InputError(f"there is no part {unknown[0]}: choose from {', '.join(PARTS)}")
    if asked.rounds < 2 or asked.tokens < 1:
        raise InputError("--rounds must be at least 2, for quartiles, and --tokens at least 1")
    if asked.here:
        print(json.dumps(PARTS[asked.parts[0]](asked)))
        return
    wanted = asked.parts or (QUICK if asked.quick else default_parts())
    if asked.quick:
        for name in wanted:
            print(page.section(name, measured(name, asked)), flush=True)
        return
    for name, result in new_results(wanted, asked):
        print(page.section(name, result), flush=True)
    if asked.json.resolve() == RESULTS:
        page.write(read(RESULTS))


def default_parts() -> list[str]:
    import torch

    wide = torch.cuda.is_available()
    return [name for name in PARTS if wide or not any(shape in name for shape in WIDE)]


def new_results(wanted: list[str], asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the parts that are not in the file, or all, and add each to the file as soon as it is there.

    Raises:
        InputError: the file has results of another machine, which would stay in it.
    """
    import arms

    here = arms.machine()
    for name, result in read(asked.json).items():
        other = [key for key in ("device", "dtype", "threads") if result["machine"][key] != here[key]]
        if other and not (asked.again and name in wanted):
            was, now = result["machine"][other[0]], here[other[0]]
            raise InputError(f"{asked.json} is of another {other[0]} ({was}, not {now}): give another file with --json")
    for name in wanted:
        if name in read(asked.json) and not asked.again:
            continue
        result = measured(name, asked)
        done = read(asked.json) | {name: result}  # another process may have added some
        write_whole(asked.json, json.dumps({name: done[name] for name in PARTS if name in done}, indent=1) + "\n")
        yield name, result


def read(file: Path) -> dict[str, Any]:
    """The results by part.

    Raises:
        InputError: the file has something else.
    """
    try:
        content = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}): give another one with --json") from None
    if not isinstance(content, dict) or not all(name in PARTS for name in content):
        raise InputError(f"{file} has no results of this program: give another one with --json")
    return content


def measured(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """A part's rows, from a process of its own."""
    more = {"MALLOC_MMAP_THRESHOLD_": "65536"} if name.startswith("memory") else {}  # what is freed goes back
    command = [sys.executable, __file__, name, "--here", "--rounds", str(asked.rounds), "--tokens", str(asked.tokens)]
    began = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **more}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed; the error is above. The same command measures what is missing")
    result = json.loads(done.stdout.splitlines()[-1])
    took = {"date": f"{datetime.date.today()}", "seconds": round(time.perf_counter() - began)}
    return result | took


# --- the parts


def of(asked: argparse.Namespace, rows: Rows, **more: Any) -> dict[str, Any]:
    import arms

    return {"machine": arms.machine(), "tokens": asked.tokens, "rounds": asked.rounds, **more, "rows": rows}


def quartiles(ratios: list[float]) -> list[float]:
    return [float(f"{each:.5g}") for each in statistics.quantiles(ratios, n=4)]


def over(one: list[float], other: list[float]) -> list[float]:
    return quartiles([a / b for a, b in zip(one, other, strict=True)])


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


def steps(asked: argparse.Namespace, shape: str, rank: int) -> dict[str, Any]:
    """Each arm's step over the limit, over PEFT's LoRA and over ours, and the optimizer's share of it."""
    import arms
    import torch
    from layer import DEVICE, timed

    config = arms.SHAPES[shape]
    batch = arms.rows(asked.tokens)
    limit = arms.Limit(config, rank, batch)
    every = {name: make(config, rank) for name, make in arms.every().items()}
    x, W = (torch.randn(size, device=DEVICE, dtype=arms.DTYPE) for size in ((asked.tokens, 512), (512, 512)))
    updates: dict[str, list[float]] = {name: [] for name in every}

    def step(name: str, arm: arms.Arm) -> float:
        passes = timed(lambda: arm.passes(batch), 1)
        update = timed(arm.update, 1)
        updates.setdefault(name, []).append(update)
        return passes + update

    runs: dict[str, Callable[[], float]] = {
        "limit": lambda: step("limit", limit),
        "product": lambda: timed(lambda: x @ W, 10),
    }
    runs |= {name: lambda name=name, arm=arm: step(name, arm) for name, arm in every.items()}
    gc.collect()
    gc.disable()  # not in the middle of somebody's step
    seconds = in_turns(runs, asked.rounds)
    of_product = limit.own / (2 * asked.tokens * 512 * 512)
    least = [a + of_product * b for a, b in zip(seconds["limit"], seconds["product"], strict=True)]
    rows = [
        {
            "arm": name,
            "over limit": over(seconds[name], least),
            "over PEFT LoRA": over(seconds[name], seconds["PEFT LoRA"]),
            "over lora": over(seconds[name], seconds["lora"]),
            "optimizer": quartiles([a / b for a, b in zip(updates[name][1:], seconds[name], strict=True)]),
        }
        for name in every
    ]
    return of(asked, rows, seconds_of_limit=statistics.median(least))


def memory(asked: argparse.Namespace, shape: str, rank: int) -> dict[str, Any]:
    """Bytes that each arm keeps for the backward pass, and by how many the process grows in a step, over the limit."""
    import arms
    from layer import kept

    config = arms.SHAPES[shape]
    batch = arms.rows(asked.tokens)
    found = {}
    for name, make in {"limit": lambda config, rank: arms.Limit(config, rank, batch), **arms.every()}.items():
        arm = make(config, rank)
        arm.passes(batch)
        arm.update()  # which makes the optimizer's state
        size = kept(arm.model, lambda model, arm=arm: arm.loss(batch))
        with arms.peak() as grown:
            arm.passes(batch)
            arm.update()
        found[name] = size, grown[0]
        del arm
        gc.collect()  # so that the next one begins without it
    least = found.pop("limit")
    rows = [
        {"arm": name, "kept": sizes[0], "peak": sizes[1], "kept over limit": sizes[0] / least[0],
         "peak over limit": sizes[1] / least[1]}
        for name, sizes in found.items()
    ]  # fmt: skip
    return of(asked, rows, kept_by_limit=least[0], peak_of_limit=least[1])


CHANGES, STEPS = 3, 1_000
"""Rank changes in a run of so many steps."""


def changes(asked: argparse.Namespace) -> dict[str, Any]:
    """What the rank changes of a run take, as a share of the run."""
    import arms
    from layer import timed

    import rankwise as rw
    from rankwise.ranks.resize import resize

    rows = []
    for shape in ("bert", "llama"):
        config, batch = arms.SHAPES[shape], arms.rows(asked.tokens)
        arm = arms.ours(config, 8, "lora")
        names = [site.name for site in rw.sites(arm.model)]
        plans = [{name: 4 + 8 * ((n + turn) % 2) for n, name in enumerate(names)} for turn in (0, 1)]

        def step(arm: arms.Arm = arm, batch: Any = batch) -> float:
            return timed(lambda: (arm.passes(batch), arm.update()), 1)

        def change(arm: arms.Arm = arm, plans: Any = plans) -> float:
            plans.reverse()
            return timed(lambda: resize(arm.model, plans[0]), 1)

        seconds = in_turns({"step": step, "change": change}, asked.rounds)
        share = [CHANGES / STEPS * ratio for ratio in over(seconds["change"], seconds["step"])]
        rows.append({"shape": shape, "sites": len(names), "share": [float(f"{each:.3g}") for each in share]})
    return of(asked, rows)


def error(asked: argparse.Namespace) -> dict[str, Any]:
    """By how much a resized product is further from the old one than the nearest one of its rank, as a share."""
    import torch
    from layer import DEVICE

    from rankwise.ranks.resize import truncate

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
    return of(asked, rows)


def starts(asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `rankwise --help` and of a Python that does nothing, each a new process."""

    def run(*command: str) -> Callable[[], float]:
        def once() -> float:
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - began

        return once

    seconds = in_turns({"--help": run("-m", "rankwise", "--help"), "pass": run("-c", "pass")}, asked.rounds)
    rows = [{"command": name, "seconds": quartiles(values)} for name, values in seconds.items()]
    return of(asked, rows)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    f"{what}-{shape}-{rank}": lambda asked, run=run, shape=shape, rank=rank: run(asked, shape, rank)
    for what, run in {"steps": steps, "memory": memory}.items()
    for shape, ranks in {"bert": (8, 32), "llama": (8, 32), **dict.fromkeys(WIDE, (8, 64))}.items()
    for rank in ranks
}
PARTS |= {"changes": changes, "error": error, "help": starts}


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(problem, file=sys.stderr)
        sys.exit(INPUT)
