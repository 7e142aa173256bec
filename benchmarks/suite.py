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
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page

from rankwise.errors import INPUT, INTERRUPTED, InputError
from rankwise.files import write_whole

RESULTS = Path(__file__).parent / "results.json"
WIDE = ("llama-2048", "llama-4096")
COMPARING = ("steps", "memory")
"""How the names of the parts begin that compare all methods."""
QUICK = ["steps-bert-8", "memory-bert-8", "error", "help"]
PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{what}-{shape}-{rank}": ("parts", what, {"shape": shape, "rank": rank})
    for what in ("steps", "memory", "profile")
    for shape, ranks in {"bert": (8, 32), "llama": (8, 32), **dict.fromkeys(WIDE, (8, 64))}.items()
    for rank in ranks
}
"""The file, the function and what it is called with."""
PARTS |= {"changes": ("parts", "changes", {}), "error": ("parts", "error", {}), "help": ("parts", "starts", {})}
PARTS["runs"] = ("parts", "short_runs", {})
PARTS |= {f"scaling-{axis}": ("scaling", "scaling", {"axis": axis}) for axis in ("rank", "sites", "tokens")}
PARTS["sft"] = ("sft", "sft", {})
PARTS |= {f"together-{shape}": ("together", "together", {"shape": shape}) for shape in ("bert", "llama")}


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
    folder = asked.json.resolve().parent
    if not os.access(folder, os.W_OK):
        raise InputError(f"nothing can be written to {folder}: give another file with --json")
    if asked.here:
        file, function, more = PARTS[asked.parts[0]]
        result = getattr(importlib.import_module(file), function)(asked.tokens, asked.rounds, **more)
        print(json.dumps({"tokens": asked.tokens, "rounds": asked.rounds, **result}))
        return
    wanted = asked.parts or (QUICK if asked.quick else default_parts())
    if asked.quick:
        for name in wanted:
            print(page.section(name, measured(name, asked)), flush=True)
        return
    ours = asked.json.resolve() == RESULTS
    for name, result in new_results(wanted, asked):
        print(page.section(name, result), flush=True)
        if ours:
            page.write(read(RESULTS))  # now, or the page would be wrong after an interruption
    if ours:
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
        found = read(asked.json).get(name)
        if found and not asked.again and not (name.startswith(COMPARING) and arms.every().keys() - arms_of(found)):
            print(f"{name}: measured on {found['date']}; --again measures it again", file=sys.stderr)
            continue
        result = measured(name, asked)
        done = read(asked.json) | {name: result}  # another process may have added some
        write_whole(asked.json, json.dumps({name: done[name] for name in PARTS if name in done}, indent=1) + "\n")
        yield name, result


def arms_of(result: dict[str, Any]) -> set[str]:
    """What a part compares; methods may have been added since."""
    return {row["arm"] for row in result["rows"]}


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


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(problem, file=sys.stderr)
        sys.exit(INPUT)
    except KeyboardInterrupt:
        print("stopped; the same command measures what is missing", file=sys.stderr)
        sys.exit(INTERRUPTED)
