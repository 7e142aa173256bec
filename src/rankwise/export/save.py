"""Saving what was learnt: a plain PEFT adapter wherever the method is LoRA-shaped, folded, with its mixed ranks."""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rankwise.errors import InputError
from rankwise.export.plain import folded, joined, modules, on_part, state_of
from rankwise.files import check_files, check_replaceable, read_json
from rankwise.methods import Method, build
from rankwise.ranks.resize import alpha, describe, merged, subtracted
from rankwise.ranks.sites import adapted, sites
from rankwise.ranks.triplets import to_lora, triplets

CONFIG = "adapter_config.json"
DESCRIPTION = "rankwise.json"
WEIGHTS = "adapter_model.safetensors"
OURS = {CONFIG, DESCRIPTION, WEIGHTS, "README.md"}
"""All that a saved adapter consists of."""
LIVE = re.compile(r"\.(?:lora_start|lora_omega|lora_merged|parametrizations)\b")
"""Names of tensors that a training needs and plain LoRA does not have."""


def save(model: nn.Module, folder: str | PathLike[str], method: Method | None = None, head: Sequence[str] = ()) -> Path:
    """Write the adapter to `folder`, all of it or nothing.

    A PEFT model becomes a plain PEFT adapter that stock PEFT loads without rankwise: ω is folded into what is written
    (the model itself stays as it is), sites of rank 0 are left out, and those on parts of a fused projection become one
    adapter on the whole of it. For methods that are no adapter (`head`), `method` and `head` say what to rebuild, and
    `rankwise.load` reads it; what trains is written then, and buffers, such as the statistics of a normalisation.

    Raises:
        InputError: if products were merged into the base weights (`empty: merge`), if a model without adapter comes
            without its method, if another adapter of the model has changed the base weights (a residual start), or if
            `folder` is a file or holds other things than an adapter, which would be lost.
    """
    folder = Path(folder)
    check_replaceable(folder, OURS, "an adapter")
    with suppress(TypeError):
        model = adapted(model)  # out of its wrappers
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        made = Path(name) / "adapter"
        made.mkdir()
        if isinstance(model, PeftModel):
            if triplets(model):  # AdaLoRA
                model = to_lora(model)
            made = _save_adapter(model, made)
        elif method is not None:
            description = {"method": {"name": method.name, **asdict(method)}, "head": list(head)}
            save_file(_learnt(model), made / WEIGHTS)
            (made / DESCRIPTION).write_text(json.dumps(description, indent=2))
        else:
            raise InputError("this model has no adapter: say which method trained it, save(model, folder, method)")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _learnt(model: nn.Module) -> dict[str, Tensor]:
    """What trains, each tensor under one name, and all buffers that belong to the model's state."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.contiguous() for name, value in {**trained, **buffers}.items()}


def _save_adapter(model: PeftModel, folder: Path) -> Path:
    """Save the active adapter, and return where in `folder` PEFT put it: in a folder of its name, unless `default`."""
    if names := merged(model):
        raise InputError(
            f"the product of {names[0]} ({len(names)} sites in all) was merged into the base weights, so an adapter "
            "alone would not give this model; save model.merge_and_unload(), or train with empty=drop"
        )
    name = model.active_adapter
    if strange := [other for other in subtracted(model) if other != name]:
        raise InputError(
            f"the adapter {strange[0]!r} has a residual start, which is taken out of the base weights that {name!r} "
            "was trained on: attach each of them to a base model of its own"
        )
    config: Any = model.peft_config[name]
    model.peft_config[name] = written = copy(config)
    written.init_lora_weights = True  # what is saved fits the pretrained W: nobody shall take the start out again
    try:
        factors, targets = folded(model), modules(model)
        fused = any(map(on_part, sites(model)))
        found = {m: sum(len(factors[s.name][0]) for s in here if s.name in factors) for m, here in targets.items()}
        describe(written, {m: (found[m], alpha(here[0], found[m])) for m, here in targets.items()})
        # sorted: sets of words have another order in each process, and equal runs shall leave equal files
        for option in ("target_modules", "modules_to_save"):
            if isinstance(names := getattr(written, option), set):
                setattr(written, option, sorted(names))
        if fused:
            written.target_modules = list(targets)
        # Embeddings belong to the base; asking PEFT to find out would make it look for the base model on the hub.
        state = state_of(model, factors)
        written.start_written = None  # this state is no live one
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False, selected_adapters=[name])
    finally:
        model.peft_config[name] = config
    made = folder if name == "default" else folder / name
    if fused:
        file = made / WEIGHTS
        file.write_bytes(to_bytes(joined(targets, from_bytes(file.read_bytes())), {"format": "pt"}))
    return made


def load(model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
    """Put what `save` wrote onto the base `model`, for inference.

    Raises:
        InputError: if the folder holds no adapter, a damaged one, a checkpoint of a training instead, or one that does
            not fit this model.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (CONFIG, DESCRIPTION)):
        raise InputError(f"{folder} holds no adapter: neither {CONFIG} nor {DESCRIPTION} is there")
    check_files(folder)
    weights = _read(folder)
    if (folder / CONFIG).is_file():
        if live := [name for name in weights if LIVE.search(name)]:
            raise InputError(
                f"{folder} holds the state of a training ({live[0]}) and no finished adapter: resume from it, and "
                "write the adapter by rankwise.save(model, folder)"
            )
        try:
            return PeftModel.from_pretrained(model, str(folder))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise _unfit(folder, error) from error
    try:
        description = read_json(folder / DESCRIPTION)
        settings, head = description["method"], description["head"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / DESCRIPTION} is damaged: save the adapter again") from error
    model = build(settings).attach(model, head)
    named = dict(model.named_parameters(remove_duplicate=False))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if strange := (weights.keys() & named.keys()) ^ trainable | weights.keys() - model.state_dict().keys():
        raise InputError(f"{folder} does not fit this model: {min(strange)} is on one side only")
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise _unfit(folder, error) from error
    return model.eval()


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {WEIGHTS}: save the adapter again") from error
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} is damaged ({error}): save the adapter again") from error


def _unfit(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder} does not fit this model: {' '.join(str(error).split())[:300]}")
