"""An adapter that is one safetensors file, as kohya's trainers, diffusers and ComfyUI have them.

Each of A and B has a tensor whose name begins with that of its layer. s is alpha / r of a tensor `LAYER.alpha`; 1 where
there is none, as all three read it; and what PEFT's configuration says where diffusers has written that into the file.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.adapters.layers import Layer, StoredAdapter, in_order, sizes
from rankwise.adapters.peft_folder import begun_anew, compact, scale_of
from rankwise.adapters.tensors import Tensors
from rankwise.errors import InputError

DIFFUSERS = "lora_adapter_metadata"
"""In the metadata of a file: PEFT's configuration, each option after the name of its model, as in `unet.lora_alpha`."""
FACTOR = re.compile(
    r"(?P<name>.+?)(?:\.lora_|_lora\d?\.|\.lora\.|\.lora_linear_layer\.)"
    r"(?P<part>down|up|A|B)(?:\.default)?(?P<end>\.weight|\.bias)?"
)
"""Names of A and B: `.lora_down.weight` (kohya), `.lora_A.weight` (PEFT), `_lora.down.weight` and `.lora.down.weight`
(older diffusers), `.lora_linear_layer.down.weight` (its text encoders), `_lora1.down.weight` (XLabs), `.lora_A`."""
MORE = re.compile(r"(?P<name>.+)\.(?P<part>alpha|dora_scale|lora_magnitude_vector(?:\.weight)?|reshape_weight)")
"""Names of what else a layer may have: its alpha, DoRA's magnitude, the shape to which W is padded."""
PLAIN = re.compile(r".+\.(?:diff|diff_b|w_norm|b_norm|set_weight)")
"""Names of tensors that are added to a weight, or replace it, as they are."""
KINDS = {
    "LoHa": ".hada_",
    "LoKr": ".lokr_",
    "OFT": ".oft_",
    "GLoRA": ".a1.",
    "(IA)³": ".on_input",
    "a LoCon with a Tucker core": ".lora_mid.",
    "a Control-LoRA": "lora_controlnet",
    "VeRA": "vera_lambda",
}
"""Kinds of adapter that are not A and B alone -> what the names of their tensors hold."""
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""What a file's metadata says of the numbers in it; no reader needs it."""


def read(file: Path) -> StoredAdapter:
    """Open an adapter that is one file. Raises as `stored` does."""
    tensors = Tensors([file])
    for kind, part in KINDS.items():
        if key := next((key for key in tensors.shape if part in key), None):
            raise InputError(f"{file}: is {kind} (it holds {key}), and only LoRA can be read here")
    configs = configurations(file, tensors.metadata)
    found: dict[str, dict[str, str]] = {}
    for key in tensors.shape:
        if each := FACTOR.fullmatch(key):
            part = {"down": "A", "up": "B"}.get(each["part"], each["part"])
            part = "bias" if (part, each["end"]) == ("B", ".bias") else part
            if part in found.setdefault(each["name"], {}):
                raise InputError(f"{file}: holds both {found[each['name']][part]} and {key}")
            found[each["name"]][part] = key
    others = []
    for key in tensors.shape:
        if FACTOR.fullmatch(key):
            continue
        name, part = each.group("name", "part") if (each := MORE.fullmatch(key)) else ("", "")
        if name in found:
            found[name]["magnitude" if "scale" in part or "magnitude" in part else part] = key
        elif PLAIN.fullmatch(key) is None and any(f".{end}" in key for end in ("lora", "dora", "parametrizations")):
            raise InputError(f"{file}: holds {key}, which is no tensor of plain LoRA")
        elif PLAIN.fullmatch(key) is None and key.rpartition(".")[0] in found:
            raise InputError(f"{file}: holds {key} besides A and B of that layer, and what it does is not known here")
        else:
            others.append(key)
    if not found:
        raise InputError(f"{file}: holds no LoRA adapter: no tensor has such a name as LAYER.lora_down.weight")
    if first := next((name for name in found if name.startswith("base_model.")), None):
        raise InputError(
            f"{file}: is the file of a PEFT adapter ({first}): give its folder, whose configuration has alpha"
        )
    layers = {
        name: _layer(file, name, parts, tensors, configs)
        for name, parts in sorted(found.items(), key=lambda each: in_order(each[0]))
    }
    starts = {"lora_": "kohya", "diffusion_model.": "comfyui"}
    form = next((form for start, form in starts.items() if all(name.startswith(start) for name in layers)), "diffusers")
    return StoredAdapter(file, form, None, tensors, layers, others)


def configurations(file: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's configuration in the metadata of a file, by how the names of its layers begin; none for most files.

    They begin with a model of a pipeline, as `unet.`, or with nothing in the file of one model.
    """
    if DIFFUSERS not in metadata:
        return {}
    try:
        options = dict(json.loads(metadata[DIFFUSERS]))
        starts = [name.removesuffix("lora_alpha") for name in options if f".{name}".endswith(".lora_alpha")]
        return {s: {k.removeprefix(s): v for k, v in options.items() if k.startswith(s)} for s in starts}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: {DIFFUSERS} in its metadata is damaged: {error}") from None


def start_of(name: str, configs: Mapping[str, Any]) -> str | None:
    """How the name of a layer begins, of the beginnings that have a configuration."""
    return next((start for start in configs if name.startswith(start)), None)


def metadata(like: StoredAdapter, ranks: Mapping[str, int]) -> dict[str, str]:
    """The metadata of a file like another one, with these ranks.

    PEFT's configuration gets alpha = r for each layer: whoever does not read it then has the same scale, which is 1.
    """
    known = {name: value for name, value in like.tensors.metadata.items() if name not in STALE}
    for name in ("ss_network_dim", "ss_network_alpha"):
        if name in known:
            known[name] = "Dynamic"  # as kohya's own resizing writes it
    options: dict[str, Any] = {}
    configs = configurations(like.path, like.tensors.metadata)
    for start, config in configs.items():
        own = {name.removeprefix(start): rank for name, rank in ranks.items() if start_of(name, configs) == start}
        if own:
            config = compact(begun_anew(config), own, max(own.values()))
            config["alpha_pattern"] = config["rank_pattern"]
        options |= {f"{start}{option}": value for option, value in config.items()}
    return known | ({DIFFUSERS: json.dumps(options, indent=2, sort_keys=True)} if options else {})


def _layer(
    file: Path, name: str, parts: Mapping[str, str], tensors: Tensors, configs: Mapping[str, dict[str, Any]]
) -> Layer:
    layer = sizes(file, name, parts, tensors)
    if "alpha" in parts:
        alpha = tensors[parts["alpha"]]
        if alpha.numel() != 1 or not 0 < float(alpha) < float("inf"):
            raise InputError(
                f"{file}: {parts['alpha']} is {alpha.tolist()}, which is no scale: set it to a number above 0"
            )
        return replace(layer, scale=float(alpha) / layer.rank)
    if (start := start_of(name, configs)) is not None:
        return replace(layer, scale=scale_of(file, name.removeprefix(start), layer.rank, configs[start]))
    return layer
