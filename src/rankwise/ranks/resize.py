"""Changing ranks as a RankPlan asks, in the model, in PEFT's configuration and in the optimizers.

The change of rank minimises ‖B_old A_old − B_new A_new‖_F (SimplexLoRA; Eckart–Young): QR of B and of Aᵀ, SVD of the
r×r core in fp64. The out×in product is never formed. PEFT 0.21 is driven through its public dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.errors import InputError, nearest
from rankwise.ranks.fold import fold, kept_units
from rankwise.ranks.kept import MergedProduct, merge_into_weight, peft_residual_start, start_of
from rankwise.ranks.layers import check_own_weight
from rankwise.ranks.peft_records import record
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.replace import Carry, follow, remove_factors, replace, set_rank, sort_groups
from rankwise.ranks.scales import KINDS
from rankwise.ranks.sites import Site, peft_model, sites, why_no_site

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def truncate(A: Tensor, B: Tensor, rank: int, maps: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best factors of rank `rank` ≤ r for the product of A (r, in) and B (out, r).

    The split is A' = Vᵀ Q_Aᵀ, B' = Q_B U S: with the balanced √S split both factors, and all gradients, would be 0
    where BA = 0.

    Returns:
        A' (rank, in), B' (out, rank), and the maps L (rank, r), R (r, rank) with A' = L A and B' = B R, empty without
        `maps`, which take as long as the rest.
    """
    QB, RB = torch.linalg.qr(B.double())
    QA, RA = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(RB @ RA.T)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    L = R = RA[:0]
    if maps:
        L, R = Vh @ torch.linalg.pinv(RA).T, torch.linalg.pinv(RB) @ (U * S)
    return (Vh @ QA.T).to(A.dtype), ((QB @ U) * S).to(B.dtype), L.to(A.dtype), R.to(B.dtype)


@torch.no_grad()
def extend(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of rank `rank` ≥ r with the same product, bit for bit, as A (r, in) and B (out, r).

    A gains orthonormal rows that are orthogonal to its own, B gains zeros.
    """
    more = rank - A.shape[0]
    basis = torch.linalg.qr(A.double().T)[0]  # (in, r)
    rows = torch.randn(A.shape[1], more, dtype=torch.float64).to(A.device)  # on the CPU, whose stream checkpoints keep
    for _ in range(2):  # the second pass removes what rounding left of A's row space
        rows = torch.linalg.qr(rows - basis @ (basis.T @ rows))[0]
    return torch.cat([A, rows.T.to(A.dtype)]), torch.cat([B, B.new_zeros(B.shape[0], more)], dim=1)


def fresh_A(rank: int, like: Tensor, in_features: int) -> Tensor:
    """A as at the start of LoRA (Kaiming uniform with a = √5, PEFT's default), shape (rank, in)."""
    A = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=sqrt(5))
    return A.to(device=like.device, dtype=like.dtype)


def resize(model: nn.Module, plan: Mapping[str, int], optimizer: Optimizer | None = None) -> dict[str, int]:
    """Give the sites of `plan` their new ranks, in the model, in PEFT's configuration and in the optimizers.

    The scale s = alpha / r0 of a site stays, so its alpha becomes s·r. Sites whose rank does not change keep their
    factors and moments.

    Args:
        model: a model with LoRA adapters, from rankwise or from PEFT alone.
        plan: a RankPlan, or a dict of site name -> rank.
        optimizer: an optimizer that does not follow `model` yet; SimplexAdam does by itself.
    Returns:
        The ranks that changed.
    Raises:
        InputError: an unknown site, a rank below 0 or above min(in, out), a plan that empties every site, a site that
            is merged into its base weight (`merge_adapter`), has gates that the plan does not fold or a residual start
            by PEFT, a layer that is not plain LoRA, or one that cannot be emptied. The model is then unchanged.
    """
    peft = peft_model(model)
    plan = plan if isinstance(plan, RankPlan) else RankPlan(plan)
    kind = next(peft.parameters()).device.type
    # A step may be taken within autocast, which would turn moments that are kept into bf16.
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return _resize(peft, plan, optimizer)


def _resize(peft: PeftModel, plan: RankPlan, optimizer: Optimizer | None) -> dict[str, int]:
    if optimizer is not None:
        follow(peft, optimizer)
    by_name = {site.name: site for site in sites(peft)}
    before = {name: site.rank for name, site in by_name.items()}
    _check(peft, by_name, plan)
    if plan.fold:
        fold(peft, plan.reset_scales)
    changed = {name: r for name, r in plan.items() if r != by_name[name].rank or (plan.restart and r > 0)}
    for name, rank in sorted(changed.items(), key=lambda change: change[1] == 0):  # `_refill` needs a present site
        site = by_name[name]
        if rank == 0:
            if plan.empty == "merge":
                A, B = site.layer.lora_A[site.adapter].weight, site.B  # A with its scale
                merge_into_weight(site, MergedProduct(A.detach().flatten(1).clone(), B.detach().flatten(1).clone()))
            if site.scale is not None:
                site.scale.leave(peft)
            remove_factors(peft, site)
        elif not site.present:
            _refill(peft, site, rank)
        else:
            _change(peft, site, rank, plan)
    if changed:
        sort_groups(peft)
        record(peft, by_name.values())
    return changed | {name: site.rank for name, site in by_name.items() if site.rank != before[name]}


def _check(model: PeftModel, by_name: dict[str, Site], plan: RankPlan) -> None:
    peft_start = peft_residual_start(model, model.active_adapter)
    current = {name: site.rank for name, site in by_name.items()}
    if plan.fold:
        current |= {name: len(units) for name, units in kept_units(by_name.values()).items()}
    for name, rank in plan.items():
        if name not in by_name:
            if why := why_no_site(model, name):
                raise InputError(f"{name} {why}, so its rank cannot change: leave it out of the plan")
            raise InputError(
                f"the plan names {name!r}, which is no adapted layer of this model{nearest(name, by_name)}"
            )
        site = by_name[name]
        limit = max(site.limit, site.rank)  # an adapter from another tool may have more rank than it can use
        if not 0 <= rank <= limit:
            raise InputError(f"rank {rank} does not fit {name}: it must be 0 to {limit}")
        if rank != current[name] or plan.restart:
            if peft_start:
                raise InputError(
                    f"{name} started with PEFT's {peft_start}, subtracted from W at rank {site.rank}, which must stay: "
                    "turn the adapter into plain LoRA first (save_pretrained with "
                    "path_initial_model_for_weight_conversion)"
                )
            if site.scale is not None and site.scale.sets_rank and not plan.fold:
                raise InputError(f"{name} has gates, which set its rank: fold the model first (method.fold(model))")
            if site.adapter in site.layer.merged_adapters:
                raise InputError(f"{name} is merged into its base weight: call unmerge_adapter() before a rank change")
            if rank == 0 and site.present:
                _check_emptying(model, site, plan.empty)
    if by_name and not any({**current, **plan}.values()):
        raise InputError("the plan gives every site rank 0, and PEFT can neither train nor save that: keep rank in one")


def _check_emptying(model: PeftModel, site: Site, how: str) -> None:
    if site.adapter in site.layer.lora_variant or site.layer.lora_B[site.adapter].bias is not None:
        raise InputError(
            f"{site.name} has more than A and B (lora_bias, DoRA or another variant), so its rank cannot become 0"
        )
    start = start_of(site)
    if start is not None and start.A is not None:
        raise InputError(f"{site.name} has a residual start, subtracted from W, so its rank cannot become 0")
    if how == "merge":
        check_own_weight(model.get_base_model(), f"{site.name}.base_layer")


def _change(model: PeftModel, site: Site, rank: int, plan: RankPlan) -> None:
    A, B = site.A.detach().flatten(1), site.B.detach().flatten(1)
    r = site.rank
    carry_A: Carry | None = None
    carry_B: Carry | None = None
    if plan.restart or plan.change == "reinit":
        new_A, new_B = fresh_A(rank, A, site.in_features), B.new_zeros(site.out_features, rank)
    elif rank > r:
        new_A, new_B = extend(A, B, rank)
        carry_A = lambda m, _: torch.cat([m, m.new_zeros(rank - r, m.shape[1])])  # noqa: E731
        carry_B = lambda m, _: torch.cat([m, m.new_zeros(m.shape[0], rank - r)], dim=1)  # noqa: E731
    else:
        new_A, new_B, L, R = truncate(A, B, rank, maps=plan.moments == "keep")
        # ∂L/∂A' = Rᵀ ∂L/∂A and ∂L/∂B' = ∂L/∂B Lᵀ; the second moments follow with squared entries, as if independent.
        carry_A = lambda m, second: (R.square() if second else R).T @ m  # noqa: E731
        carry_B = lambda m, second: m @ (L.square() if second else L).T  # noqa: E731
    if plan.moments == "reset":
        carry_A = carry_B = None
    replace(model, *site.A_owner, new_A, carry=carry_A)
    replace(model, *site.B_owner, new_B, carry=carry_B)
    set_rank(site, rank)


def _refill(model: PeftModel, site: Site, rank: int) -> None:
    layer, adapter = site.layer, site.adapter
    config: Any = model.peft_config[adapter]
    scaling = layer.lora_empty.pop(adapter)
    weight = layer.get_base_layer().weight
    other = next(s for s in sites(model) if s.present)  # for the dtype (PEFT's adapters are fp32) and what trains
    like = torch.empty(0, device=weight.device, dtype=other.B.dtype)
    A, B = site.base.factors(rank)
    shape_A, shape_B = A.weight.shape, B.weight.shape
    A._parameters["weight"] = B._parameters["weight"] = None
    layer.lora_A[adapter], layer.lora_B[adapter] = A, B
    dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
    layer.lora_dropout[adapter] = dropout.train(layer.training)
    layer.scaling[adapter] = scaling
    fresh = fresh_A(rank, like, site.in_features).reshape(shape_A)
    replace(model, A, "weight", fresh, trains=other.A.requires_grad)
    replace(model, B, "weight", torch.zeros(shape_B).to(like), trains=other.B.requires_grad)
    set_rank(site, rank)
    for kind in KINDS:
        kind.put_on_refilled(model, site)
