"""ω and gates are put on A for a search; `fold` takes them away after it."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankwise.ranks.replace import replace
from rankwise.ranks.sites import OMEGA, Gates, Omega, Scale, Site, adapted, sites


def put_scale(site: Site, scale: Scale) -> None:
    """Parametrize A. The stored A stays the Parameter it was."""
    linear: Any = site.layer.lora_A[site.adapter]
    A = linear.weight
    parametrize.register_parametrization(linear, "weight", scale, unsafe=True)
    # torch copied A into a Parameter of its own; the optimizers know the first one.
    linear.parametrizations.weight.register_parameter("original", A)


def omega_of(model: PeftModel, site: Site, index: int) -> Omega:
    """The scale of `site`, the entry `index` of ω."""
    return Omega(getattr(model.base_model, OMEGA), site.adapter, index)


@torch.no_grad()
def copy_scale(site: Site, adapter: str) -> None:
    """Give another adapter on the layer of `site` the scale that it has, as it is now; it does not train."""
    scale = site.scale
    if isinstance(scale, Gates):
        made: Scale = Gates(scale.gates.detach().clone())
    elif isinstance(scale, Omega):
        omegas, own, index = scale.source
        if adapter not in omegas:
            omegas[adapter] = omegas[own].detach().clone()
        made = Omega(omegas, adapter, index)
        omegas[adapter].requires_grad_(False)
    else:
        return
    put_scale(Site(site.name, site.layer, adapter), made.requires_grad_(False))


@torch.no_grad()
def add_gates(model: nn.Module, draw: Callable[[int], Tensor]) -> None:
    """Give every site gates; `draw` makes those of a site, shape (r,), from its rank."""
    for site in sites(adapted(model)):
        if site.present:
            put_scale(site, Gates(draw(site.rank).to(site.B)))


def add_omega(model: nn.Module) -> nn.Parameter:
    """Give every site a scale ω_i = 1, entries of one (n,) fp32 parameter that the model owns."""
    peft = adapted(model)
    here = sites(peft)
    if not hasattr(peft.base_model, OMEGA):
        setattr(peft.base_model, OMEGA, nn.ParameterDict())
    omegas = getattr(peft.base_model, OMEGA)
    device = next(s.B.device for s in here if s.present)
    replace(peft, omegas, peft.active_adapter, torch.ones(len(here), device=device), group="omega")
    omegas._keys[peft.active_adapter] = None
    for index, site in enumerate(here):
        if site.present:
            put_scale(site, omega_of(peft, site, index))
    return omegas[peft.active_adapter]
