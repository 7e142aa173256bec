"""The parts of a run that is ready to train, and their evaluation."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from rankwise.errors import NotFiniteError
from rankwise.methods import Method
from rankwise.settings import RunConfig
from rankwise.tasks import Evaluation, Scored, Split, Task
from rankwise.train.arguments import computing
from rankwise.train.chain import Before
from rankwise.train.progress import DivergedError, Plan

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Parts:
    """The parts of a run that is ready to train."""

    config: RunConfig
    task: Task
    train: Split
    examples: "Dataset"
    """The training rows, encoded for the model."""
    evaluations: list[Evaluation]
    method: Method
    model: nn.Module
    processor: Any
    """The model's tokenizer; None for segmentation."""
    head: list[str]
    head_parameters: int
    budget: int
    """`Method.budget` right after attaching."""
    plan: Plan
    rows: int
    """Rows that go through the model at once."""
    before: Before | None
    base: str
    """Digest of the base weights, see `adapters.beside`."""

    def evaluate(self, final: bool) -> list[Scored]:
        """Scores of the model on each evaluation split."""
        try:
            with computing(self.config):
                return [self.task.evaluate(self.model, e, self.processor, self.rows, final) for e in self.evaluations]
        except NotFiniteError as error:
            raise DivergedError(f"the model's outputs are not finite at an evaluation: {error}") from error

    def metrics(self) -> dict[str, float]:
        """Loss and metrics of all evaluation splits together, without those too slow to compute during training."""
        return all_metrics(self.evaluate(final=False))


def all_metrics(scored: list[Scored]) -> dict[str, float]:
    """The metrics of several splits in one dictionary; DivergedError for a value that is not finite."""
    metrics = {name: value for split in scored for name, value in split.metrics.items()}
    if not all(map(math.isfinite, metrics.values())):  # the square of a finite output may be infinite
        raise DivergedError(f"the model's scores are not finite at an evaluation: {metrics}")
    return metrics
