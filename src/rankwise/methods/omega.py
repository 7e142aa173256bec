"""What methods with one weight ω_i per site share: h = W x + b + s ω_i B A x.

How far SGD moves ω depends on the loss, the rate, its schedule and the model: at the authors' rate of 5 the rank may
change at every site or at none. By default ω has its own clock instead, which needs no rate: Adam's moments of ∂L/∂ω,
steps of at most CLOCK / (steps of the search), and no schedule, so that in a search it can move by CLOCK.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from rankwise.methods.lora import LoRA
from rankwise.ranks import RankPlan, Site, ranks, sites
from rankwise.ranks.scales import Omega
from rankwise.ranks.sites import omega, peft_model
from rankwise.runs.search import Search

CLOCK = 1.5
"""How far an entry of ω, which starts at 1, can move in a search on its own clock."""
EPS = 1e-16
"""Adam's ε for ω: small compared to any gradient, so that the scale of the loss does not matter."""


@dataclass(frozen=True)
class OmegaLoRA(LoRA):
    """LoRA with a weight ω_i on every site.

    Attributes:
        omega_rate: learning rate of ω with SGD, which follows the run's schedule; None for ω's own clock: Adam's
            moments and steps of at most 1.5 / (steps of the search), whatever the run's rate (unless that is 0).
    """

    omega_rate: Annotated[float, Field(ge=0)] | None = None

    keeps_ranks: ClassVar[bool] = False
    moving: ClassVar[tuple[str, str]] = ("ω", "")
    """What moves in a search, and its unit, for messages."""

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        model = super().attach(model, head)
        Omega.put_on(model)
        return model

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        weights = omega(model)
        groups = super().param_groups(model)
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not weights]
        if self.omega_rate is not None:
            steps: dict[str, Any] = {"rule": "sgd", "lr": self.omega_rate}
        else:  # the group's `lr` is the run's, and the clock stops while that is 0
            steps = {"clock": CLOCK / (self.search_steps or 1), "eps": EPS}
        # The group stays after ω is removed, so that checkpoints from during and after the search have the same groups.
        own = {"name": "omega", "scale": True, "params": [] if weights is None else [weights], **steps}
        return [*groups, {**own, "weight_decay": 0.0}]

    def last_plan(self, model: nn.Module) -> RankPlan:
        """Empties sites whose ω is 0, during a search too."""
        values = self.weights(model) or {}
        return RankPlan({name: 0 for name, value in values.items() if value == 0}, fold=True)

    def weights(self, model: nn.Module) -> dict[str, float] | None:
        values = omega(model)
        if values is None:
            return None
        return dict(zip([s.name for s in sites(peft_model(model))], values.tolist(), strict=True))

    def search(self, model: nn.Module, moved: float | None = None) -> Search | None:
        weights = self.weights(model) or {}
        # a fold empties the sites whose ω is 0
        result = self._changed(ranks(model) | {name: 0 for name, value in weights.items() if value == 0})
        if result is None:
            return None
        result = replace(result, weights=self.moving[0], unit=self.moving[1])
        if not weights or (moved is not None and self.check_every == self.search_steps):  # the search is over
            result = replace(result, moved=moved)
            return replace(result, advice=self._advice(model, result))
        due = f"first change is due after step {self.check_every}"
        if moved is not None:
            due = f"last change is due after step {self.search_steps}"
        advice = "" if result.changed else f"the {due}: train longer"
        return replace(result, moved=self._moved(list(weights.values())), advice=advice)

    @abstractmethod
    def _moved(self, weights: Sequence[float]) -> float:
        """How far ω is from its start, in the unit of `moving`."""

    @abstractmethod
    def _advice(self, model: nn.Module, search: Search) -> str:
        """What to do if the search has changed nothing, else an empty string."""

    @property
    def _move_more(self) -> str:
        """Advice on how to make ω move more."""
        return "raise every" if self.omega_rate is None else "raise omega_rate or every, or leave omega_rate out"


def without_dead(weights: Sequence[float], all_sites: Sequence[Site]) -> list[float]:
    """ω of `all_sites`, with 0 for dead ones, which would otherwise keep rank although they learn nothing."""
    if all(site.dead or not w for site, w in zip(all_sites, weights, strict=True)):  # rank must go somewhere
        return list(weights)
    return [0.0 if site.dead else w for site, w in zip(all_sites, weights, strict=True)]
