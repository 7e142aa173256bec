"""TensorBoard during a run: losses, scores and the rank of each layer, read back from what it has written."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rankwise as rw

method = {"name": "simplex-lora", "rank": 2, "targets": ["query", "value"], "every": 4, "times": 2}
result = rw.train(
    {
        "task": "stdlib-kind", "method": method, "model": "random-bert", "max_steps": 12, "train_rows": 320,
        "eval_rows": 64, "max_length": 24, "report_to": ["tensorboard"], "runs": "runs/tensorboard",
    }
)  # fmt: skip
folder = Path(result.folder)
events = EventAccumulator(str(folder / "tensorboard")).Reload()
names = events.Tags()["scalars"]
print(
    len(names),
    "curves,",
    len(events.Tags()["images"]),
    "picture; look at them with: tensorboard --logdir runs/tensorboard",
)
for name in ("train/loss", "eval/accuracy", "ranks/total", *sorted(n for n in names if n.startswith("ranks/bert"))[:3]):
    print(f"{name}: " + ", ".join(f"{point.value:.3g} at {point.step}" for point in events.Scalars(name)[-3:]))
