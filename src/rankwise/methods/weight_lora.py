"""WeightLoRA (Shalygin, Davydenko, Veprikov, MIPT 2025, slides; in their tables WLoRA): k of n adapters stay.

h = W x + b + s ω_i B A x for each of n sites, and at most k of the ω_i are not 0.

    1. all ω_i = 1; after each optimizer step (ω by SGD at its own rate) keep the k entries of largest |ω|, others are 0
    2. after a set step the adapters whose ω_i is 0 are removed for good; ω trains on for those that stay
    3. at the end ω is folded into B

On its own clock ω takes its last step where the adapters are removed, and is folded there: steps as long as before, to
the end of the training, would say no more about where an adapter is worth it.

While B is 0 the gradient of ω is 0, so a projection after the very first step finds n equal entries, and ties decide.
An adapter with ω = 0 gets no gradient on A and B any more, so it comes back only if ω alone grows past another. That is
the algorithm as the slides have it (`start: 1`). Our default lets B grow for some steps first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from rankwise.errors import require
from rankwise.methods.omega import OmegaLoRA, check_finite, without_dead
from rankwise.optim import project
from rankwise.ranks import RankPlan, ranks, sites
from rankwise.ranks.sites import omega
from rankwise.runs.search import Search


@dataclass(frozen=True)
class WeightLoRA(OmegaLoRA, name="weight-lora"):
    """LoRA with a weight per site, of which the k largest stay; the other sites are removed.

    Attributes:
        keep: k, how many sites stay.
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
        check_finite(weights, step)
        if step >= self.start and lr > 0:
            weights.copy_(project.top_k(weights, self.keep))
        if step != self.every:
            return None
        all_sites, values = sites(model), weights.tolist()
        left = without_dead(values, all_sites)
        gone = {site.name: 0 for site, value in zip(all_sites, left, strict=True) if value == 0}
        return RankPlan(gone, fold=self.omega_rate is None, moved=self._moved(values))

    def budget(self, model: nn.Module) -> int:
        """What the k most expensive sites cost."""
        return sum(sorted((site.parameters for site in sites(model)), reverse=True)[: self.keep])

    def final(self, model: nn.Module) -> int | None:
        return (super().final(model) or 0) - super().budget(model) + self.budget(model)

    def _moved(self, weights: Sequence[float]) -> float:
        return max((abs(value - 1) for value in weights if value), default=0.0)

    def _advice(self, model: nn.Module, search: Search) -> str:
        if not search.changed:
            return f"keep fewer than {search.sites} sites" if self.keep >= search.sites else self._farther
        values = list((self.weights(model) or ranks(model)).values())
        if any(values[: self.keep]) and not any(values[self.keep :]):
            return "those that stayed come first in the model, as ties are decided while B is 0: raise start"
        return ""

    @property
    def check_every(self) -> int:
        return self.every

    @property
    def search_steps(self) -> int:
        return self.every


def check_keep(keep: int, model: nn.Module) -> None:
    """Raise InputError where more sites are to stay than there are."""
    count = len(sites(model))
    require(keep <= count, f"keep {keep} is more than the {count} sites there are: keep fewer, or name more targets")
