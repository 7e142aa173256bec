"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512), by PEFT: another method that learns ranks.

    h = W x + b + s B diag(E) A x,    s = α / r0,    E = 0 at the start

After each optimizer step every entry w of A, E and B gets a score, the smoothed |w ∂L/∂w| times its uncertainty (eq. 8
to 11); the score of a unit of rank is their sum. Between `start` and `settle` the number of units falls cubically from
n·r0 to n·rank (eq. 12), and every ΔT steps all E_i except the best are set to 0. Then the choice is final.

In PEFT 0.21 the user has to call the allocator, whose state does not survive a restart; `ranks/triplets.py` does both.
PEFT adds γ times the mean of ‖P Pᵀ - I‖_F over P = A, Bᵀ to the loss of models for a task; here its gradient is added
for all models. The paper (eq. 4) sums the squares of these norms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from peft import AdaLoraConfig
from pydantic import Field
from torch import nn

from rankwise.errors import require
from rankwise.methods.base import Method
from rankwise.methods.targets import ALL_LINEAR, adapt, placement
from rankwise.optim import SimplexAdam
from rankwise.ranks import RankPlan
from rankwise.ranks.peft_calls import allow_added_adapters
from rankwise.ranks.triplets import (
    add_orthogonality,
    add_scores,
    choose,
    extra_parameters,
    live_ranks,
    peft_config,
    to_lora,
    triplets,
)
from rankwise.runs.search import Search

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class AdaLoRA(Method, name="adalora"):
    """AdaLoRA (by PEFT): starts with more rank than the budget, and a score decides which units of rank stay.

    Attributes:
        rank: the mean rank of the sites at the end.
        init_rank: r0, the rank of every site at the start.
        alpha: α; the scale is α / r0 throughout.
        targets: `all-linear` (every linear layer except the output head), or names of modules, matched by their ends.
        dropout: share of the adapter's inputs that are zeroed in training.
        start: steps before the first cut; below 1, a share of all steps.
        settle: steps after the last cut, with final ranks; below 1, a share of all steps.
        every: ΔT, steps between two cuts.
        total: steps of the whole training; 0 takes them from the run.
        beta1: β1, the share of its old value that a smoothed sensitivity keeps at each step.
        beta2: β2, the same for its uncertainty.
        orthogonality: γ, the weight of the term that keeps the rows of A and the columns of B orthonormal.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    init_rank: Annotated[int, Field(ge=2)] = 12
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: str | list[str] = ALL_LINEAR
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    start: Annotated[float, Field(ge=0)] = 0.1
    settle: Annotated[float, Field(ge=0)] = 0.5
    every: Annotated[int, Field(ge=1)] = 10
    total: Annotated[int, Field(ge=0)] = 0
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    orthogonality: Annotated[float, Field(ge=0)] = 0.1

    sizes = ("init_rank", "rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.init_rank > self.rank, f"init_rank must be above {self.rank} (rank), not {self.init_rank}")
        self._phases(self.total)

    def _phases(self, total: int) -> dict[str, int | None]:
        """PEFT's options for the phases of a training of `total` steps (0: not known yet)."""
        start, settle = (int(part * total if part < 1 else part) for part in (self.start, self.settle))
        message = f"start ({start}) and settle ({settle}) leave none of {total} steps to choose ranks in: lower them"
        require(not total or start + settle < total, message)
        return {"tinit": start, "tfinal": settle, "total_step": total or None}

    def sized(self, size: int) -> "AdaLoRA":
        """Rank 1 + `size` at the start, which decides the peak, and two thirds of it at the end, as by default."""
        return replace(self, init_rank=1 + size, rank=max(1, 2 * (1 + size) // 3))

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        placed = placement(model, self.targets, head, self.init_rank, "init_rank", only="adalora")
        config = AdaLoraConfig(
            init_r=self.init_rank,
            target_r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            lora_dropout=self.dropout,
            **placed,
            deltaT=self.every,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=0.0,  # before_step adds it
            total_step=1,
        )
        vars(config).update(self._phases(self.total))  # afterwards, since PEFT requires a number of steps
        model = adapt(model, config)
        add_scores(model)
        allow_added_adapters(model)
        return model

    def optimizer(self, model: nn.Module, args: "TrainingArguments") -> SimplexAdam:
        vars(peft_config(model)).update(self._phases(self.total or max(0, args.max_steps)))
        return super().optimizer(model, args)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        known = not triplets(model) or peft_config(model).total_step
        require(bool(known), "adalora needs the number of steps of the training: set total, or the run's max_steps")
        return super().param_groups(model)

    def before_step(self, model: nn.Module) -> None:
        add_orthogonality(model, self.orthogonality)

    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None:
        choose(model, step)
        return None

    def fold(self, model: nn.Module) -> nn.Module:
        """Plain LoRA on the same base weights, as a new model, without the units of rank that were not chosen."""
        return to_lora(model) if triplets(model) else super().fold(model)

    def budget(self, model: nn.Module) -> int:
        return self.rank * sum(layer.in_features + layer.out_features for layer in triplets(model).values())

    def final(self, model: nn.Module) -> int | None:
        return (super().final(model) or 0) + extra_parameters(model)

    def search(self, model: nn.Module, moved: float | None = None) -> Search | None:
        result = self._changed(live_ranks(model)) if triplets(model) else super().search(model)
        if result is None or result.changed:
            return result
        return replace(result, advice="no unit of rank has been cut: lower start or rank, or train longer")

    @property
    def check_every(self) -> int:
        return self.every
