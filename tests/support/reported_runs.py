"""Folders of runs as a sweep leaves them, with made-up numbers: what a report is made from."""

import json
import random
from pathlib import Path
from typing import Any

from rankwise.runs.store import Store
from rankwise.settings import Experiment, RunConfig
from runs_made_up import REVISION, result

PROJECTIONS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
SITES = [f"encoder.layer.{layer}.{projection}" for layer in range(6) for projection in PROJECTIONS]
METHODS: list[tuple[dict[str, Any], list[float], float]] = [
    ({"name": "head"}, [5e-3, 2e-2], 0.58),
    ({"name": "lora", "rank": 4, "alpha": 16.0, "targets": "all-linear"}, [1e-3, 3e-3], 0.71),
    ({"name": "simplex-lora", "rank": 4, "alpha": 16.0, "targets": "all-linear", "every": 20}, [1e-3, 3e-3], 0.73),
]
SEARCH = {"changed": 17, "sites": 36, "moved": 2.3, "weights": "ω", "unit": "ranks"}
STEPS = 300


def write_runs(
    folder: Path,
    tasks: tuple[str, ...] = ("stdlib-module",),
    seeds: tuple[int, ...] = (0, 1, 2),
    title: str = "Where does rank belong?",
    moving: bool = True,
) -> Path:
    """Finished runs of three methods at two rates each, with curves and ranks; returns `folder`."""
    store = Store(folder)
    store.note(
        Experiment(
            name="quickstart",
            base={"task": tasks[0]},
            vary={"seed": list(seeds)},
            report={"title": title, "text": "Three methods.\n\nOne budget."},
            runs=str(folder),
        )
    )
    for task in tasks:
        for method, rates, level in METHODS:
            for rate in rates:
                for seed in seeds:
                    config = RunConfig(task=task, method=method, learning_rate=rate, seed=seed, train_rows=4800)
                    finish(store, config, level + (rate == rates[1]) * 0.01, moving)
    return folder


def finish(store: Store, config: RunConfig, level: float, moving: bool = True, parameters: int = 331_776) -> Path:
    """Write what a finished run writes."""
    folder = store.create(config, REVISION)
    draw = random.Random(str(folder.name))
    score = level + draw.uniform(-0.012, 0.012)
    name = config.method["name"]
    lines: list[dict[str, Any]] = [{"step": 0, "steps": STEPS}]
    for step in range(2, STEPS + 1, 2):
        loss = 3.1 - 2.2 * level * (1 - 0.985**step) + draw.uniform(-0.15, 0.15)
        lines.append({"step": step, "epoch": step / 150, "loss": loss, "learning_rate": config.learning_rate})
        if step % 50 == 0:
            reached = score * (1 - 0.98**step)
            lines.append({"step": step, "epoch": step / 150, "eval": {"accuracy": reached, "f1": reached - 0.03}})
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "ranks.jsonl", [] if name == "head" else rank_lines(draw, name == "simplex-lora", moving))
    (folder / "env.json").write_text(json.dumps({"python": "3.11.2", "torch": "2.13.0", "cpus": 2, "gpu": None}))
    size = 0 if name == "head" else parameters
    validation = {"name": "validation", "rows": 1234, "official": False, "note": "split by rankwise from docstrings"}
    found = result(
        folder,
        config,
        score,
        metrics={"accuracy": score, "f1": score - 0.03},
        splits={
            "train": {"name": "train", "rows": 4800, "official": False, "note": "4,800 of 5,000 rows"},
            "evaluation": [validation],
        },
        parameters={"trainable": size, "final": size, "budget": size, "head": 157_080},
        cost={
            "seconds": 92.5,
            "peak_memory_bytes": 812_345_678,
            "examples_per_second": 103.7,
            "adapter_bytes": 1_345_678,
        },
        **({"search": SEARCH} if name == "simplex-lora" else {}),
    )
    (folder / "result.json").write_text(json.dumps(found))
    return folder


def rank_lines(draw: random.Random, searching: bool, moving: bool) -> list[dict[str, Any]]:
    ranks = dict.fromkeys(SITES, 4)
    weights = {"weights": dict.fromkeys(SITES, 1.0)} if searching else {}
    lines = [{"step": 0, "ranks": dict(ranks), **weights}]
    for step in (20, 40, 60) if searching else ():
        for _ in range(8 if moving else 0):
            giver, taker = draw.sample(SITES, 2)
            if ranks[giver]:
                ranks[giver] -= 1
                ranks[taker] += 1
        lines.append({"step": step, "ranks": dict(ranks), **(weights if step < 60 else {})})
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
