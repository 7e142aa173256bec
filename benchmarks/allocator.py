"""Time and memory of steps on a CPU where the C library keeps what is freed, next to where it gives it back.

    OMP_NUM_THREADS=1 python benchmarks/allocator.py --model smollm2 --rows 4 --tokens 128

On Linux glibc returns large blocks to the system when they are freed, and each step has to be given their pages again.
The two take turns, each time in a process of its own that trains LoRA on rows of random lengths. Printed are the
medians and quartiles of the ratios, kept over given back: of the process's own time, and of its largest memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

from measures import quartiles

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as `model` of a run")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of the longest row")
    parser.add_argument("--steps", type=int, default=8, help="after three that are not counted")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measured(asked)))
        return
    found: dict[str, list[list[float]]] = {"seconds": [], "memory": []}
    for _ in range(asked.times):
        pair = []
        for more in ({}, KEPT):
            command = [sys.executable, __file__, *sys.argv[1:], "--here"]
            done = subprocess.run(command, env={**os.environ, **more}, stdout=subprocess.PIPE, check=True)
            pair.append(json.loads(done.stdout.splitlines()[-1]))
        for place, values in enumerate(found.values()):
            values.append([pair[0][place], pair[1][place]])
    ratios = {name: quartiles([b / a for a, b in pairs]) for name, pairs in found.items()}
    for name, (low, middle, high) in ratios.items():
        print(f"{name}, kept ÷ given back: {middle:.3f} ({low:.3f} to {high:.3f})")
    if asked.json:
        asked.json.write_text(json.dumps({"model": asked.model, "rows": asked.rows, **ratios}, indent=1) + "\n")


def measured(asked: argparse.Namespace) -> tuple[float, int]:
    """Seconds of the steps, and the largest memory in KiB."""
    warnings.simplefilter("ignore")
    import torch

    import rankwise as rw
    from rankwise.train.model import build, quiet

    task = rw.task({"name": "stdlib-signature"})
    with quiet():
        base, _, head = build(asked.model, task, asked.tokens)
        method = rw.LoRA()
        model = method.attach(base, head).train()
    optimizer = rw.SimplexAdam(method, model, lr=1e-4)
    lengths = torch.randint(asked.tokens // 8, asked.tokens + 1, (asked.steps + 3,), generator=torch.manual_seed(0))
    start = 0.0
    for step, length in enumerate(lengths.tolist()):
        if step == 3:
            start = time.process_time()
        ids = torch.randint(5, 1000, (asked.rows, length))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
