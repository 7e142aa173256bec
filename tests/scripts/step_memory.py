"""Prints what a training step of a small Llama is counted to need, and by how much the process grew in it, in bytes.

To be started with MALLOC_MMAP_THRESHOLD_=65536: otherwise glibc keeps blocks of up to 32 MiB that were freed.
"""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw
from rankwise.settings import RunConfig
from rankwise.train.memory_need import _peak, kept_by_step


def resident(peak: bool) -> int:
    name = "VmHWM:" if peak else "VmRSS:"
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    config = RunConfig(task={"name": "e2e"}, gradient_checkpointing="checkpointing" in sys.argv)
    shape = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    )
    step = config, SimpleNamespace(family="generation", target_length=0), 8, 256
    with torch.device("meta"):
        counted = _peak(rw.LoRA(rank=4).attach(LlamaForCausalLM(shape)), *step)
    model = rw.LoRA(rank=4).attach(LlamaForCausalLM(shape))
    kept_by_step(model, *step)  # loads what is loaded once
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak again
    before = resident(peak=False)
    kept_by_step(model, *step)
    print(json.dumps([counted, resident(peak=True) - before]))
