"""How fast a run's model writes the texts that it is scored on, next to transformers' own search with the same options.

    rankwise train e2e.yaml model=smollm2 max_steps=60
    OMP_NUM_THREADS=1 python benchmarks/generation.py runs/e2e-lora-0-… --rows 64

The two take turns in one process. Printed are the median of the ratios with its quartiles, tokens a second, and how
many of the texts are the same. The time is that of this process, and on a GPU that of the clock.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measures import over

from rankwise.commands.ready import Ready
from rankwise.tasks import decoding, subset
from rankwise.tasks.base import evaluating
from rankwise.tasks.generation import Generation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="an adapter or a run of a task that writes text")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    ready = Ready.of(asked.run)
    task = ready.task
    if not isinstance(task, Generation):
        parser.error(f"{task.name} is no task that writes text: give a run of e2e, wikisql or summaries")
    device = next(ready.model.parameters()).device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    examples = ready.encoded(subset(task.evaluation()[0], asked.rows)).examples
    ways: dict[str, Any] = {"ours": decoding._usual, "transformers": lambda *_: False}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    texts = {}
    for _ in range(asked.times):
        for way, usual in ways.items():
            decoding._usual = usual
            with evaluating(ready.model):
                start = clock()
                texts[way] = task.generate(ready.model, examples, ready.processor, asked.at_once)
                seconds[way].append(clock() - start)
    low, middle, high = over(seconds["ours"], seconds["transformers"])
    same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    tokens = sum(len(ready.processor(text)["input_ids"]) for text in texts["ours"])
    speed = {way: tokens / statistics.median(each) for way, each in seconds.items()}
    print(f"ours ÷ transformers: {middle:.2f} ({low:.2f} to {high:.2f}); {same} of {len(examples)} texts are the same")
    print(", ".join(f"{way} {each:.1f} tokens/s" for way, each in speed.items()))
    if asked.json:
        found = {"task": task.label, "ratio": [low, middle, high], "same": same, "of": len(examples), "speed": speed}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
