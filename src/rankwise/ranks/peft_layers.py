"""Which of PEFT's layers are sites: a plain product BA of free rank on a weight of its own, and nothing more."""

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
"""Of PEFT's variants those that are made of A, B and parts that do not know the rank."""


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any, str]]:
    """Every layer that the active adapter has of PEFT's LoRA: its name, itself, and why it is no site (empty if it is).

    PEFT has more kinds of LoRA than the plain one, and each layer knows its own.
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
        yield (
            name,
            layer,
            _why_no_site(layer, adapter, inside, tied=any(f".{name}".endswith(f".{end}") for end in tied)),
        )
        outer = outer if inside else f"{name}."


def _why_no_site(layer: Any, adapter: str, inside: bool, tied: bool) -> str:
    """Why a layer of PEFT's LoRA is no site, as a message goes on after its name; empty where it is one."""
    base, variant = layer.get_base_layer(), layer.lora_variant.get(adapter)
    kind = weight_layer(base)
    if isinstance(layer, AdaLoraLayer):  # its factors are bare parameters
        return "has AdaLoRA's triplets"
    if isinstance(layer, ParamWrapper):
        return "adapts a parameter and no layer (target_parameters)"
    if kind is None:
        return f"adapts a {type(base).__name__}"
    if not kind.linear and base.groups > 1:
        return "adapts a convolution in groups and has a B for each"
    if variant is not None and not isinstance(variant, RESIZABLE):
        return f"is PEFT's {type(variant).__name__.removesuffix('Variant')}, which is no plain LoRA"
    if getattr(layer, "lora_arrow", {}):
        return "is read by PEFT's Arrow router, which needs equal ranks"
    if inside:  # PEFT makes it again with the rank of the layer around it
        return "lies in a layer that is adapted too"
    return "has the factors of the embedding (ensure_weight_tying)" if tied else ""
