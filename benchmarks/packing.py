"""How many tokens a second a model trains on with packing and without, on conversations made from E2E or SAMSum.

    OMP_NUM_THREADS=1 RANKWISE_DATA=… python benchmarks/packing.py e2e --rows 24 --at-once 1 --max-length 256

The same rows pass forward and backward, as many sequences at once; the two take turns, and the ratio of the medians is
printed.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from rankwise.tasks import subset
from rankwise.train.model import build, quiet
from rankwise.train.packing import Packing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["e2e", "samsum"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=2, help="sequences that pass through the model together")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--times", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = rw.task({"type": "chat", "dataset": conversations(Path(folder), asked.data, asked.rows)})
        model, tokenizer, _ = build(asked.model, task, asked.max_length)
        with quiet():
            model = rw.LoRA(rank=8).attach(model.to("cuda" if torch.cuda.is_available() else "cpu")).train()
        rows = list(task.encode(task.train(), tokenizer, asked.max_length))
        collate = task.collate(model, tokenizer, seed=0)
    rows.sort(key=lambda row: -row["length"])  # as a run groups them
    packing = Packing(asked.max_length)
    packing.check(model, rows[0]["input_ids"])
    packs = packing.packs(collate(rows))
    pieces: dict[str, list[dict[str, Any]]] = {
        "unpacked": [collate(rows[start : start + asked.at_once]) for start in range(0, len(rows), asked.at_once)],
        "packed": [packing.join(packs[start : start + asked.at_once]) for start in range(0, len(packs), asked.at_once)],
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in pieces}
    for _ in range(asked.times):
        for kind, batches in pieces.items():
            seconds[kind].append(step(model, batches))
    tokens, medians = sum(row["length"] for row in rows), {}
    for kind, batches in pieces.items():
        medians[kind] = statistics.median(seconds[kind])
        read = sum(batch["input_ids"].numel() for batch in batches)
        print(f"{kind}: {len(batches)} passes, {tokens / medians[kind]:.1f} tokens/s, {1 - tokens / read:.1%} padding")
    print(f"packed is {medians['unpacked'] / medians['packed']:.2f} times as fast")


def conversations(folder: Path, data: str, count: int) -> str:
    """A file of conversations for the chat task; a tenth of it is held out."""
    split = subset(rw.task(data).train(), count)
    rows = [
        {"messages": [{"role": "user", "content": row["source"]}, {"role": "assistant", "content": row["target"]}]}
        for row in split.data
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "chat.jsonl")


def step(model: Any, batches: list[dict[str, Any]]) -> float:
    """Seconds that the passes of one optimizer step take; on a CPU, of its own, whatever else the machine does."""
    device = next(model.parameters()).device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    for batch in batches:
        inputs = {key: each.to(device) if isinstance(each, torch.Tensor) else each for key, each in batch.items()}
        model(**inputs).loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
