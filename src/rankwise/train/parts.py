"""What a run is made of, ready to train, and what it is worth."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from rankwise.errors import NotFiniteError
from rankwise.methods import Method
from rankwise.settings import RunConfig
from rankwise.tasks import Evaluation, Scored, Split, Task
from rankwise.train.chain import Before
from rankwise.train.progress import DivergedError, Plan

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Parts:
    """What a run is made of, ready to train."""

    config: RunConfig
    task: Task
    train: Split
    examples: "Dataset"
    """The training rows as the model takes them."""
    evaluations: list[Evaluation]
    method: Method
    model: nn.Module
    processor: Any
    """What came with the model and prepares its inputs: a tokenizer."""
    head: list[str]
    head_parameters: int
    budget: int
    """Parameters of the adapters as they were attached."""
    plan: Plan
    rows: int
    """How many go through the model at once."""
    before: Before | None

    def evaluate(self, final: bool) -> list[Scored]:
        """What the model is worth now on each evaluation split."""
        size = self.rows
        try:
            return [self.task.evaluate(self.model, each, self.processor, size, final) for each in self.evaluations]
        except NotFiniteError as error:
            raise DivergedError(f"the model's outputs are not finite at an evaluation: {error}") from error

    def metrics(self) -> dict[str, float]:
        """Loss and metrics of all evaluation splits together, as far as they are worth their time during training."""
        return all_metrics(self.evaluate(final=False))


def all_metrics(scored: list[Scored]) -> dict[str, float]:
    """The metrics of several splits in one; DivergedError for one that is not finite."""
    found = {name: value for each in scored for name, value in each.metrics.items()}
    if not all(map(math.isfinite, found.values())):  # the square of a finite output need not be finite
        raise DivergedError(f"the model's scores are not finite at an evaluation: {found}")
    return found
