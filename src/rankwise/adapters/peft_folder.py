"""A PEFT adapter's folder: its configuration, the names of its tensors, and how both are written."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from rankwise.adapters.layers import Layer, StoredAdapter, in_order, sizes
from rankwise.adapters.tensors import Tensors
from rankwise.errors import InputError
from rankwise.files import ADAPTER, read_json
from rankwise.ranks.kept import RESIDUAL

CONFIG, _, WEIGHTS, _ = ADAPTER[:4]
INDEX = f"{WEIGHTS}.index.json"
"""Which file has which tensor, where transformers has written an adapter to several."""
PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base model."""
UNREAD = (
    *("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "target_parameters"),
    "ensure_weight_tying",
)
"""Options of PEFT's LoRA with which ΔW is not s · B A of a layer of its own."""
PADDED, LEFT_OUT = "rankwise.ranks", "rankwise.left_out"
"""In the metadata of the weights: the ranks, as JSON, of layers that are padded with zeros to a larger one; and how
many layers are left out whose names end as those of the layers that are there."""
STATE = re.compile(r"\.(?:lora_start|lora_omega|lora_merged|parametrizations)\b")
"""Names of tensors that training needs and plain LoRA does not have."""
PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
"""Ends of the names of PEFT's tensors for one layer -> what they are."""


def read(folder: Path) -> StoredAdapter:
    """Open the adapter in a folder that has PEFT's configuration. Raises as `stored` does."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG}: is damaged, it holds no JSON object")
    if config.get("start_written"):
        raise _training(folder, "start_written in its configuration")
    if why := why_unread(config):
        raise InputError(f"{folder / CONFIG}: {why}")
    tensors = Tensors(_weight_files(folder))
    found: dict[str, dict[str, str]] = {}
    others = []
    for key in tensors.shape:
        if STATE.search(key):
            raise _training(folder, key)
        end = next((end for end in PARTS if key.endswith(end)), None)
        if end is not None:
            found.setdefault(key.removesuffix(end).removeprefix(PREFIX), {})[PARTS[end]] = key
        elif ".lora_" in key:
            raise InputError(f"{folder}: holds {key}, which is no tensor of plain LoRA")
        else:
            others.append(key)
    if not found:
        raise InputError(f"{folder}: adapts no layer")
    layers = {
        name: _layer(folder, name, parts, tensors, config)
        for name, parts in sorted(found.items(), key=lambda each: in_order(each[0]))
    }
    for name, rank in _unpadded(folder, layers, tensors).items():
        layers[name] = replace(layers[name], rank=rank)
    if empty := {name for name, layer in layers.items() if not layer.rank}:
        layers = {name: layer for name, layer in layers.items() if name not in empty}
        config["target_modules"] = list(dict.fromkeys(map(module, layers)))  # the ends of names mean the empty ones too
    return StoredAdapter(folder, "peft", config, tensors, layers, others)


def module(name: str) -> str:
    """The module that PEFT's configuration names for an adapted layer: nn.MultiheadAttention has two such layers."""
    return name.partition(".base_layer.")[0]


def key(name: str, part: str, embedding: bool) -> str:
    """The name of the tensor A or B of a layer."""
    return f"{PREFIX}{name}.lora_embedding_{part}" if embedding else f"{PREFIX}{name}.lora_{part}.weight"


def compact(
    config: Mapping[str, Any], ranks: Mapping[str, int], alpha: float, targets: Sequence[str] | str | None = None
) -> dict[str, Any]:
    """`config` for layers of these ranks, all with the scale alpha / rank.

    r is the largest rank, so that a consumer that looks at nothing else has room for all.

    Args:
        targets: what `target_modules` has, names or a pattern; each layer in full when absent.
    """
    by_module = {module(name): rank for name, rank in ranks.items()}
    most = max(by_module.values())
    return {
        **config,
        "r": most,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in sorted(by_module.items()) if rank != most},
        "alpha_pattern": {},
        "use_rslora": False,
        "target_modules": targets or [*by_module],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }


def begun_anew(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without a start of PEFT's that may not be possible at other ranks; the file has the numbers anyway."""
    return {**config, "init_lora_weights": True, "eva_config": None}


def own_targets(config: Mapping[str, Any]) -> list[str] | None:
    """The ends of names that `config` has as its targets, None if they alone do not decide which layers are adapted."""
    targets = config.get("target_modules")
    more = any(config.get(option) not in (None, []) for option in ("exclude_modules", "layers_to_transform"))
    return None if more or not isinstance(targets, list) else targets


def why_unread(config: Mapping[str, Any]) -> str:
    """Why an adapter with this configuration is not plain LoRA that can be read without its base; empty if it is."""
    if (kind := config.get("peft_type")) != "LORA":
        return f"peft_type is {kind}, but only LORA can be read"
    start = str(config.get("init_lora_weights"))
    if start.lower().startswith(RESIDUAL):
        return (
            f"its start, {start}, is subtracted from the base weights when it is loaded: make plain LoRA of it with "
            "PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…) first"
        )
    option = next((option for option in UNREAD if config.get(option)), None)
    return f"has {option}, with which ΔW is not the product B A of a layer" if option else ""


def _training(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder}: holds the state of a training ({what}), not a finished adapter: resume from it, and write the "
        "adapter with rankwise.save(model, folder)"
    )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the adapter in a folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not files:
            raise InputError(f"{folder / INDEX}: is damaged, it has no weight_map")
        for name in files.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"{folder / INDEX}: names {name!r}, which is no safetensors file in this folder")
        return [folder / name for name in sorted({*files.values()})]
    for pickle in sorted(folder.glob("adapter_model*")):
        if pickle.suffix in (".bin", ".pt", ".pth"):
            raise InputError(
                f"{pickle}: is a pickle, which can run any code when it is read: if you trust it, load it with PEFT "
                "and save it again, which writes safetensors"
            )
    raise InputError(f"{folder}: has no {WEIGHTS}: get it, or save the adapter, again")


def _layer(folder: Path, name: str, parts: Mapping[str, str], tensors: Tensors, config: dict[str, Any]) -> Layer:
    layer = sizes(folder, name, parts, tensors)
    fixed = "its attention has another layer at the same rank" if _in_attention(name, tensors) else layer.fixed
    scale = scale_of(folder / CONFIG, name, layer.rank, config)
    return replace(layer, scale=scale, embedding="lora_embedding" in parts["A"], fixed=fixed)


def metadata(unpadded: Mapping[str, int], left_out: int | None = None) -> dict[str, str]:
    """What the file of weights says of itself.

    Args:
        unpadded: the ranks of the layers that are padded to another.
        left_out: how many layers are not in it whose names end as those of the layers that are; None if not known.
    """
    found = {"format": "pt"} | ({PADDED: json.dumps(unpadded)} if unpadded else {})
    return found | ({LEFT_OUT: str(left_out)} if left_out is not None else {})


def said_left_out(tensors: Tensors) -> int | None:
    """How many layers are left out by what a file of weights says; one that PEFT has written says nothing."""
    said = tensors.metadata.get(LEFT_OUT, "")
    return int(said) if said.isdecimal() else None


def left_out(tensors: Tensors, names: Collection[str], new: Collection[str]) -> int | None:
    """How many layers are left out by an adapter of the layers `new`, made of one in a file that has `names`."""
    old, said = {*names, *json.loads(tensors.metadata.get(PADDED, "{}"))}, said_left_out(tensors)
    found = (said or 0) + len(old - {*new}) - len({*new} - old)
    return None if said is None and found <= 0 else max(0, found)


def _unpadded(folder: Path, layers: Mapping[str, Layer], tensors: Tensors) -> dict[str, int]:
    """The ranks of the layers that rankwise has padded."""
    try:
        ranks = {str(name): int(rank) for name, rank in json.loads(tensors.metadata.get(PADDED, "{}")).items()}
        fit = all(0 <= rank <= layers[name].rank for name, rank in ranks.items())
    except (ValueError, TypeError, AttributeError, KeyError):
        fit = False
    empty = {name for name, rank in ranks.items() if not rank} if fit else {*layers}
    if empty == layers.keys() or any(tensors[layers[name].parts["B"]].any() for name in empty):
        raise InputError(f"{folder}: {PADDED} in the metadata of its weights is damaged: get or save the adapter again")
    return ranks


def scale_of(file: Path, name: str, rank: int, config: Mapping[str, Any]) -> float:
    """The scale s of a layer by PEFT's configuration, which is in `file`.

    Raises:
        InputError: it has another rank there, or an alpha that is no number.
    """
    try:
        expected, alpha = _of(config, "r", "rank_pattern", name), _of(config, "lora_alpha", "alpha_pattern", name)
    except (AttributeError, TypeError, re.error) as error:
        raise InputError(f"{file}: is damaged, a pattern in it cannot be read: {error}") from None
    if expected != rank:
        raise InputError(f"{file}: says rank {expected} of {name}, which has rank {rank}, so PEFT would not load it")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not isfinite(alpha):
        raise InputError(f"{file}: lora_alpha of {name} is {alpha!r}, which is no number")
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _of(config: Mapping[str, Any], option: str, pattern: str, name: str) -> Any:
    """What PEFT reads from the configuration for a layer: the first key of the pattern that matches, or the option."""
    from peft.utils.other import get_pattern_key

    found = config.get(pattern) or {}
    return found.get(get_pattern_key([*found], module(name)), config.get(option))


def _in_attention(name: str, tensors: Tensors) -> bool:
    """Whether the layer is one of the two that PEFT adapts in an nn.MultiheadAttention, at one rank."""
    return ".base_layer." in name or f"{PREFIX}{name}.base_layer.out_proj.lora_A.weight" in tensors.shape
