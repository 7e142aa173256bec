"""What the methods with one weight ω_i per site share: h = W x + b + s ω_i B A x."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from rankwise.errors import NotFiniteError
from rankwise.methods.base import require
from rankwise.methods.lora import LoRA
from rankwise.ranks import sites
from rankwise.ranks.resize import add_omega, resize
from rankwise.ranks.sites import adapted, omega


@dataclass(frozen=True)
class OmegaLoRA(LoRA):
    """LoRA with a weight ω_i on every site, stepped by SGD at its own rate.

    Attributes:
        omega_rate: learning rate of ω by SGD; it follows the run's schedule.
    """

    omega_rate: float = 5.0

    keeps_ranks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.omega_rate >= 0, f"omega_rate must not be negative, not {self.omega_rate}")

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        model = super().attach(model, head)
        add_omega(model)
        return model

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        weights = omega(model)
        groups = super().param_groups(model)
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not weights]
        # The group stays when ω is gone, so that a checkpoint from after the search fits one from during it.
        mine = {"name": "omega", "params": [] if weights is None else [weights], "rule": "sgd", "lr": self.omega_rate}
        return [*groups, {**mine, "weight_decay": 0.0}]

    def fold(self, model: nn.Module) -> nn.Module:
        """To plain LoRA with unchanged outputs; sites whose ω is 0 are gone then, also in the middle of a search."""
        values = self.weights(model) or {}
        if gone := {name: 0 for name, value in values.items() if value == 0}:
            resize(model, gone)
        return super().fold(model)

    def weights(self, model: nn.Module) -> dict[str, float] | None:
        values = omega(model)
        if values is None:
            return None
        return dict(zip([s.name for s in sites(adapted(model))], values.tolist(), strict=True))


def check_finite(weights: nn.Parameter, step: int) -> None:
    """Raise NotFiniteError where a diverged training has reached ω."""
    if not torch.isfinite(weights).all():
        raise NotFiniteError(
            f"ω is not finite after step {step}: the training has diverged; lower the learning rate or omega_rate"
        )
