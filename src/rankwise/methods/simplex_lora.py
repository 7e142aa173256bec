"""SimplexLoRA (Shalygin, Davydenko, Veprikov, MIPT 2025; slides of 6 May 2025 and abstract): ranks from a simplex.

h = W x + b + s ω_i B A x for each of n sites, with ω on the simplex {ω ≥ 0, Σω = n}.

    0. every rank r0, every ω_i = 1
    1. after each optimizer step project ω onto the simplex (ω by SGD at its own rate; by default on its own clock)
    2. every T steps turn ω into integer ranks, r_i = ⌊ω_i r0⌋, and resize by QR + SVD
    3. K times
    4. fold ω into B and go on as plain LoRA

The authors' published code differs: it rounds up (`rounding: ceil`), which overspends; changed sites start again
(`change: reinit`); the product of an emptied site is added to W (`empty: merge`); the projection may be a softmax. Our
defaults spend at most the parameters of uniform r0 (`rounding: budget`) and keep what was learnt (`svd`).

∂L/∂ω_i = ⟨∂L/∂ΔW_i, s B_i A_i⟩ is 0 while B = 0, and small while B is small. This explains the authors' large rate of
ω, our clock, which depends less on the size of a gradient than on its sign, and a T that leaves B time to grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from rankwise.methods.omega import OmegaLoRA, without_dead
from rankwise.optim import project
from rankwise.ranks import RankPlan, Site, allocate, sites
from rankwise.ranks.allocate import Rounding, alike, may_exceed, shuffled
from rankwise.ranks.layers import check_own_weight
from rankwise.ranks.sites import kind, omega, peft_model
from rankwise.runs.search import Search

Score = Literal["omega", "permuted", "type"]


@dataclass(frozen=True)
class SimplexLoRA(OmegaLoRA, name="simplex-lora"):
    """LoRA whose ranks follow weights ω on a simplex.

    Attributes:
        every: T, steps between two rank changes.
        times: K, the number of rank changes.
        rounding: `budget` (never over the parameters of uniform `rank`), `floor` (slides) or `ceil` (authors' code).
        change: `svd` keeps the best approximation of BA at the new rank, `reinit` starts changed sites again.
        empty: `drop` the product of a site whose rank becomes 0, or `merge` it into W.
        finish: after the search, `continue` with its factors, or `restart` with new ones at its ranks; RankTrainer then
            restarts the schedule too (in other loops the schedule is up to you).
        moments: Adam's moments of changed sites: `reset` them, or `keep` them (transformed like the factors).
        rewarm: steps of linear warm-up of all rates after each rank change.
        projection: `simplex` (Euclidean), `softmax` or `rank-softmax` (softmax weighted by the current ranks). The last
            two are not projections: they enlarge any difference at each step, even without a gradient.
        score: what decides the rank of a site. `omega`: its own ω. Controls, with ω in the layers as it is:
            `permuted`, ω shuffled once among the sites of each size; `type`, the mean over the sites of the same name
            in all blocks.
        omega_decay: pulls ω towards 1: ω ← ω − η·decay·(ω − 1) before the projection, with η the rate or clock of ω.
    """

    every: Annotated[int, Field(ge=1)] = 10
    times: Annotated[int, Field(ge=1)] = 3
    rounding: Rounding = "budget"
    change: Literal["svd", "reinit"] = "svd"
    empty: Literal["drop", "merge"] = "drop"
    finish: Literal["continue", "restart"] = "continue"
    moments: Literal["reset", "keep"] = "reset"
    rewarm: Annotated[int, Field(ge=0)] = 0
    projection: Literal["simplex", "softmax", "rank-softmax"] = "simplex"
    score: Score = "omega"
    omega_decay: Annotated[float, Field(ge=0)] = 0.0

    moving = ("ω", "ranks")
    resets: ClassVar[bool] = False
    """Whether ω is set to 1 at the end of the search instead of folded."""

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        model = super().attach(model, head)
        for site in sites(model) if self.empty == "merge" else ():
            check_own_weight(peft_model(model).get_base_model(), f"{site.name}.base_layer")
        return model

    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None:
        weights = omega(model)
        if weights is None:  # the search is over
            return None
        project.check_finite(weights, "ω is", "omega_rate", step, due=step % self.every == 0)
        if lr > 0:
            with torch.no_grad():
                weights.sub_(lr * self.omega_decay * (weights - 1))
                weights.copy_(self._project(weights, model))
        if step % self.every:
            return None
        all_sites = sites(model)
        new = allocate(
            without_dead(self._scores(weights.tolist(), all_sites), all_sites),
            [s.cost for s in all_sites],
            [s.limit for s in all_sites],
            rank=self.rank,
            rounding=self.rounding,
        )
        last = step >= self.search_steps
        return RankPlan(
            dict(zip([s.name for s in all_sites], new, strict=True)),
            change=self.change,
            empty=self.empty,
            moments=self.moments,
            restart=last and self.finish == "restart",
            fold=last,
            reset_scales=last and self.resets,
            moved=self._moved(weights.tolist()),
        )

    def _scores(self, weights: list[float], all_sites: Sequence[Site]) -> list[float]:
        """What stands for ω where ranks are decided; its sum is that of ω."""
        if self.score == "permuted":  # alike at each change, in all processes, and after a restart
            shapes = [(site.in_features, site.out_features, site.dead) for site in all_sites]
            return [weights[i] for i in shuffled(shapes, np.random.default_rng([torch.initial_seed()]))]
        if self.score == "type":
            scores = list(weights)
            for places in alike([(kind(site.name), site.cost, site.dead) for site in all_sites]):
                for i in places:
                    scores[i] = fmean(weights[j] for j in places)
            return scores
        return weights

    def _project(self, weights: Tensor, model: nn.Module) -> Tensor:
        n = len(weights)
        if self.projection == "simplex":
            return project.simplex(weights, n)
        if self.projection == "softmax":
            return project.softmax(weights, n)
        ranks = torch.tensor([s.rank for s in sites(model)], dtype=weights.dtype)
        return project.softmax(weights, n, ranks.to(weights.device, non_blocking=True))

    def final(self, model: nn.Module) -> int | None:
        if may_exceed(self.rounding, [site.cost for site in sites(model)]):
            return None
        return (super().final(model) or 0) - len(sites(model))

    def _moved(self, weights: Sequence[float]) -> float:
        return self.rank * max(abs(value - 1) for value in weights)

    def _advice(self, model: nn.Module, search: Search) -> str:
        if search.changed or search.moved is None:
            return ""
        # With all quotas ω_i r0 within half a rank of r0, those below r0 have the largest remainders.
        if self.rounding == "budget" and len({site.cost for site in sites(model)}) == 1 and search.moved < 0.5:
            return f"a rank changes only where ω moves by half a rank or more: {self._move_more}"
        return self._move_more

    @property
    def check_every(self) -> int:
        return self.every

    @property
    def search_steps(self) -> int:
        return self.every * self.times

    @property
    def rewarm_steps(self) -> int:
        return self.rewarm

    @property
    def restart_step(self) -> int | None:
        return self.search_steps if self.finish == "restart" else None
