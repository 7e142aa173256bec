"""Saving what was learnt: a plain PEFT adapter wherever the method is LoRA-shaped, folded, with its mixed ranks."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from os import PathLike
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankwise.config import InputError
from rankwise.methods import Method, build
from rankwise.ranks.resize import merged
from rankwise.ranks.sites import OMEGA, adapted, sites

DESCRIPTION = "rankwise.json"
WEIGHTS = "adapter_model.safetensors"


def save(
    model: nn.Module, folder: str | PathLike[str], method: Method | None = None, head: Sequence[str] = ()
) -> Path:
    """Write the adapter to `folder`, all of it or nothing.

    A PEFT model becomes a plain PEFT adapter that stock PEFT loads without rankwise: ω is folded into what is written
    (the model itself stays as it is), sites of rank 0 are left out. For methods that are no adapter (`head`), `method`
    and `head` say what to rebuild, and `rankwise.load` reads it.

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
    # Embeddings belong to the base; asking PEFT to find out would make it look for the base model on the hub.
    name = model.active_adapter
    state = folded_state(model)
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False, selected_adapters=[name])
    return folder if name == "default" else folder / name


@torch.no_grad()
def folded_state(model: PeftModel) -> dict[str, Tensor]:
    """The model's state dict as it would be after `fold`, without touching the model."""
    state = {k: v for k, v in model.state_dict().items() if f"base_model.{OMEGA}." not in k}
    for site in sites(model):
        if site.scale is not None:
            path = f"base_model.model.{site.name}."
            A = state.pop(f"{path}lora_A.{site.adapter}.parametrizations.weight.original")
            state[f"{path}lora_A.{site.adapter}.weight"] = A
            state[f"{path}lora_B.{site.adapter}.weight"] = site.B * site.scale.value.to(site.B.dtype)
    return state


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
