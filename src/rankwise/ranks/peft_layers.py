"""Which of PEFT's layers are sites: those that add a plain product BA of any rank to a weight of their own."""

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer, variants
from peft.tuners.lora.layer import ParamWrapper

from rankwise.ranks.layers import weight_layer

RESIZABLE = (
    variants.ALoraLinearVariant,
    variants.DoraConv1dVariant,
    variants.DoraConv2dVariant,
    variants.DoraConv3dVariant,
    variants.DoraLinearVariant,
    variants.VeloraLinearVariant,
)
"""PEFT's variants of LoRA that consist of A, B and parts that do not depend on the rank."""


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any, str]]:
    """Each of PEFT's LoRA layers with the active adapter: its name, the layer, and why it is no site (empty if it is).

    PEFT has more kinds of LoRA than the plain one.
    """
    adapter = model.active_adapter
    tied = getattr(model.peft_config[adapter], "target_modules_to_tie", None) or ()
    outer = "\0"
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not any(adapter in d for d in (layer.lora_A, layer.lora_embedding_A, getattr(layer, "lora_empty", {}))):
            continue
        inside, is_tied = name.startswith(outer), any(f".{name}".endswith(f".{end}") for end in tied)
        yield name, layer, _why_no_site(layer, adapter, inside, is_tied)
        outer = outer if inside else f"{name}."


def _why_no_site(layer: Any, adapter: str, inside: bool, tied: bool) -> str:
    """Why a LoRA layer is no site, to follow its name in a message; empty if it is one."""
    base, variant = layer.get_base_layer(), layer.lora_variant.get(adapter)
    kind = weight_layer(base)
    if isinstance(layer, AdaLoraLayer):  # its factors are bare parameters
        return "has AdaLoRA's triplets"
    if isinstance(layer, ParamWrapper):
        return "adapts a parameter, not a layer (target_parameters)"
    if kind is None:
        return f"adapts a layer of class {type(base).__name__}"
    if not kind.linear and base.groups > 1:
        return "adapts a convolution with groups and has a B for each"
    if variant is not None and not isinstance(variant, RESIZABLE):
        return f"is PEFT's {type(variant).__name__.removesuffix('Variant')}, not plain LoRA"
    if getattr(layer, "lora_arrow", {}):
        return "is read by PEFT's Arrow router, which needs equal ranks"
    if inside:  # PEFT rebuilds it with the rank of the layer around it
        return "is inside a layer that is adapted too"
    return "shares the factors of the embedding (ensure_weight_tying)" if tied else ""
