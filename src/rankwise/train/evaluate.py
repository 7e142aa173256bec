"""What a trained model says about the rows of a task, and how good that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from rankwise.config import need
from rankwise.tasks import Split, Task

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Evaluation:
    """One split on its way to a score: its rows, and the same rows as tokens, in the same order."""

    split: Split
    tokens: "Dataset"


def predict(model: nn.Module, tokens: "Dataset", tokenizer: PreTrainedTokenizerBase, batch_size: int) -> np.ndarray:
    """Logits (n, outputs) in fp32 in the order of `tokens`, whose other columns than the model's inputs are ignored.

    Batches are made of rows of like length. No random number is drawn, and the model stays in the mode it was in.
    """
    # The longest first, so that a batch too large for the memory fails at once; equal lengths in their old order.
    order = np.argsort(-np.asarray(tokens["length"][:]), kind="stable")
    inputs = tokens.remove_columns([name for name in ("length", "labels") if name in tokens.column_names])
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    logits = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = inputs[order[start : start + batch_size].tolist()]
            batch = collate([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])
            outputs = model(**{name: values.to(device) for name, values in batch.items()})
            logits.append(outputs.logits.float().cpu().numpy())
    model.train(training)
    result = np.empty((len(order), logits[0].shape[1]), dtype=np.float32)
    result[order] = np.concatenate(logits)
    return result


def score(task: Task, evaluation: Evaluation, logits: np.ndarray) -> dict[str, float]:
    """Mean loss and the task's metrics of one split's logits (n, outputs); {} for a split without labels."""
    if not evaluation.split.labelled:
        return {}
    outputs, labels = torch.from_numpy(logits), torch.tensor(evaluation.split.data["label"][:])
    loss = (
        functional.cross_entropy(outputs, labels) if task.labels else functional.mse_loss(outputs[:, 0], labels.float())
    )
    return {f"loss{evaluation.split.suffix}": loss.item(), **task.score(evaluation.split, task.decode(logits))}


def table(task: Task, evaluations: Sequence[Evaluation], logits: Sequence[np.ndarray]) -> Any:
    """A pyarrow table, one row per evaluated example: split, idx, label (-1: none), prediction and logits (a list)."""
    pa = need("pyarrow", "bench")
    tables = []
    for evaluation, outputs in zip(evaluations, logits, strict=True):
        data, kind = evaluation.split.data, pa.int64() if task.labels else pa.float64()
        columns = {
            "split": pa.array([evaluation.split.name] * len(data)),
            "idx": pa.array(data["idx"][:], pa.int64()),
            "label": pa.array(data["label"][:] if "label" in data.column_names else [-1] * len(data), kind),
            "prediction": pa.array(task.decode(outputs).tolist(), kind),
            "logits": pa.array(outputs.tolist(), pa.list_(pa.float32())),
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)
