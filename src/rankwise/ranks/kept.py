"""What W or the loss must remember: products that were added to W, and starts that were taken out of it."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.ranks.sites import Site, sites

RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How PEFT's names of starts begin that take something out of W. Loading does so again, at the rank of the file."""


class Merged(nn.Module):
    """The factors of a site that was emptied into W: A (r, in) with its scale, B (out, r). A checkpoint keeps them."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)


@torch.no_grad()
def merge(site: Site, factors: Merged) -> None:
    """Add s·BA to W, and remember the factors under the layer, since no adapter file holds W."""
    _add_product(site, factors.A, factors.B, 1)
    if not hasattr(site.layer, "lora_merged"):
        site.layer.lora_merged = nn.ModuleDict()
    if site.adapter not in site.layer.lora_merged:
        site.layer.lora_merged[site.adapter] = nn.ModuleList()
    site.layer.lora_merged[site.adapter].append(factors)


def _add_product(site: Site, A: Tensor, B: Tensor, sign: int) -> None:
    weight = site.layer.get_base_layer().weight
    delta = sign * site.scaling * (B @ A)
    weight += (delta.T if isinstance(site.layer.get_base_layer(), Conv1D) else delta.reshape(weight.shape)).to(weight)


def merged_into(site: Site) -> list[Any]:
    """The factors that were merged into the site's weight, the first ones first."""
    kept = getattr(site.layer, "lora_merged", {})
    return list(kept[site.adapter]) if site.adapter in kept else []


@torch.no_grad()
def match_merged(site: Site, wanted: list[Merged]) -> None:
    """Take out of W what was merged since (up to rounding), and merge what is missing."""
    have = merged_into(site)
    same = 0
    for a, b in zip(have, wanted, strict=False):
        if not (torch.equal(a.A, b.A.to(a.A.device)) and torch.equal(a.B, b.B.to(a.B.device))):
            break
        same += 1
    for factors in reversed(have[same:]):
        _add_product(site, factors.A, factors.B, -1)
    if have:
        site.layer.lora_merged[site.adapter] = nn.ModuleList(have[:same])
    for factors in wanted[same:]:
        merge(site, factors.to(site.layer.get_base_layer().weight.device))


def merged(model: nn.Module) -> list[str]:
    """Names of the sites whose product was merged into the base weight."""
    return [s.name for s in sites(model) if merged_into(s)]


class Start(nn.Module):
    """B0 (out, r) of a site, and A0 (r, in) where s B0 A0 was taken out of W: a residual start. Checkpoints keep it.

    `by_peft` says that PEFT took it out, and does so again when it loads what it has written.
    """

    A: Tensor | None
    B: Tensor

    def __init__(self, A: Tensor | None, B: Tensor, by_peft: bool = False):
        super().__init__()
        self.by_peft = by_peft
        self.register_buffer("A", A)
        self.register_buffer("B", B)


def start(site: Site) -> Start | None:
    """How the site started, if that is remembered."""
    return dict(getattr(site.layer, "lora_start", {})).get(site.adapter)


def subtracted(model: PeftModel) -> list[str]:
    """The adapters, active or not, whose start was taken out of W."""
    found: dict[str, None] = {}
    for module in model.modules():
        for adapter, begun in getattr(module, "lora_start", {}).items():
            if begun.A is not None:
                found[adapter] = None
    return list(found)


def peft_residual_start(model: PeftModel, adapter: str) -> str:
    """PEFT's own start of `adapter`, where it took something out of W that the model does not remember; else empty."""
    begun = str(getattr(model.peft_config[adapter], "init_lora_weights", ""))
    return begun if begun.lower().startswith(RESIDUAL) and adapter not in subtracted(model) else ""


@torch.no_grad()
def set_start(model: nn.Module, site: Site, A: Tensor | None, B: Tensor, subtracted: bool = False) -> None:
    """Remember B as B0, and, where A is given, take s·BA out of W.

    Args:
        A: (r, in). B: (out, r).
        subtracted: somebody, such as PEFT's PiSSA, has taken it out of W already.
    """
    if A is not None and not subtracted:
        _add_product(site, A, B, -1)
    if not hasattr(site.layer, "lora_start"):
        site.layer.lora_start = nn.ModuleDict()
    site.layer.lora_start[site.adapter] = Start(
        None if A is None else A.detach().clone(), B.detach().clone(), subtracted
    )


@torch.no_grad()
def match_start(model: PeftModel, site: Site, A: Tensor | None, B: Tensor | None) -> None:
    """Give the site the start (A, B), or none, and W what follows (up to rounding, unless it is the same start)."""
    have = start(site)
    if have is not None and B is not None and _equal(have.A, A) and _equal(have.B, B):
        return
    if have is not None:
        if have.A is not None:
            _add_product(site, have.A, have.B, 1)
        del site.layer.lora_start[site.adapter]
    if B is not None:
        device = site.layer.get_base_layer().weight.device
        set_start(model, site, None if A is None else A.to(device), B.to(device))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b.to(a))
