"""Folding at the end of a search: scales move into the factors, and plain LoRA is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankwise.ranks.peft_records import record
from rankwise.ranks.replace import remove_factors, replace, set_rank, sort_groups
from rankwise.ranks.scales import trained_scales
from rankwise.ranks.sites import Site, peft_model, sites

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def fold(model: nn.Module, reset_scales: bool = False) -> None:
    """Move every scale into its B and remove it: plain LoRA with the same outputs. Without scales nothing happens.

    Units of rank whose gate is 0 are cut, and a site with no other units is emptied. If no site has a live unit, the
    first one keeps a unit whose product is 0, since PEFT has no adapters without layers.

    Args:
        reset_scales: set every scale to 1 first, which changes outputs.
    """
    peft = peft_model(model)
    scaled = {site: scale for site in sites(peft) if (scale := site.scale) is not None}
    for parameter in trained_scales(peft) if reset_scales else ():
        parameter.fill_(1.0)
    kept = kept_units(scaled)
    for site in scaled:
        _fold_one(peft, site, kept[site.name])
    for scale in scaled.values():
        scale.remove_parameter(peft)
    if scaled:
        sort_groups(peft)
        record(peft, sites(peft))


def kept_units(chosen: Iterable[Site]) -> dict[str, Tensor]:
    """The indices of the units that a fold keeps, by the name of each site with rank."""
    kept = {
        site.name: torch.arange(site.rank, device=site.B.device) if site.scale is None else site.scale.units(site)
        for site in chosen
        if site.present
    }
    if kept and not any(map(len, kept.values())):
        first = next(iter(kept))
        kept[first] = kept[first].new_zeros(1)
    return kept


def _fold_one(model: PeftModel, site: Site, units: Tensor) -> None:
    """B' = B diag(g) or ωB, so ∂L/∂B' = ∂L/∂B / g: moments of B are divided too; A's gradient and moments are kept."""
    scale, linear, A = site.scale, site.layer.lora_A[site.adapter], site.A
    assert scale is not None
    values = scale.value.detach().to(site.B.dtype).expand(site.rank, 1).T[:, units]  # (1, units)

    def carry(moment: Tensor, second: bool) -> Tensor:
        return moment[:, units] / (values.square() if second else values)

    _bare(linear, A)
    if not len(units):
        remove_factors(model, site)
        return
    B = site.B.detach().flatten(1)[:, units] * values
    replace(model, *site.B_owner, B, carry=carry if values.abs().min() > 1e-6 else None)
    if len(units) < site.rank:
        replace(model, *site.A_owner, A.detach().flatten(1)[units], carry=lambda moment, _: moment[units])
        set_rank(site, len(units))


def _bare(linear: nn.Module, A: nn.Parameter) -> None:
    """Remove the parametrization and keep the Parameter that is in the optimizers.

    torch's own function also removes `weight` from the class that it made for `linear`, which deep copies share.
    """
    linear.__class__ = type(linear).__bases__[0]
    del linear.parametrizations
    linear.register_parameter("weight", A)
