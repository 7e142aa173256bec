"""Squeeze: train at a high rank, cut to the budget where units of rank are worth least, and train on.

    1. LoRA of rank R at each of n sites
    2. K times, every T steps: cut to what the budget is by then, with Adam's moments carried along
    3. go on as LoRA with the ranks that are left

After cut k the parameters in A and B are at most R (r̄ / R)^(k / K) Σ_i c_i, with c_i = in + out: r̄ units of rank per
site at the end, which may be far below one. By default a unit is worth its squared singular value of s B A, and the
units that are worth most within the budget stay (`ranks/knapsack.py`).

To train wide and compress is LoRA-Squeeze (arXiv 2602.10993), which cuts every site to the same rank, and does best
with several cuts; one threshold for the singular values of all sites is PARA (arXiv 2604.27796), which cuts after
training. The other scores are controls: a choice that is no better than its own permutation has found nothing about
which of the layers of one size matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from rankwise.errors import require
from rankwise.methods.lora import LoRA
from rankwise.methods.omega import OmegaLoRA
from rankwise.methods.spaced_lora import affordable, check_mean
from rankwise.optim import project
from rankwise.ranks import RankPlan, Site, rank_report, sites
from rankwise.ranks.allocate import alike, at_random, evenly, shuffled
from rankwise.ranks.knapsack import most_within
from rankwise.ranks.scales import Omega, trained_scales
from rankwise.ranks.sites import kind, omega
from rankwise.ranks.spectrum import gains
from rankwise.runs.search import Search

Score = Literal["spectrum", "omega", "permuted", "type", "uniform", "random"]


@dataclass(frozen=True)
class Squeeze(OmegaLoRA, name="squeeze"):
    """LoRA that trains at a high rank, is cut to a budget over all sites, and trains on at the ranks that are left.

    Attributes:
        rank: R, of every site at the start.
        mean_rank: r̄, the units of rank per site after the last cut, weighted by what they cost; below 1, some sites
            are left without.
        every: T, steps before the first cut and between two cuts. With the steps of the training, the cut is its end.
        times: K, the number of cuts; the budget falls from R to r̄ by the same factor at each.
        score: what a unit is worth. `spectrum`: its squared singular value of s B A. `omega`: the same of s ω B A, with
            weights ω on a simplex until the last cut, as in simplex-lora. Controls: `permuted`, as if the singular
            values of each site were those of another one of the same size; `type`, the mean over sites of the same
            name in all blocks, within which rank is spread evenly; `uniform`, spread evenly over all; `random`.
        moments: Adam's moments of changed sites: `keep` them (transformed like the factors), or `reset` them.
    """

    mean_rank: Annotated[float, Field(gt=0)] = 1.0
    every: Annotated[int, Field(ge=1)] = 30
    times: Annotated[int, Field(ge=1)] = 1
    score: Score = "spectrum"
    moments: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mean(self.mean_rank, self.rank)
        alone = self.omega_rate is None or self.score == "omega"
        require(alone, f"omega_rate is for score omega, and the score is {self.score}: leave one of them out")

    def sized(self, size: int) -> "Squeeze":
        return replace(self, rank=size, mean_rank=min(self.mean_rank, size))

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        model = LoRA.attach(self, model, head)
        if self.score == "omega":
            Omega.put_on(model)
        self.budget(model)  # refuses one that is too small
        return model

    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None:
        weights = omega(model)
        if weights is not None:
            project.check_finite(weights, "ω is", "omega_rate", step, due=step % self.every == 0)
            if lr > 0:
                with torch.no_grad():
                    weights.copy_(project.simplex(weights, len(weights)))
        if step % self.every or step > self.search_steps:
            return None
        all_sites = sites(model)
        for factor in (each for site in all_sites if site.present for each in (site.A, site.B)):
            project.check_finite(factor, "factors are", "", step, due=True)
        new = self._ranks(all_sites, self._within(all_sites, step // self.every), step)
        return RankPlan(
            dict(zip([site.name for site in all_sites], new, strict=True)),
            moments=self.moments,
            fold=step == self.search_steps,
            moved=None if weights is None else self._moved(weights.tolist()),
        )

    def _within(self, all_sites: Sequence[Site], cut: int) -> int:
        """The most parameters in A and B after so many cuts."""
        return affordable(all_sites, self.rank * (self.mean_rank / self.rank) ** (cut / self.times))

    def _ranks(self, all_sites: Sequence[Site], budget: int, step: int) -> list[int]:
        """New ranks of all sites, none above what it has."""
        costs, kinds = [site.cost for site in all_sites], [kind(site.name) for site in all_sites]
        room = [0 if site.dead else site.rank for site in all_sites]
        # The same in all processes, whose streams may differ by now, and after a restart.
        draws = np.random.default_rng([torch.initial_seed(), step])
        if self.score == "uniform":
            return evenly(kinds, costs, room, budget)
        if self.score == "random":
            return at_random(costs, room, budget, draws)
        worth = [gains(site) for site in all_sites]
        if not any(each.any() for each in worth):  # nothing has been learnt yet
            return evenly(kinds, costs, room, budget)
        if self.score == "permuted":
            shapes = [(site.in_features, site.out_features, site.rank, site.dead) for site in all_sites]
            worth = [worth[i] for i in shuffled(shapes, draws)]
        if self.score != "type":
            return most_within(worth, costs, budget)
        types = alike([(each, site.cost) for each, site in zip(kinds, all_sites, strict=True)])
        for places in types:
            mean = np.mean([np.pad(worth[i], (0, self.rank - len(worth[i]))) for i in places], axis=0)
            for i in places:
                worth[i] = mean[: room[i]]
        chosen = most_within(worth, costs, budget)
        for places in types:
            spent = sum(chosen[i] * costs[i] for i in places)
            shared = evenly([""] * len(places), [costs[i] for i in places], [room[i] for i in places], spent)
            for i, rank in zip(places, shared, strict=True):
                chosen[i] = rank
        return chosen

    def budget(self, model: nn.Module) -> int:
        return self._within(sites(model), self.times)

    def final(self, model: nn.Module) -> int | None:
        scales = sum(p.numel() for p in trained_scales(model))
        return (super().final(model) or 0) - scales - super().budget(model) + self.budget(model)

    def _moved(self, weights: Sequence[float]) -> float:
        return max(abs(value - 1) for value in weights)

    def _advice(self, model: nn.Module, search: Search) -> str:
        if rank_report(model).total <= self.budget(model):
            return ""
        return f"the last cut is due after step {self.search_steps}: train longer"

    @property
    def check_every(self) -> int:
        return self.every

    @property
    def search_steps(self) -> int:
        return self.every * self.times
