"""A site is one adapted weight: `h = W x + b + s B A x`, with A (r, in), B (out, r) and the scale s = alpha / r0.

Ranks are counted, chosen and changed on these matrices, whatever the kind of layer (`layers`). Sites are read from the
PEFT model at each call, so no other record can disagree with it. PEFT is imported only inside functions, so that
layers, gates and `nets.gated` work without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankwise.errors import InputError
from rankwise.ranks.layers import FLOATS, WeightLayer, weight_layer

if TYPE_CHECKING:
    from peft import PeftModel

    from rankwise.ranks.scales import Scale

OMEGA_NAME = "lora_omega"
"""Attribute of PEFT's tuner, whose own parameters PEFT saves and loads, so that checkpoints keep ω."""


def kind(name: str) -> str:
    """A site's name with a * for each number, which it shares with its like in other blocks: `layer.*.output.dense`."""
    return re.sub(r"\b\d+\b", "*", name)


@dataclass(frozen=True, eq=False)
class Site:
    """One adapted weight of a PEFT model, present (`rank` > 0) or emptied (`rank` == 0)."""

    name: str  # the module's path in the base model
    layer: Any  # peft.tuners.lora.LoraLayer, whose dictionaries PEFT leaves untyped
    adapter: str

    @property
    def base(self) -> WeightLayer:
        """The pretrained layer, with its weight as a matrix."""
        base = weight_layer(self.layer.get_base_layer())
        assert base is not None
        return base

    @property
    def present(self) -> bool:
        return self.adapter in self.layer.lora_A

    @property
    def A_owner(self) -> tuple[nn.Module, str]:
        """The module and attribute with A's Parameter: the linear layer, or its parametrization if it has a scale."""
        linear = self.layer.lora_A[self.adapter]
        if parametrize.is_parametrized(linear, "weight"):
            return linear.parametrizations.weight, "original"
        return linear, "weight"

    @property
    def B_owner(self) -> tuple[nn.Module, str]:
        return self.layer.lora_B[self.adapter], "weight"

    @property
    def A(self) -> nn.Parameter:
        """Shape (r, in), a convolution's (r, channels, *kernel), without the scale."""
        owner, name = self.A_owner
        return getattr(owner, name)

    @property
    def B(self) -> nn.Parameter:
        """Shape (out, r), a convolution's (out, r, 1, …)."""
        return self.layer.lora_B[self.adapter].weight

    @property
    def W(self) -> Tensor:
        """The pretrained weight, dequantised, shape (out, in) whatever the layer's own layout.

        Raises:
            InputError: a weight that cannot be dequantised.
        """
        from peft.utils.integrations import dequantize_module_weight

        base = self.layer.get_base_layer()
        original = base.weight
        if getattr(getattr(original, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()  # makes bitsandbytes undo the layout in which 4-bit codes run on a CPU
        weight = dequantize_module_weight(base)
        if base.weight is not original:  # PEFT replaced 8-bit codes on a CPU by a copy, which may not run
            base._parameters["weight"] = original
        if weight.dtype not in FLOATS or weight.numel() != self.in_features * self.out_features:
            raise InputError(f"{self.name} is quantised in a way that cannot be dequantised: use init=kaiming")
        return self.base.matrix(weight)

    @property
    def scale(self) -> Scale | None:
        """The parametrization that multiplies A, if there is one."""
        owner, name = self.A_owner if self.present else (None, "")
        return owner[0] if name == "original" else None  # type: ignore[index]

    @property
    def gates(self) -> nn.Parameter | None:
        """Shape (r, 1); None without gates."""
        return getattr(self.scale, "gates", None)

    @property
    def scaling(self) -> float:
        """s = alpha / r0 of the initial rank r0; it does not change with the rank."""
        return self.layer.scaling[self.adapter] if self.present else self.layer.lora_empty[self.adapter]

    @property
    def rank(self) -> int:
        return self.A.shape[0] if self.present else 0

    @property
    def dead(self) -> bool:
        """Whether training has shown that the site has no part in the loss; see `silence`."""
        return self.adapter in getattr(self.layer, "lora_dead", ())

    @property
    def live(self) -> int:
        """Units of rank that add to the output: all, unless its scale turns some off."""
        return self.rank if self.scale is None else len(self.scale.units(self))

    @property
    def in_features(self) -> int:
        return self.base.features[0]

    @property
    def out_features(self) -> int:
        return self.base.features[1]

    @property
    def cost(self) -> int:
        """Parameters per unit of rank: in + out."""
        return self.in_features + self.out_features

    @property
    def limit(self) -> int:
        """The largest useful rank: min(in, out)."""
        return min(self.in_features, self.out_features)

    @property
    def parameters(self) -> int:
        """Parameters of the live units, not counting the gates."""
        return self.live * self.cost


def base_of(model: nn.Module) -> Any:
    """The model without PEFT's wrapper around it, if there is one."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def peft_model(model: nn.Module) -> PeftModel:
    """The PEFT model inside wrappers such as DistributedDataParallel or a compiled module.

    Raises:
        TypeError: the model has no adapter.
        InputError: it has PEFT's layers but no PeftModel around them.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole = model
    while not isinstance(model, PeftModel):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            if any(isinstance(part, BaseTunerLayer) for part in whole.modules()):
                raise InputError(
                    f"{type(model).__name__} has PEFT's layers but no PeftModel around them, as after transformers' "
                    "add_adapter or in PEFT's mixed models: adapt it with attach, or with peft.get_peft_model"
                )
            raise TypeError(f"{type(model).__name__} has no adapter: attach a method first")
        model = inner
    return model


def sites(model: nn.Module) -> list[Site]:
    """All sites of the active adapter in model order, including emptied ones; [] for a model without adapter."""
    from rankwise.ranks.peft_layers import lora_layers

    try:
        peft = peft_model(model)
    except TypeError:
        return []
    return [Site(name, layer, peft.active_adapter) for name, layer, why in lora_layers(peft) if not why]


def why_no_site(model: nn.Module, name: str) -> str:
    """Why the adapted layer `name` is no site; empty if it is one, or is not adapted."""
    from rankwise.ranks.peft_layers import lora_layers

    return next((why for other, _, why in lora_layers(peft_model(model)) if other == name), "")


def ranks(model: nn.Module) -> dict[str, int]:
    """Live rank of every site, by name."""
    return {site.name: site.live for site in sites(model)}


def omega(model: nn.Module) -> nn.Parameter | None:
    """The (n,) parameter of ω in the order of `sites`; None if no search is running."""
    peft = peft_model(model)
    return getattr(peft.base_model, OMEGA_NAME, {}).get(peft.active_adapter)
