"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A is random and frozen, B trains.

    h = W x + b + s B (A x),    ∂L/∂B = s ∂L/∂h (A x)ᵀ

The gradient of B needs only A x, of width r, for the backward pass, while that of A would need x, of width in (section
3). With `dropout` above 0 its mask, of width in, is kept too.

The paper trains B by AdamW on that gradient. `projected` was added to PEFT by its authors later: AdamW on
g = s⁻² ∂L/∂B (A Aᵀ)⁻¹, for which the change of s B A is closest to that of full fine-tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from rankwise.errors import require
from rankwise.methods.base import adam_options
from rankwise.methods.lora import LoRA
from rankwise.optim.projected_adam import ProjectedAdam
from rankwise.ranks import sites

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class LoRAFA(LoRA, name="lora-fa"):
    """LoRA with random, frozen A: fewer trainable parameters, and no inputs kept for the backward pass.

    Attributes:
        projected: train B with PEFT's LoRA-FA optimizer, whose steps are the closest to those of full fine-tuning.
    """

    projected: bool = False

    factors = "B"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.projected and self.pull), "pull must be 0 with projected, whose optimizer would rescale it")

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        model = super().attach(model, head)
        for site in sites(model):
            site.A.requires_grad_(False)
            # or PEFT would unfreeze it when the adapter is disabled and enabled again
            frozen = {**site.layer.frozen_peft_weight_names, site.adapter: ("lora_A",)}
            site.layer.frozen_peft_weight_names = frozen
        return model

    @property
    def linear_only(self) -> str:
        return "projected" if self.projected else super().linear_only

    def budget(self, model: nn.Module) -> int:
        """out·r of every site."""
        return sum(site.B.numel() for site in sites(model))

    def optimizer(self, model: nn.Module, args: "TrainingArguments") -> Any:
        """SimplexAdam, or with `projected` ProjectedAdam, with the rate, betas, epsilon and weight decay of `args`."""
        if not self.projected:
            return super().optimizer(model, args)
        return ProjectedAdam(self, model, *adam_options(args))

    def before_step(self, model: nn.Module) -> None:  # only SimplexAdam calls it
        require(not self.projected, "projected needs ProjectedAdam: use the optimizer of method.optimizer(model, args)")
        super().before_step(model)
