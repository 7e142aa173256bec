"""LoRA with a small number of units of rank spread evenly: the plain way to spend less than one unit per layer.

With the sites in order of their kind and then of their depth, every k-th gets a unit, so that each kind of layer has
its share. It is the control for whatever claims to know which sites matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field
from torch import nn

from rankwise.errors import require
from rankwise.methods.lora import LoRA
from rankwise.ranks import RankPlan, Site, sites
from rankwise.ranks.allocate import evenly
from rankwise.ranks.sites import kind


@dataclass(frozen=True)
class SpacedLoRA(LoRA, name="spaced-lora"):
    """LoRA whose units of rank are spread evenly over the sites, down to less than one unit for each.

    Attributes:
        rank: r0, the largest rank of a site; the product BA is scaled by s = α / r0, whatever rank a site gets.
        mean_rank: r̄, the units of rank per site, weighted by what they cost; below 1, some sites are left without.
    """

    mean_rank: Annotated[float, Field(gt=0)] = 0.25

    sizes = ("rank", "mean_rank")
    keeps_ranks = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mean(self.mean_rank, self.rank)

    def sized(self, size: int) -> "SpacedLoRA":
        return replace(self, rank=size, mean_rank=size)

    def first_plan(self, model: nn.Module) -> RankPlan:
        all_sites = sites(model)
        budget = affordable(all_sites, self.mean_rank)
        kinds, costs = [kind(site.name) for site in all_sites], [site.cost for site in all_sites]
        ranks = evenly(kinds, costs, [self.rank] * len(all_sites), budget)
        return RankPlan(dict(zip([site.name for site in all_sites], ranks, strict=True)), change="reinit")


def check_mean(mean_rank: float, rank: int) -> None:
    """Raise InputError if the mean rank is above the rank of every site."""
    require(mean_rank <= rank, f"mean_rank must be at most {rank} (rank), not {mean_rank:g}")


def affordable(all_sites: Sequence[Site], mean_rank: float) -> int:
    """The parameters of `mean_rank` units of rank per site.

    Raises:
        InputError: they are fewer than a unit of some site costs.
    """
    dearest, total = max(site.cost for site in all_sites), sum(site.cost for site in all_sites)
    budget = int(mean_rank * total * (1 + 1e-12))  # 0.29 · 100 is 29
    require(
        budget >= dearest,
        f"mean_rank {mean_rank:g} leaves {budget:,} parameters, but a unit of rank costs up to {dearest:,}: "
        f"raise it to {dearest / total:.2g} or more",
    )
    return budget
