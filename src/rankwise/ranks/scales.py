"""What multiplies A during a search: SimplexLoRA's ω, SoRA's gates g. A new scale is a new class here.

A scale is a parametrization of A: everything that reads `lora_A.weight`, such as PEFT's forward and merge, gets ω·A or
diag(g) A. All ω of a model are one (n,) parameter of the model, so an emptied site keeps its ω; gates belong to their
site. `fold` removes scales.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankwise.ranks.replace import followers, replace, sort_groups
from rankwise.ranks.sites import OMEGA_NAME, Site, peft_model, sites

if TYPE_CHECKING:
    from peft import PeftModel


class Scale(nn.Module):
    """Multiplies A, as a parametrization that does not change the stored A."""

    value: Tensor
    """Shape () or (r, 1)."""
    sets_rank: ClassVar[bool] = False
    """Whether it sets the rank of its site, which then cannot be changed before a fold."""

    def forward(self, A: Tensor) -> Tensor:
        return A * self.value.to(A.dtype).reshape(-1, *[1] * (A.dim() - 1))

    @property
    @abstractmethod
    def parameter(self) -> nn.Parameter:
        """The trainable parameter, which all sites may share."""

    def units(self, site: Site) -> Tensor:
        """Indices of the units of rank that add to the output, which a fold keeps; by default all."""
        return torch.arange(site.rank, device=site.B.device)

    def idle(self) -> bool:
        """Whether the whole site adds nothing, so that a saved adapter leaves it out."""
        return False

    def leave(self, model: nn.Module) -> None:
        """Called before its site is emptied: removes a parameter that belongs to this site alone."""
        self.remove_parameter(model)

    @classmethod
    def put_on_refilled(cls, model: PeftModel, site: Site) -> None:
        """Give a site that was empty its scale, if the sites of `model` have such scales; by default none get one."""

    @abstractmethod
    def copy_for(self, adapter: str) -> Scale:
        """A copy with the current value, for another adapter on the same layer."""

    @classmethod
    @abstractmethod
    def put_on(cls, model: nn.Module) -> None:
        """Give every site of `model` such a scale, of value 1."""

    @abstractmethod
    def remove_parameter(self, model: nn.Module) -> None:
        """Remove the parameter from `model` and from the optimizers, after the scale was removed from all sites."""

    @classmethod
    @abstractmethod
    def is_in(cls, state: Mapping[str, Tensor], prefix: str, model: PeftModel) -> bool:
        """Whether a state dict of `model`, whose names start with `prefix`, has such scales."""


class Omega(Scale):
    """One entry of ω, which scales a whole site."""

    def __init__(self, omegas: nn.ParameterDict, adapter: str, index: int):
        super().__init__()
        # In a tuple, so that torch does not register ω again under every site.
        self.source = (omegas, adapter, index)

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        """ω of this site, shape ()."""
        return self.parameter[self.source[2]]

    @property
    def parameter(self) -> nn.Parameter:
        """All ω, shape (n,)."""
        omegas, adapter, _ = self.source
        return omegas[adapter]

    def idle(self) -> bool:
        return not self.value.any()

    def leave(self, model: nn.Module) -> None:
        """ω of the site stays, in case the site gets rank again."""

    def copy_for(self, adapter: str) -> Omega:
        omegas, own, index = self.source
        if adapter not in omegas:
            omegas[adapter] = omegas[own].detach().clone()
        omegas[adapter].requires_grad_(False)
        return Omega(omegas, adapter, index)

    @classmethod
    def put_on(cls, model: nn.Module) -> None:
        """As for any scale: each is an entry of one (n,) fp32 parameter of the model."""
        peft = peft_model(model)
        all_sites = sites(peft)
        if not hasattr(peft.base_model, OMEGA_NAME):
            setattr(peft.base_model, OMEGA_NAME, nn.ParameterDict())
        omegas = getattr(peft.base_model, OMEGA_NAME)
        device = next(site.B.device for site in all_sites if site.present)
        replace(peft, omegas, peft.active_adapter, torch.ones(len(all_sites), device=device), scale=True)
        omegas._keys[peft.active_adapter] = None
        for index, site in enumerate(all_sites):
            if site.present:
                put_scale(site, cls(omegas, site.adapter, index))

    @classmethod
    def put_on_refilled(cls, model: PeftModel, site: Site) -> None:
        """Its own entry of ω, if the model has ω."""
        omegas: Any = getattr(model.base_model, OMEGA_NAME, {})
        if site.adapter in omegas:
            put_scale(site, cls(omegas, site.adapter, [s.name for s in sites(model)].index(site.name)))

    def remove_parameter(self, model: nn.Module) -> None:
        omegas, adapter, _ = self.source
        if adapter in omegas:
            replace(model, omegas, adapter, None)
            del omegas[adapter]

    @classmethod
    def is_in(cls, state: Mapping[str, Tensor], prefix: str, model: PeftModel) -> bool:
        return f"{prefix}base_model.{OMEGA_NAME}.{model.active_adapter}" in state


class Gates(Scale):
    """One gate per unit of rank (SoRA): g, a Parameter of shape (r, 1)."""

    sets_rank = True

    def __init__(self, gates: Tensor):
        super().__init__()
        self.gates = nn.Parameter(gates.reshape(-1, 1))

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self.gates

    @property
    def parameter(self) -> nn.Parameter:
        return self.gates

    def units(self, site: Site) -> Tensor:
        return super().units(site) if self.gates.is_meta else self.gates.flatten().nonzero().flatten()

    def copy_for(self, adapter: str) -> Gates:
        return Gates(self.gates.detach().clone())

    @classmethod
    @torch.no_grad()
    def put_on(cls, model: nn.Module, draw: Callable[[int], Tensor] = torch.ones) -> None:
        """As for any scale, but `draw` gives the gates of a site, shape (r,), from its rank."""
        for site in sites(model):
            if site.present:
                scale = cls(draw(site.rank).to(site.B))
                gates, scale.gates = scale.gates, None  # type: ignore[assignment]  # replace adds it to optimizers too
                replace(model, scale, "gates", gates, scale=True)
                put_scale(site, scale)
        sort_groups(model)

    def remove_parameter(self, model: nn.Module) -> None:
        replace(model, self, "gates", None)

    @classmethod
    def is_in(cls, state: Mapping[str, Tensor], prefix: str, model: PeftModel) -> bool:
        end = f"lora_A.{model.active_adapter}.parametrizations.weight.0.gates"
        return any(f"{prefix}base_model.model.{site.name}.{end}" in state for site in sites(model))


KINDS: tuple[type[Scale], ...] = (Omega, Gates)


def put_scale(site: Site, scale: Scale) -> None:
    """Parametrize A, and keep its Parameter."""
    linear: Any = site.layer.lora_A[site.adapter]
    A = linear.weight
    parametrize.register_parametrization(linear, "weight", scale, unsafe=True)
    # torch copied A into a new Parameter, which optimizers do not have.
    linear.parametrizations.weight.register_parameter("original", A)


@torch.no_grad()
def copy_scale(site: Site, adapter: str) -> None:
    """Give another adapter on the layer of `site` a frozen copy of its scale."""
    if site.scale is not None:
        put_scale(Site(site.name, site.layer, adapter), site.scale.copy_for(adapter).requires_grad_(False))


def trained_scales(model: nn.Module) -> list[nn.Parameter]:
    """ω or the gates of `model`, from an optimizer's marked group if possible, which is faster than a search."""
    for optimizer in followers(model):
        if own := [group["params"] for group in optimizer.param_groups if group.get("scale")]:
            return list(chain.from_iterable(own))
    return list(dict.fromkeys(site.scale.parameter for site in sites(model) if site.scale is not None))
