"""Changes of W that checkpoints must keep: products that were added to it, and starts that were subtracted from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.ranks.sites import Site, sites

if TYPE_CHECKING:
    from peft import PeftModel

RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of `init_lora_weights` with which PEFT subtracts from W, and again on loading, at the rank in the file."""


class MergedProduct(nn.Module):
    """The factors of a site that was merged into W: A (r, in) with its scale, B (out, r). Checkpoints include them."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)


@torch.no_grad()
def merge_into_weight(site: Site, factors: MergedProduct) -> None:
    """Add s·BA to W, and keep the factors in the layer, since adapter files do not contain W."""
    _add_product(site, factors.A, factors.B, 1)
    if not hasattr(site.layer, "lora_merged"):
        site.layer.lora_merged = nn.ModuleDict()
    if site.adapter not in site.layer.lora_merged:
        site.layer.lora_merged[site.adapter] = nn.ModuleList()
    site.layer.lora_merged[site.adapter].append(factors)


def _add_product(site: Site, A: Tensor, B: Tensor, sign: int) -> None:
    site.base.add(sign * site.scaling * (B @ A))


def products_of(site: Site) -> list[Any]:
    """The factors that were merged into the site's weight, oldest first."""
    merged = getattr(site.layer, "lora_merged", {})
    return list(merged[site.adapter]) if site.adapter in merged else []


@torch.no_grad()
def restore_products(site: Site, wanted: list[MergedProduct]) -> None:
    """Subtract from W what was merged after `wanted` (up to rounding), and merge what is missing."""
    present = products_of(site)
    same = 0
    for a, b in zip(present, wanted, strict=False):
        if not (torch.equal(a.A, b.A.to(a.A.device)) and torch.equal(a.B, b.B.to(a.B.device))):
            break
        same += 1
    for factors in reversed(present[same:]):
        _add_product(site, factors.A, factors.B, -1)
    if present:
        site.layer.lora_merged[site.adapter] = nn.ModuleList(present[:same])
    for factors in wanted[same:]:
        merge_into_weight(site, factors.to(site.layer.get_base_layer().weight.device))


def merged_sites(model: nn.Module) -> list[str]:
    """Names of the sites whose product was merged into the base weight."""
    return [s.name for s in sites(model) if products_of(s)]


class StartFactors(nn.Module):
    """B0 (out, r) of a site, and A0 (r, in) if s B0 A0 was subtracted from W: a residual start. Checkpoints include it.

    With `by_peft`, PEFT has subtracted it and does so again when it loads the adapter.
    """

    A: Tensor | None
    B: Tensor

    def __init__(self, A: Tensor | None, B: Tensor, by_peft: bool = False):
        super().__init__()
        self.by_peft = by_peft
        self.register_buffer("A", A)
        self.register_buffer("B", B)


def start_of(site: Site) -> StartFactors | None:
    """The start of the site, if the model keeps it."""
    return dict(getattr(site.layer, "lora_start", {})).get(site.adapter)


def adapters_subtracted(model: PeftModel) -> list[str]:
    """The adapters, active or not, whose start was subtracted from W."""
    starts = [item for module in model.modules() for item in getattr(module, "lora_start", {}).items()]
    return list(dict.fromkeys(adapter for adapter, start in starts if start.A is not None))


def peft_residual_start(model: PeftModel, adapter: str) -> str:
    """PEFT's own start of `adapter` if it subtracted from W something that the model does not keep; else empty."""
    start = str(getattr(model.peft_config[adapter], "init_lora_weights", ""))
    return start if start.lower().startswith(RESIDUAL) and adapter not in adapters_subtracted(model) else ""


@torch.no_grad()
def keep_start(site: Site, A: Tensor | None, B: Tensor, subtracted: bool = False) -> None:
    """Keep B as B0, and, if A is given, keep A as A0 and subtract s·BA from W.

    Args:
        A: (r, in). B: (out, r).
        subtracted: PEFT (with its PiSSA) has already subtracted it.
    """
    if A is not None and not subtracted:
        _add_product(site, A, B, -1)
    if not hasattr(site.layer, "lora_start"):
        site.layer.lora_start = nn.ModuleDict()
    site.layer.lora_start[site.adapter] = StartFactors(
        None if A is None else A.detach().clone(), B.detach().clone(), subtracted
    )


@torch.no_grad()
def restore_start(site: Site, A: Tensor | None, B: Tensor | None) -> None:
    """Give the site the start (A, B), or none, and change W to match (up to rounding, unless the start is the same)."""
    current = start_of(site)
    if current is not None and B is not None and _equal(current.A, A) and _equal(current.B, B):
        return
    if current is not None:
        if current.A is not None:
            _add_product(site, current.A, current.B, 1)
        del site.layer.lora_start[site.adapter]
    if B is not None:
        device = site.layer.get_base_layer().weight.device
        keep_start(site, None if A is None else A.to(device), B.to(device))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b.to(a))
