"""The memory that training takes with each of the settings that save some, counted beforehand and measured, and time.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --rows 2 --tokens 128
    OMP_NUM_THREADS=1 python benchmarks/memory.py --rows 1 --tokens 2048 --packing no --activations plain lean

Each combination trains LoRA for a few steps in a process of its own, and a row of a Markdown table is printed. On a
GPU the memory is that of tensors, on Linux that by which the process grew, with an allocator that keeps nothing. All
passes have the same number of tokens; a packed one holds four times as many rows. What is saved are the tensors that
are there after the forward pass, without the weights.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from measures import kept

import rankwise as rw
from rankwise.ranks.layers import holds_codes
from rankwise.settings import RunConfig
from rankwise.train import memory_need, model
from rankwise.train.arguments import HOW, RECOMPUTE, Loading, computing

WEIGHTS = {"fp32": {}, "bf16": {"dtype": "bf16"}, "8bit": {"quantise": "8bit"}, "4bit": {"quantise": "4bit"}}
LINE = "| {} | {} | {} | {} | {:.2f} GiB | {:.2f} GiB | {:.2f} GiB | {:.1f} s |"
HEAD = "| weights | activations | checkpointing | packing | saved | counted | measured | a step |\n|" + 8 * "---|"
BOTH = ("no", "yes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=[*WEIGHTS])
    parser.add_argument("--activations", nargs="+", choices=("plain", "lean"), default=["plain"])
    parser.add_argument("--checkpointing", nargs="+", choices=BOTH, default=BOTH)
    parser.add_argument("--packing", nargs="+", choices=BOTH, default=BOTH)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(asked, json.loads(asked.one))))
        return
    print(HEAD, flush=True)
    for chosen in itertools.product(asked.checkpointing, asked.packing, asked.weights, asked.activations):
        checkpointing, packing, weights, activations = chosen
        settings = {**WEIGHTS[weights], "gradient_checkpointing": checkpointing == "yes", "packing": packing == "yes"}
        settings |= {"activation_memory": activations}
        command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(settings)]
        done = subprocess.run(
            command, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, stdout=subprocess.PIPE, check=True
        )
        *sizes, seconds = json.loads(done.stdout.splitlines()[-1])
        gibs = (size / memory_need.GIB for size in sizes)
        print(LINE.format(weights, activations, checkpointing, packing, *gibs, seconds), flush=True)


def measured(asked: argparse.Namespace, settings: dict[str, object]) -> tuple[int, int, int, float]:
    """Bytes saved, counted and measured, and the last step's seconds; on a CPU its own, whatever else runs there."""
    warnings.simplefilter("ignore")
    task = rw.task({"name": "stdlib-signature"})
    config = RunConfig.model_validate(
        {
            **{"task": {"name": "stdlib-signature"}, "model": asked.model, "max_length": asked.tokens},
            **{"batch_size": asked.rows, **settings},
        }
    )
    memory_need.SMALL_FILES = 0
    need = memory_need.need(config)
    assert need is not None
    cuda = torch.cuda.is_available()
    before = 0 if cuda else resident("VmRSS:")
    method = rw.LoRA()
    base, _, head = model.build(asked.model, task, asked.tokens, loading=Loading.of(config))
    with model.quiet():
        adapted = method.attach(base.to("cuda") if cuda else base, head)
    model.train_in_fp32(adapted)
    for p in adapted.parameters():
        if not holds_codes(p):
            p.data = p.data.clone()  # or the file, all of which was read, would stay mapped
    adapted.train()
    if config.gradient_checkpointing:
        getattr(base, f"{RECOMPUTE}_enable")(HOW)
    optimizer = rw.SimplexAdam(method, adapted, lr=1e-4)
    ids = torch.randint(5, 1000, (asked.rows, need.tokens), device=next(adapted.parameters()).device)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    places = torch.arange(need.tokens, device=ids.device) % math.ceil(need.tokens / 4)
    rows = {"position_ids": places.expand_as(ids)} if config.packing else {"attention_mask": mask}
    if config.activation_memory == "lean":
        with computing(config):
            rw.lean(adapted)

    def step() -> torch.Tensor:
        with computing(config):
            return adapted(input_ids=ids, labels=ids, use_cache=False, **rows).loss

    saved = kept(adapted, step)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak again, after loading
    clock, seconds = time.perf_counter if cuda else time.process_time, 0.0
    for _ in range(asked.steps):
        start = clock()
        step().backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds = clock() - start
    return (
        saved,
        need.total,
        (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM:")) - before,
        seconds,
    )


def resident(name: str) -> int:
    """A value of the process's memory, in bytes."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))


if __name__ == "__main__":
    main()
