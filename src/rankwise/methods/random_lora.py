"""Random choice (Shalygin, Davydenko, Veprikov, MIPT 2025): k of n sites at random, the control for WeightLoRA.

The authors call it RandLoRA, the name of another method in PEFT (Albert et al. 2025, arXiv 2502.00987).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from rankwise.methods.lora import LoRA
from rankwise.methods.weight_lora import check_keep
from rankwise.ranks import RankPlan, sites


@dataclass(frozen=True)
class RandomLoRA(LoRA, name="random-lora"):
    """LoRA on k of the target sites, chosen at random with the run's seed.

    Attributes:
        keep: k, how many sites have an adapter.
    """

    keep: Annotated[int, Field(ge=1)] = 10

    keeps_ranks = False

    def first_plan(self, model: nn.Module) -> RankPlan:
        check_keep(self.keep, model)
        all_sites = sites(model)
        left_out = torch.randperm(len(all_sites), device="cpu")[self.keep :].tolist()
        return RankPlan({all_sites[index].name: 0 for index in left_out})

    def peak(self, model: nn.Module) -> int:
        """That of the k most expensive sites, since the choice depends on the seed."""
        all_sites = sites(model)
        most = self.rank * sum(sorted((site.cost for site in all_sites), reverse=True)[: self.keep])
        return super().peak(model) - sum(site.parameters for site in all_sites) + most
