"""Runs as a worker leaves them, with made-up numbers."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from rankwise.runs.store import Store
from rankwise.settings import RunConfig

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
    """The predictions of a run on its main split, and one row of another split behind them.

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
