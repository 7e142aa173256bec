"""WeightLoRA (Shalygin, Davydenko, Veprikov, MIPT 2025, slides; WLoRA in their tables): k of n adapters stay.

h = W x + b + s ω_i B A x for each of n sites, and at most k of the ω_i are not 0.

    1. all ω_i = 1; after each optimizer step (ω by SGD at its own rate) keep the k entries of largest |ω|, others are 0
    2. after a given step remove the adapters with ω_i = 0; ω goes on training for those that stay
    3. at the end fold ω into B

With its own clock ω is folded when adapters are removed: equally long steps after that would not show any better where
adapters are worth it.

While B is 0 the gradient of ω is 0, so that after the first step all entries are equal and the projection is decided by
ties. With ω = 0 the factors A and B get no gradient, so an adapter returns only if its ω alone grows past another. This
is the algorithm of the slides (`start: 1`); our default first lets B grow for some steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from rankwise.errors import require
from rankwise.methods.omega import OmegaLoRA, without_dead
from rankwise.optim import project
from rankwise.ranks import RankPlan, ranks, sites
from rankwise.ranks.sites import omega
from rankwise.runs.search import Search


@dataclass(frozen=True)
class WeightLoRA(OmegaLoRA, name="weight-lora"):
    """LoRA with a weight per site; the k sites of largest weight stay, the others are removed.

    Attributes:
        keep: k, the number of sites that stay.
        start: the first step after which ω is projected.
        every: T, the step after which sites with ω = 0 are removed.
    """

    keep: Annotated[int, Field(ge=1)] = 10
    start: Annotated[int, Field(ge=1)] = 10
    every: Annotated[int, Field(ge=1)] = 30

    moving = ("ω of the sites that stay", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.start <= self.every, f"start must be 1 to {self.every} (every), not {self.start}")

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        model = super().attach(model, head)
        check_keep(self.keep, model)
        return model

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None:
        weights = omega(model)
        if weights is None:  # folded
            return None
        project.check_finite(weights, "ω is", "omega_rate", step, due=step == self.every)
        if step >= self.start and lr > 0:
            weights.copy_(project.top_k(weights, self.keep))
        if step != self.every:
            return None
        all_sites, values = sites(model), weights.tolist()
        live = without_dead(values, all_sites)
        removed = {site.name: 0 for site, value in zip(all_sites, live, strict=True) if value == 0}
        return RankPlan(removed, fold=self.omega_rate is None, moved=self._moved(values))

    def budget(self, model: nn.Module) -> int:
        """The cost of the k most expensive sites."""
        return sum(sorted((site.parameters for site in sites(model)), reverse=True)[: self.keep])

    def final(self, model: nn.Module) -> int | None:
        return (super().final(model) or 0) - super().budget(model) + self.budget(model)

    def _moved(self, weights: Sequence[float]) -> float:
        return max((abs(value - 1) for value in weights if value), default=0.0)

    def _advice(self, model: nn.Module, search: Search) -> str:
        if not search.changed:
            return f"keep fewer than {search.sites} sites" if self.keep >= search.sites else self._move_more
        values = list((self.weights(model) or ranks(model)).values())
        if any(values[: self.keep]) and not any(values[self.keep :]):
            return "the first sites of the model stayed, as happens when ω is projected while B is 0: raise start"
        return ""

    @property
    def check_every(self) -> int:
        return self.every

    @property
    def search_steps(self) -> int:
        return self.every


def check_keep(keep: int, model: nn.Module) -> None:
    """Raise InputError if `keep` is more than the number of sites."""
    count = len(sites(model))
    require(keep <= count, f"keep {keep} is more than the {count} adapted layers: keep fewer, or name more targets")
