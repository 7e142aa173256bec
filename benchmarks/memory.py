"""The memory that training takes with each of the settings that save some, counted beforehand and measured, and time.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --rows 2 --tokens 128

Each combination trains LoRA for a few steps in a process of its own, and a row of a Markdown table is printed. On a GPU
the memory is that of tensors, on Linux that by which the process grew, with an allocator that keeps nothing. All passes
have the same number of tokens; a packed one holds four times as many rows.
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

import rankwise as rw
from rankwise.ranks.layers import holds_codes
from rankwise.settings import RunConfig
from rankwise.train import memory_need, model
from rankwise.train.arguments import HOW, RECOMPUTE, Loading, computing

WEIGHTS = {"fp32": {}, "bf16": {"dtype": "bf16"}, "8bit": {"quantise": "8bit"}, "4bit": {"quantise": "4bit"}}
LINE = "| {} | {} | {} | {:.2f} GiB | {:.2f} GiB | {:.1f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(asked, json.loads(asked.one))))
        return
    print("| weights | checkpointing | packing | counted | measured | a step |\n|---|---|---|---|---|---|", flush=True)
    for checkpointing, packing, (name, settings) in itertools.product((False, True), (False, True), WEIGHTS.items()):
        settings = {**settings, "gradient_checkpointing": checkpointing, "packing": packing}
        command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(settings)]
        done = subprocess.run(
            command, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, stdout=subprocess.PIPE, check=True
        )
        counted, grown, seconds = json.loads(done.stdout.splitlines()[-1])
        gib = memory_need.GIB
        chosen = ("yes" if each else "no" for each in (checkpointing, packing))
        print(LINE.format(name, *chosen, counted / gib, grown / gib, seconds), flush=True)


def measured(asked: argparse.Namespace, settings: dict[str, object]) -> tuple[int, int, float]:
    """Bytes counted and measured, and the seconds of the last step; on a CPU its own, whatever else runs there."""
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
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak again, after loading
    clock, seconds = time.perf_counter if cuda else time.process_time, 0.0
    for _ in range(asked.steps):
        start = clock()
        with computing(config):
            adapted(input_ids=ids, labels=ids, use_cache=False, **rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds = clock() - start
    return need.total, (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM:")) - before, seconds


def resident(name: str) -> int:
    """A value of the process's memory, in bytes."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))


if __name__ == "__main__":
    main()
