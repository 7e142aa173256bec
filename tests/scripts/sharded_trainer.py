"""What `train/test_devices.py` has two processes do under `accelerate launch --use_fsdp`: `sharded_trainer.py FOLDER`.

`on_cpus.py` carries it out.
"""

import sys
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainingArguments

import models
import side_by_side
from rankwise.methods import build
from rankwise.train.trainer import RankTrainer

KINDS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "Trainer": (Trainer, {}),
    "RankTrainer": (RankTrainer, {"method": build({"name": "lora", "rank": 2})}),
}


def train_on(found: Path, saved: Path, kind: str, rows: int, **more: Any) -> Trainer:
    """The found adapter after a few steps of `rows` rows a process, in float64; it is saved as the Trainer does."""
    args = TrainingArguments(
        str(saved), max_steps=4, per_device_train_batch_size=rows, learning_rate=1e-2, seed=3, max_grad_norm=0.5,
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        average_tokens_across_devices=False, **more,
    )  # fmt: skip
    model = PeftModel.from_pretrained(side_by_side.bare(), str(found), is_trainable=True).double()
    trainer, method = KINDS[kind]
    made = trainer(model=model, args=args, train_dataset=models.rows(24), **method)
    made.train()
    made.save_model(str(saved))
    return made


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for kind in KINDS:
        trainer = train_on(folder / "found", folder / kind, kind, rows=4)
