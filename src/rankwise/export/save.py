"""Saving what was learnt: a plain PEFT adapter wherever the method is LoRA-shaped, folded, with its mixed ranks."""

import json
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
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import nn

from rankwise.config import InputError
from rankwise.export.plain import folded, joined, modules, on_part, state_of
from rankwise.methods import Method, build
from rankwise.ranks.resize import alpha, describe, merged
from rankwise.ranks.sites import adapted, sites
from rankwise.ranks.triplets import to_lora, triplets

DESCRIPTION = "rankwise.json"
WEIGHTS = "adapter_model.safetensors"


def save(
    model: nn.Module, folder: str | PathLike[str], method: Method | None = None, head: Sequence[str] = ()
) -> Path:
    """Write the adapter to `folder`, all of it or nothing.

    A PEFT model becomes a plain PEFT adapter that stock PEFT loads without rankwise: ω is folded into what is written
    (the model itself stays as it is), sites of rank 0 are left out, and those on parts of a fused projection become one
    adapter on the whole of it. For methods that are no adapter (`head`), `method` and `head` say what to rebuild, and
    `rankwise.load` reads it.

    Raises:
        InputError: if products were merged into the base weights (`empty: merge`), if a model without adapter comes
            without its method, or if `folder` holds other things than an adapter, which would be lost.
    """
    folder = Path(folder)
    if folder.exists() and not _holds_adapter(folder) and any(folder.iterdir()):
        raise InputError(f"{folder} holds something else than an adapter; give a new or an empty folder")
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
            trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
            save_file(trained, made / WEIGHTS)
            (made / DESCRIPTION).write_text(json.dumps(description, indent=2))
        else:
            raise InputError("this model has no adapter: say which method trained it, save(model, folder, method)")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _holds_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or (folder / DESCRIPTION).is_file()


def _save_adapter(model: PeftModel, folder: Path) -> Path:
    """Save the active adapter, and return where in `folder` PEFT put it: in a folder of its name, unless `default`."""
    if names := merged(model):
        raise InputError(
            f"the product of {names[0]} ({len(names)} sites in all) was merged into the base weights, so an adapter "
            "alone would not give this model; save model.merge_and_unload(), or train with empty=drop"
        )
    name = model.active_adapter
    config: Any = model.peft_config[name]
    model.peft_config[name] = written = copy(config)
    try:
        factors, targets = folded(model), modules(model)
        fused = any(map(on_part, sites(model)))
        found = {m: sum(len(factors[s.name][0]) for s in here if s.name in factors) for m, here in targets.items()}
        describe(written, {m: (found[m], alpha(here[0], found[m])) for m, here in targets.items()})
        if fused:
            written.target_modules = list(targets)
        # Embeddings belong to the base; asking PEFT to find out would make it look for the base model on the hub.
        state = state_of(model, factors)
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
        InputError: if the folder holds no adapter, or one that does not fit this model.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        try:
            return PeftModel.from_pretrained(model, str(folder))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{folder} does not fit this model: {' '.join(str(error).split())[:300]}") from error
    if not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder} holds no adapter: neither adapter_config.json nor {DESCRIPTION} is there")
    description = json.loads((folder / DESCRIPTION).read_text())
    model = build(description["method"]).attach(model, description["head"])
    weights = load_file(folder / WEIGHTS)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    if set(weights) != trainable:
        raise InputError(f"{folder} does not fit this model: {sorted(set(weights) ^ trainable)[0]} is on one side only")
    model.load_state_dict(weights, strict=False)
    return model.eval()
