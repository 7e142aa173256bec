"""A site is one adapted weight: `h = W x + b + s B A x`, with A (r, in), B (out, r) and the scale s = alpha / r0.

On a convolution A is one with r channels and the layer's kernel, and B one of kernel 1, so that s B A is a kernel of
the layer's shape. Read as matrices, each place of the kernel being an input of its own, they are A and B as above with
in = channels · places of the kernel: ranks are counted, chosen and changed on these matrices.

Sites are read off the PEFT model each time they are asked for, so there is no second book to keep. A scale is a
parametrization of A, SimplexLoRA's ω or SoRA's gates g: every reader of `lora_A.weight` sees ω·A or diag(g) A, PEFT's
forward, merge and disable among them, without knowing. All ω of a model are one (n,) parameter beside the sites, so an
emptied site keeps its ω; gates belong to their site.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer, variants
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from rankwise.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The types of weights that are numbers as they stand."""

RESIZABLE = (
    variants.ALoraLinearVariant,
    variants.DoraConv1dVariant,
    variants.DoraConv2dVariant,
    variants.DoraConv3dVariant,
    variants.DoraLinearVariant,
    variants.VeloraLinearVariant,
)
"""Of PEFT's variants those that are made of A, B and parts that do not know the rank."""

OMEGA = "lora_omega"  # on the tuner itself, whose own parameters PEFT saves and loads: a checkpoint keeps ω unasked


class Scale(nn.Module):
    """Multiplies A, as a parametrization that leaves the stored A as it was."""

    value: Tensor
    """Shape () or (r, 1)."""

    def forward(self, A: Tensor) -> Tensor:
        return A * self.value.to(A.dtype).reshape(-1, *[1] * (A.dim() - 1))


class Omega(Scale):
    """One entry of ω, which scales a whole site."""

    def __init__(self, omegas: nn.ParameterDict, adapter: str, index: int):
        super().__init__()
        # In a tuple, so that torch does not register ω once more under every site.
        self.source = (omegas, adapter, index)

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        """ω of this site, shape ()."""
        omegas, adapter, index = self.source
        return omegas[adapter][index]


class Gates(Scale):
    """One gate per unit of rank (SoRA): g, a Parameter of shape (r, 1)."""

    def __init__(self, gates: Tensor):
        super().__init__()
        self.gates = nn.Parameter(gates.reshape(-1, 1))

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self.gates


@dataclass(frozen=True, eq=False)
class Site:
    """One adapted weight of a PEFT model, present (`rank` > 0) or emptied (`rank` == 0)."""

    name: str  # the module's path in the base model
    layer: Any  # peft.tuners.lora.LoraLayer, whose dictionaries PEFT leaves untyped
    adapter: str

    @property
    def present(self) -> bool:
        return self.adapter in self.layer.lora_A

    @property
    def A_owner(self) -> tuple[nn.Module, str]:
        """The module and attribute that hold A's Parameter: the linear, or its parametrization while a scale is on."""
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
        """The pretrained weight, shape (out, in) whatever the layer's own layout; as numbers where it is quantised.

        Raises:
            InputError: a weight that nobody here knows how to dequantise.
        """
        base = self.layer.get_base_layer()
        held = base.weight
        if getattr(getattr(held, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()  # bitsandbytes lays 4-bit codes out anew to run on a CPU, and back again for this
        weight = dequantize_module_weight(base)
        if base.weight is not held:  # of 8-bit codes on a CPU PEFT leaves a copy, which does not run if they have run
            base._parameters["weight"] = held
        if weight.dtype not in FLOATS or weight.numel() != self.in_features * self.out_features:
            raise InputError(f"{self.name} is quantised in a way that cannot be undone here: use init=kaiming")
        return weight.T if isinstance(base, Conv1D) else weight.flatten(1)

    @property
    def scale(self) -> Scale | None:
        """The parametrization that multiplies A, if one is on."""
        owner, name = self.A_owner if self.present else (None, "")
        return owner[0] if name == "original" else None  # type: ignore[index]

    @property
    def gates(self) -> nn.Parameter | None:
        """Shape (r, 1), if the site has any."""
        return self.scale.gates if isinstance(self.scale, Gates) else None

    @property
    def scaling(self) -> float:
        """s, which stays alpha / r0 whatever the rank becomes."""
        return self.layer.scaling[self.adapter] if self.present else self.layer.lora_empty[self.adapter]

    @property
    def rank(self) -> int:
        return self.A.shape[0] if self.present else 0

    @property
    def dead(self) -> bool:
        """Whether it was found out in training that the site takes no part in the loss; see `silence`."""
        return self.adapter in getattr(self.layer, "lora_dead", ())

    @property
    def live(self) -> int:
        """Units of rank that add to the output: all, or those whose gate is not 0."""
        return self.rank if self.gates is None or self.gates.is_meta else int(self.gates.count_nonzero())

    @property
    def in_features(self) -> int:
        return features(self.layer.get_base_layer())[0]

    @property
    def out_features(self) -> int:
        return features(self.layer.get_base_layer())[1]

    @property
    def cost(self) -> int:
        """Parameters per unit of rank: in + out."""
        return self.in_features + self.out_features

    @property
    def limit(self) -> int:
        """The largest rank that adds anything: min(in, out)."""
        return min(self.in_features, self.out_features)

    @property
    def parameters(self) -> int:
        """What the live units cost, the gates themselves aside."""
        return self.live * self.cost


def adapted(model: nn.Module) -> PeftModel:
    """The PEFT model inside wrappers such as DistributedDataParallel or a compiled module.

    Raises:
        TypeError: if there is none.
        InputError: if PEFT's layers are there without a PeftModel around them.
    """
    whole = model
    while not isinstance(model, PeftModel):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            if any(isinstance(part, BaseTunerLayer) for part in whole.modules()):
                raise InputError(
                    f"{type(model).__name__} has PEFT's layers and no PeftModel around them, as transformers' "
                    "add_adapter and PEFT's mixed models leave it: adapt it by attach, or by peft.get_peft_model"
                )
            raise TypeError(f"{type(model).__name__} has no adapter: attach a method first")
        model = inner
    return model


def is_weight(module: nn.Module) -> bool:
    """Whether a site can sit on this module: a linear map, in torch's layout or GPT-2's, or a convolution."""
    return isinstance(module, (nn.Linear, Conv1D)) or is_convolution(module)


def is_convolution(module: nn.Module) -> bool:
    """Whether this is a convolution; transposed ones, which PEFT does not adapt, are none."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def features(module: Any) -> tuple[int, int]:
    """(in, out) of a linear map. Not its weight's shape: 4-bit weights are packed into one column.

    Of a convolution as a matrix: channels · places of the kernel, channels.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if is_convolution(module):
        return module.in_channels * prod(module.kernel_size), module.out_channels
    return module.in_features, module.out_features


def holds_codes(weight: Tensor) -> bool:
    """Whether a weight holds codes of a quantisation and no numbers, as far as it shows by itself."""
    wrapped = type(weight).__module__.startswith(("bitsandbytes.", "torchao."))  # 4-bit codes may be stored as floats
    return wrapped or weight.dtype not in FLOATS


def is_quantised(layer: Any) -> bool:
    """Whether the weight of a linear map or convolution holds codes and no numbers."""
    inputs, outputs = features(layer)
    return holds_codes(layer.weight) or layer.weight.numel() * getattr(layer, "groups", 1) != inputs * outputs


def check_convolution(name: str, module: Any) -> None:
    """Raise InputError for a convolution on which PEFT 0.21's factors are no product of two matrices to add to W."""
    if not is_convolution(module):
        return
    if module.groups > 1:
        reason = f"has {module.groups} groups: PEFT could not merge what is learnt on it"
    elif any(step != 1 for step in module.dilation):
        reason = "is dilated, and PEFT's factors are not"
    elif module.padding_mode != "zeros":
        reason = f"has {module.padding_mode} padding, and PEFT's factors pad with zeros"
    else:
        return
    raise InputError(f"the convolution {name} {reason}; leave it out of targets")


def check_own(model: nn.Module, name: str) -> None:
    """Raise InputError where the weight of the layer `name` is quantised or serves another module too."""
    layer: Any = model.get_submodule(name)
    if is_quantised(layer):
        raise InputError(f"{name} is quantised, its weight cannot change: use empty=drop, and no residual start")
    if sum(p is layer.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        raise InputError(f"{name} shares its weight with another module, which would change too")


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, Any, str]]:
    """Every layer that the active adapter has of PEFT's LoRA: its name, itself, and why it is no site (empty if it is).

    A site is a plain product BA of free rank on a weight of its own. PEFT has more kinds, and each layer knows its own.
    """
    adapter = model.active_adapter
    tied = getattr(model.peft_config[adapter], "target_modules_to_tie", None) or ()
    outer = "\0"
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        held = (layer.lora_A, layer.lora_embedding_A, getattr(layer, "lora_empty", {}))
        if not any(adapter in part for part in held):
            continue
        inside = name.startswith(outer)
        yield name, layer, _peculiar(layer, adapter, inside, tied=any(f".{name}".endswith(f".{end}") for end in tied))
        outer = outer if inside else f"{name}."


def _peculiar(layer: Any, adapter: str, inside: bool, tied: bool) -> str:
    """What is peculiar about a layer of PEFT's LoRA, so that it is no site; empty where nothing is."""
    base, variant = layer.get_base_layer(), layer.lora_variant.get(adapter)
    if isinstance(layer, AdaLoraLayer):  # its factors are bare parameters
        return "has AdaLoRA's triplets"
    if isinstance(layer, ParamWrapper):
        return "adapts a parameter and no layer (target_parameters)"
    if not is_weight(base):
        return f"adapts a {type(base).__name__}"
    if is_convolution(base) and base.groups > 1:
        return "adapts a convolution in groups and has a B for each"
    if variant is not None and not isinstance(variant, RESIZABLE):
        return f"is PEFT's {type(variant).__name__.removesuffix('Variant')}, which is no plain LoRA"
    if getattr(layer, "lora_arrow", {}):
        return "is read by PEFT's Arrow router, which needs equal ranks"
    if inside:  # PEFT makes it anew with the rank of the layer around it
        return "lies in a layer that is adapted too"
    return "has the factors of the embedding (ensure_weight_tying)" if tied else ""


def _sites(model: PeftModel) -> Iterator[Site]:
    for name, layer, why in _lora_layers(model):
        if not why:
            yield Site(name, layer, model.active_adapter)


def peculiar(model: nn.Module, name: str) -> str:
    """Why the adapted layer `name` is no site; an empty string where it is one, or not adapted at all."""
    return next((why for found, _, why in _lora_layers(adapted(model)) if found == name), "")


def sites(model: nn.Module) -> list[Site]:
    """All sites of the active adapter in model order, the emptied ones among them; none where nothing is adapted."""
    try:
        return list(_sites(adapted(model)))
    except TypeError:
        return []


def ranks(model: nn.Module) -> dict[str, int]:
    """Live rank of every site, by name."""
    return {site.name: site.live for site in sites(model)}


def omega(model: nn.Module) -> nn.Parameter | None:
    """The (n,) parameter of ω in the order of `sites`, or None when no search is on."""
    peft = adapted(model)
    return getattr(peft.base_model, OMEGA, {}).get(peft.active_adapter)
