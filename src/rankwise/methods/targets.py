"""Which modules of a model `targets` and `head` mean."""

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
from torch.nn.modules.conv import _ConvNd

from rankwise.errors import InputError, nearest, require
from rankwise.nets.fused import join, parts, split
from rankwise.ranks.layers import weight_layer

ALL_LINEAR = "all-linear"


def target_names(model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
    """Full names of the layers that `targets` means; layers inside the head are never among them.

    `all-linear` means neither convolutions nor the output layer of a language model, such as `lm_head`: these are
    named, in a list or as `all-linear+NAME`. A fused projection of which a part is meant is split for it; `all-linear`
    means such layers as a whole.

    Raises:
        InputError: no name at all, one that matches nothing (the message lists what would), a fused projection named
            both as a whole and by a part, or a convolution of a kind that cannot be adapted.
    """
    join(model)  # what an earlier adapter, now gone, had split
    output = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = [*head, *SEQ_CLS_HEAD_NAMES]
    weights = {name: layer for name, module in model.named_modules() if (layer := weight_layer(module))}
    layers = [name for name in weights if not any(_inside(part, name) for part in left_out)]
    inner = [name for name in layers if weights[name].layer is not output]
    require(bool(inner), f"{type(model).__name__} has no linear layer outside its head, so nothing can be adapted")
    wanted = targets.split("+") if isinstance(targets, str) else list(targets)
    require(bool(wanted), f"targets is empty: name modules, or {ALL_LINEAR}")
    if wanted[0] == ALL_LINEAR:
        chosen = [name for name in inner if weights[name].linear]
        require(bool(chosen), f"{type(model).__name__} has no linear layer outside its head: name its convolutions")
        layers = [*weights]
    else:
        chosen = []
    fused = {part: whole for part, whole in parts(model).items() if whole in layers}
    for target in wanted[bool(chosen) :]:
        if not any(_ends(target, name) for name in (*layers, *fused)):
            _check_transposed(model, target)
            ends = sorted({name.split(".")[-1] for name in layers} | {".".join(p.split(".")[-2:]) for p in fused})
            raise InputError(
                f"target {target!r} matches no linear layer or convolution{nearest(target, ends)}; "
                f"these would match: {ALL_LINEAR}, {', '.join(ends)}"
            )
    names = [n for n in (*layers, *fused) if n in chosen or any(_ends(target, n) for target in wanted)]
    twice = [part for part, whole in fused.items() if part in names and whole in names]
    require(not twice, f"targets mean {''.join(twice[:1])} and also the whole that it is a part of: name one of them")
    for name in set(names).intersection(layers):
        weights[name].check(name)
    split(model, names)
    return names


def placement(
    model: nn.Module, targets: str | Sequence[str], head: Sequence[str], rank: int, option: str = "rank", only: str = ""
) -> dict[str, Any]:
    """Where an adapter of rank `rank` sits on the base `model`, in the words of PEFT's configurations.

    Args:
        targets, head: as `target_names` and `head_names` take them.
        option: what the user calls the rank.
        only: what is for linear layers only, and so refuses convolutions; empty for what takes both.
    Raises:
        InputError: a model with an adapter, names that mean nothing, or a rank or layer that does not go together.
    Warns:
        UserWarning: `all-linear` leaves out a share of the weights worth a word, such as experts in one parameter.
    """
    check_bare(model)
    names = target_names(model, targets, head)
    if isinstance(targets, str) and targets.split("+")[0] == ALL_LINEAR:
        _tell_out_of_reach(model)
    layers = {name: layer for name in names if (layer := weight_layer(model.get_submodule(name)))}
    for name, layer in layers.items():
        limit = min(layer.features)
        require(rank <= limit, f"{option} {rank} is too large for {name}, which allows at most {limit}")
        require(layer.linear or not only, f"{name} is a convolution, and {only} is for linear layers only")
    return {
        "target_modules": names,
        "modules_to_save": head_names(model, head) or None,
        "fan_in_fan_out": layers[names[0]].transposed,
    }


def check_bare(model: nn.Module) -> None:
    """Raise InputError where PEFT has put an adapter on the model, with a PeftModel around it or without."""
    held = any(isinstance(part, (PeftModel, BaseTunerLayer)) for part in model.modules())
    require(not held, "this model has an adapter already: take the base model instead")


def adapt(model: nn.Module, config: Any) -> PeftModel:
    """PEFT's model of `model` with the adapter of `config`, on the layers that `config` names and no others.

    PEFT rewrites the targets of mixtures of experts whose files once had a layer for each expert: `gate_proj` of a
    dense block becomes a part of the experts' one parameter, in the model and in every file. And it takes a full name
    for the end of a longer one.

    Raises:
        InputError: if PEFT refuses the targets, or adapts other layers than these.
    """
    asked, trial = set(config.target_modules), deepcopy(config)
    missing: set[str] = set()
    try:
        convert_peft_config_for_transformers(trial, model, None)
        missing = asked - set(trial.target_modules)
        model_with_adapter = model if missing else get_peft_model(model, config)
    except ValueError as error:
        ends = ", ".join(sorted({name.split(".")[-1] for name in asked}))
        raise InputError(f"PEFT refuses these targets ({ends}): {' '.join(str(error).split())}") from error
    if missing:
        lost = {name.split(".")[-1] for name in missing}
        left = sorted({name.split(".")[-1] for name in asked} - lost)
        raise InputError(
            f"PEFT has no adapter for {min(missing)} of {type(model).__name__} ({len(missing)} such layers): it takes "
            f"{', '.join(sorted(lost))} for parts of the experts; use targets: [{', '.join(left)}]"
        )
    assert isinstance(model_with_adapter, PeftModel)
    adapted = {
        name
        for name, layer in model_with_adapter.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and model_with_adapter.active_adapter in layer.lora_A
    }
    if adapted != asked:
        model_with_adapter.unload()
        raise InputError(
            f"PEFT looks at the ends of names, so {min(adapted ^ asked)} would be adapted too: let targets mean both"
            if adapted > asked
            else f"PEFT puts no adapter on {min(asked - adapted)}: name other targets"
        )
    return model_with_adapter


def _tell_out_of_reach(model: nn.Module) -> None:
    """Warn where 1 % or more of the weights are matrices that belong to no layer that an adapter can sit on."""
    lost: dict[str, int] = {}
    total = 0
    for name, p in model.named_parameters():
        within, weighed, _ = name.partition(".parametrizations.")  # as torch's weight_norm leaves a convolution
        owner = model.get_submodule(within if weighed else within.rpartition(".")[0])
        layer = weight_layer(owner)
        size = prod(layer.features) if layer and name.endswith(".weight") else p.numel()
        total += size
        if p.dim() > 1 and layer is None and not isinstance(owner, (_ConvNd, nn.Embedding)):
            lost[name] = size
    if (share := sum(lost.values()) / total) >= 0.01:
        warnings.warn(
            f"{share:.0%} of the weights of {type(model).__name__} are in no layer that can be adapted, such as "
            f"{max(lost, key=lambda name: lost[name])}: {ALL_LINEAR} leaves them as they are",
            stacklevel=2,
        )


def _check_transposed(model: nn.Module, target: str) -> None:
    """Raise InputError where `target` means a transposed convolution."""
    for name, module in model.named_modules():
        if _ends(target, name) and isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            raise InputError(f"target {target!r} means {name}, a transposed convolution, for which PEFT has no LoRA")


def head_names(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Full names of the modules that `head` means.

    Raises:
        InputError: a name that matches no module, or one that ends another module's, which PEFT would take as well.
    """
    names = [name for name, _ in model.named_modules()]
    for part in head:
        if not any(_ends(part, name) for name in names):
            top = [name for name, _ in model.named_children()]
            raise InputError(f"head {part!r} matches no module{nearest(part, top)}; the model has: {', '.join(top)}")
    meant = [name for name in names if any(_ends(part, name) for part in head)]
    for name in meant:
        if also := [other for other in names if other.endswith(name) and other not in meant]:
            both = ", ".join([name, *also])
            raise InputError(
                f"head {name!r} ends the name of {also[0]} too, and PEFT, which looks at ends, would train it as well: "
                f"name all of them, head=[{both}], or rename one"
            )
    return meant


def _ends(part: str, name: str) -> bool:
    """Whether the module `name` is called `part`, in full or by its last components."""
    return name == part or name.endswith(f".{part}")


def _inside(part: str, name: str) -> bool:
    """Whether the module `name` is called `part` or lies in one that is."""
    return f".{part}." in f".{name}."
