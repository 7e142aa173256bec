"""TensorBoard during a run: losses, scores and the rank of each layer, read back from what it has written."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rankwise as rw

method = {"name": "simplex-lora", "rank": 4, "targets": ["query", "value"], "every": 5, "times": 2}
result = rw.train(
    {
        "task": "stdlib-kind", "method": method, "max_steps": 14, "train_rows": 320, "learning_rate": 3e-3,
        "eval_rows": 64, "max_length": 24, "report_to": ["tensorboard"], "runs": "runs/tensorboard",
    }
)  # fmt: skip
folder = Path(result.folder)
events = EventAccumulator(str(folder / "tensorboard")).Reload()
names = events.Tags()["scalars"]
print(f"{len(names)} curves; look at them with: tensorboard --logdir runs/tensorboard")
ranks = sorted(name for name in names if name.startswith("ranks/bert"))
for name in ("train/loss", "eval/accuracy", *ranks[:4]):
    points = [f"{point.value:.3g} after step {point.step}" for point in events.Scalars(name)[-3:]]
    print(f"{name}: {', '.join(points)}")
