"""The modules of a model that `targets` and `head` name."""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from math import prod
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from rankwise.errors import InputError, nearest, require
from rankwise.nets.fused import join, parts, split
from rankwise.nets.lora_linear import set_fast
from rankwise.ranks.layers import TRANSPOSED, weight_layer

ALL_LINEAR = "all-linear"


def target_names(model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
    """Full names of the layers that `targets` names; never of layers inside the head.

    `all-linear` excludes convolutions and the output layer of a language model, such as `lm_head`: these must be named,
    in a list or as `all-linear+NAME`. If a part of a fused projection is named, the projection is split; `all-linear`
    includes such projections as a whole.

    Raises:
        InputError: no name, one that matches nothing (the message lists what would), a fused projection named both as
            a whole and by a part, or a convolution of a kind that cannot be adapted.
    """
    join(model)  # projections that were split for an earlier adapter
    output = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = [*head, *SEQ_CLS_HEAD_NAMES]
    weights = {name: layer for name, module in model.named_modules() if (layer := weight_layer(module))}
    layers = [name for name in weights if not any(_inside(part, name) for part in excluded)]
    inner = [name for name in layers if weights[name].layer is not output]
    require(bool(inner), f"{type(model).__name__} has no linear layer outside its head, so nothing can be adapted")
    wanted = targets.split("+") if isinstance(targets, str) else list(targets)
    require(bool(wanted), f"targets is empty: name modules, or {ALL_LINEAR}")
    chosen: list[str] = []
    if wanted[0] == ALL_LINEAR:
        chosen = [name for name in inner if weights[name].linear]
        require(bool(chosen), f"{type(model).__name__} has no linear layer outside its head: name its convolutions")
        layers = [*weights]
    fused = {part: whole for part, whole in parts(model).items() if whole in layers}
    for target in wanted[bool(chosen) :]:
        if not any(_ends(target, name) for name in (*layers, *fused)):
            for name, module in model.named_modules():
                if _ends(target, name) and isinstance(module, TRANSPOSED):
                    raise InputError(
                        f"target {target!r} is a transposed convolution, {name}, for which PEFT has no LoRA"
                    )
            ends = sorted({name.split(".")[-1] for name in layers} | {".".join(p.split(".")[-2:]) for p in fused})
            raise InputError(
                f"target {target!r} matches no linear layer or convolution{nearest(target, ends)}; "
                f"these would match: {ALL_LINEAR}, {', '.join(ends)}"
            )
    names = [n for n in (*layers, *fused) if n in chosen or any(_ends(target, n) for target in wanted)]
    twice = [part for part, whole in fused.items() if part in names and whole in names]
    require(not twice, f"targets include {''.join(twice[:1])} and also the whole projection: name one of them")
    for name in set(names).intersection(layers):
        weights[name].check(name)
    split(model, names)
    return names


def placement(
    model: nn.Module, targets: str | Sequence[str], head: Sequence[str], rank: int, option: str = "rank", only: str = ""
) -> dict[str, Any]:
    """PEFT's options for an adapter of rank `rank` on these layers of the base `model`, and for its head.

    Args:
        targets, head: as in `target_names` and `head_names`.
        option: the user's name for the rank.
        only: what is for linear layers only, so that convolutions are refused; empty for what takes both.
    Raises:
        InputError: a model with an adapter, names that match nothing, or layers that do not allow this rank or `only`.
    Warns:
        UserWarning: `all-linear` leaves out 1 % or more of the weights, such as experts in one parameter.
    """
    check_bare(model)
    names = target_names(model, targets, head)
    if isinstance(targets, str) and targets.split("+")[0] == ALL_LINEAR:
        _warn_of_left_out(model)
    layers = {name: layer for name in names if (layer := weight_layer(model.get_submodule(name)))}
    for name, layer in layers.items():
        limit = min(layer.features)
        require(rank <= limit, f"{option} {rank} is too large for {name}, which allows at most {limit}")
        require(layer.linear or not only, f"{name} is a convolution, but {only} is for linear layers only")
    return {
        "target_modules": names,
        "modules_to_save": head_names(model, head) or None,
        "fan_in_fan_out": layers[names[0]].transposed,
    }


def check_bare(model: nn.Module) -> None:
    """Raise InputError if the model has an adapter of PEFT, with or without a PeftModel around it."""
    adapted = any(isinstance(part, (PeftModel, BaseTunerLayer)) for part in model.modules())
    require(not adapted, "this model already has an adapter: use the base model")


def adapt(model: nn.Module, config: Any) -> PeftModel:
    """PEFT's model of `model` with the adapter of `config`, on exactly the layers that `config` names, made fast.

    PEFT rewrites the targets of mixtures of experts whose files once had a layer for each expert: `gate_proj` of a
    dense block becomes a part of the experts' one parameter, in the model and in every file. It also takes a full name
    for the end of a longer one.

    Raises:
        InputError: PEFT refuses the targets, or adapts other layers.
    """
    targets, converted = set(config.target_modules), deepcopy(config)
    missing: set[str] = set()
    try:
        convert_peft_config_for_transformers(converted, model, None)
        missing = targets - set(converted.target_modules)
        model_with_adapter = model if missing else get_peft_model(model, config)
    except ValueError as error:
        ends = ", ".join(sorted({name.split(".")[-1] for name in targets}))
        raise InputError(f"PEFT refuses these targets ({ends}): {' '.join(str(error).split())}") from error
    if missing:
        refused = {name.split(".")[-1] for name in missing}
        rest = sorted({name.split(".")[-1] for name in targets} - refused)
        raise InputError(
            f"PEFT cannot adapt {min(missing)} of {type(model).__name__} ({len(missing)} such layers), since it takes "
            f"{', '.join(sorted(refused))} for parts of the experts: use targets: [{', '.join(rest)}]"
        )
    assert isinstance(model_with_adapter, PeftModel)
    adapted = {
        name
        for name, layer in model_with_adapter.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and model_with_adapter.active_adapter in layer.lora_A
    }
    if adapted != targets:
        model_with_adapter.unload()
        raise InputError(
            f"PEFT compares ends of names, so {min(adapted ^ targets)} would be adapted too: include both in targets"
            if adapted > targets
            else f"PEFT puts no adapter on {min(targets - adapted)}: name other targets"
        )
    set_fast(model_with_adapter)
    return model_with_adapter


def _warn_of_left_out(model: nn.Module) -> None:
    """Warn if 1 % or more of the weights are matrices outside all layers that can be adapted."""
    left_out: dict[str, int] = {}
    total = 0
    for name, p in model.named_parameters():
        owner_name, parametrized, _ = name.partition(".parametrizations.")  # of a convolution with weight_norm
        owner = model.get_submodule(owner_name if parametrized else owner_name.rpartition(".")[0])
        layer = weight_layer(owner)
        size = prod(layer.features) if layer and name.endswith(".weight") else p.numel()
        total += size
        if p.dim() > 1 and layer is None and not isinstance(owner, (*TRANSPOSED, nn.Embedding)):
            left_out[name] = size
    if (share := sum(left_out.values()) / total) >= 0.01:
        warnings.warn(
            f"{ALL_LINEAR} leaves out {share:.0%} of the weights of {type(model).__name__}, which are in no layer that "
            f"can be adapted, such as {max(left_out, key=lambda name: left_out[name])}",
            stacklevel=2,
        )


def head_names(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Full names of the modules that `head` names.

    Raises:
        InputError: a name that matches no module, or that another module's name ends with, which PEFT would train too.
    """
    names = [name for name, _ in model.named_modules()]
    for part in head:
        if not any(_ends(part, name) for name in names):
            top = [name for name, _ in model.named_children()]
            raise InputError(f"head {part!r} matches no module{nearest(part, top)}; the model has: {', '.join(top)}")
    matches = [name for name in names if any(_ends(part, name) for part in head)]
    for name in matches:
        if also := [other for other in names if other.endswith(name) and other not in matches]:
            raise InputError(
                f"{also[0]} also ends with head {name!r}, and PEFT, which compares ends of names, would train it too: "
                f"name all of them, head=[{', '.join([name, *also])}], or rename one"
            )
    return matches


def _ends(part: str, name: str) -> bool:
    """Whether `part` is the name of the module `name`, in full or its last components."""
    return f".{name}".endswith(f".{part}")


def _inside(part: str, name: str) -> bool:
    """Whether the module `name` is called `part` or is inside one that is."""
    return f".{part}." in f".{name}."
