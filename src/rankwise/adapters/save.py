"""Saving what was learnt: a plain PEFT adapter wherever the method is LoRA-shaped, folded, with its mixed ranks."""

import json
import re
import shutil
import warnings
from collections.abc import Sequence, Set
from contextlib import suppress
from copy import copy
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rankwise.adapters.auto import task
from rankwise.adapters.plain import beside, folded, joined, modules, state_of
from rankwise.errors import InputError
from rankwise.files import ADAPTER, as_new, check_files, check_replaceable, read_json, unfinished
from rankwise.methods import Method, build
from rankwise.methods.targets import check_bare
from rankwise.nets.new_weights import buffers, new_weights
from rankwise.ranks.kept import adapters_subtracted, merged_sites, peft_residual_start
from rankwise.ranks.peft_records import alpha, write_ranks
from rankwise.ranks.sites import peft_model, sites
from rankwise.ranks.triplets import to_lora, triplets

CONFIG, DESCRIPTION, WEIGHTS, _ = ADAPTER
LIVE = re.compile(r"\.(?:lora_start|lora_omega|lora_merged|parametrizations)\b")
"""Names of tensors that a training needs and plain LoRA does not have."""
FOUND_AGAIN = ("pissa", "olora")
"""PEFT's starts that change the base weights, and do so again in the same way when the adapter is loaded."""


def save(model: nn.Module, folder: str | PathLike[str], method: Method | None = None, head: Sequence[str] = ()) -> Path:
    """Write the adapter to `folder`, all of it or nothing.

    Of a PEFT model this is what PEFT itself would write, with changes where that would not give the same outputs in
    stock PEFT without rankwise: ω is folded into what is written (the model itself stays as it is), sites of rank 0 are
    left out, those on parts of a fused projection become one adapter on the whole of it, and weights of the model that
    its checkpoint does not give come along (`new_weights`). For methods that are no adapter (`head`), `method` and
    `head` say what to rebuild, and `rankwise.load` reads it; what trains is written then, such weights, and buffers,
    such as the statistics of a normalisation.

    Raises:
        InputError: if products were merged into the base weights (`empty: merge`), if a model without adapter comes
            without its method, if the base weights have been changed by a start that cannot be found again or by
            another adapter's, or if `folder` is a file or holds other things than an adapter, which would be lost.
    """
    folder = Path(folder)
    check_replaceable(folder, {*ADAPTER}, "an adapter")
    with suppress(TypeError):
        model = peft_model(model)  # out of its wrappers
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder, folder=True) as around:
        made = around / "adapter"
        made.mkdir()
        if isinstance(model, PeftModel):
            if triplets(model):  # AdaLoRA
                model = to_lora(model)
            made = _save_adapter(model, made)
        elif method is not None:
            also = new_weights(model)
            description = {"method": {"name": method.name, **asdict(method)}, "head": list(head), "also": also}
            save_file(_learnt(model, also), made / WEIGHTS)
            (made / DESCRIPTION).write_text(json.dumps(description, indent=2))
        else:
            raise InputError("this model has no adapter: say which method trained it, save(model, folder, method)")
        as_new(made)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _learnt(model: nn.Module, also: Sequence[str]) -> dict[str, Tensor]:
    """What trains, each tensor under one name, the parameters `also`, and all buffers of the model's state."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    more = {name: parameters[name].detach() for name in also if name not in trained}
    return {name: value.clone().contiguous() for name, value in {**trained, **more, **buffers(model)}.items()}


def _save_adapter(model: PeftModel, folder: Path) -> Path:
    """Save the active adapter, and return where in `folder` PEFT put it: in a folder of its name, unless `default`."""
    name = model.active_adapter
    _check_base(model, name)
    config: Any = model.peft_config[name]
    model.peft_config[name] = written = copy(config)
    factors, targets = folded(model), modules(model)
    try:
        if targets:
            ranks = {s.name: len(factors[s.name][0]) if s.name in factors else s.rank for s in sites(model)}
            found = {module: sum(ranks[s.name] for s in here) for module, here in targets.items()}
            write_ranks(written, {m: (found[m], alpha(here[0], found[m])) for m, here in targets.items()}, model)
            if factors:  # what is written fits the pretrained W: nobody shall take a start out of it again
                written.init_lora_weights = True
            written.task_type = written.task_type or task(model)
        # sorted: sets of words have another order in each process, and equal runs shall leave equal files
        for option, value in vars(written).items():
            if isinstance(value, set):
                setattr(written, option, sorted(value))
        # Embeddings belong to the base; asking PEFT to find out would make it look for the base model on the hub.
        state = state_of(model, factors) if targets else None
        written.start_written = None  # this state is no live one
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False, selected_adapters=[name])
    finally:
        model.peft_config[name] = config
    made = folder if name == "default" else folder / name
    file = made / WEIGHTS
    stored = from_bytes(file.read_bytes())
    whole = joined(targets, stored)
    whole.update({name: value for name, value in beside(model).items() if name not in whole})
    if whole.keys() != stored.keys():
        file.write_bytes(to_bytes(whole, {"format": "pt"}))
    return made


def _check_base(model: PeftModel, name: str) -> None:
    """Raise InputError where the base weights are no longer those that the adapter `name` will be put on."""
    if names := merged_sites(model):
        raise InputError(
            f"the product of {names[0]} ({len(names)} sites in all) was merged into the base weights, so an adapter "
            "alone would not give this model; save model.merge_and_unload(), or train with empty=drop"
        )
    others = [other for other in model.peft_config if peft_residual_start(model, other)]
    if strange := [other for other in (*adapters_subtracted(model), *others) if other != name]:
        raise InputError(
            f"the adapter {strange[0]!r} has a residual start, which is taken out of the base weights that {name!r} "
            "was trained on: attach each of them to a base model of its own"
        )
    begun = peft_residual_start(model, name)
    if begun and begun.lower() not in FOUND_AGAIN:
        raise InputError(
            f"the start {begun} has changed the base weights, and PEFT cannot repeat that from the adapter alone: save "
            "model.merge_and_unload(), or use PEFT's save_pretrained with path_initial_model_for_weight_conversion"
        )


def load(model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
    """Put what `save` wrote onto the base `model`, for inference.

    Raises:
        InputError: if the model has an adapter already, if the folder holds none, a damaged one, a checkpoint of a
            training instead, or one that does not fit this model: each tensor must be in both, and have one shape. The
            model may then be half adapted.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (CONFIG, DESCRIPTION)):
        raise InputError(f"{folder} holds no adapter: neither {CONFIG} nor {DESCRIPTION} is there")
    check_files(folder)
    check_bare(model)
    adapter = (folder / CONFIG).is_file()
    settings, weights = _read(folder / (CONFIG if adapter else DESCRIPTION)), _weights(folder)
    return (_load_adapter if adapter else _load_learnt)(model, folder, settings, weights)


def _load_adapter(model: nn.Module, folder: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    if live := [name for name in weights if LIVE.search(name)]:
        raise InputError(
            f"{folder} holds the state of a training ({live[0]}), not a finished adapter: resume from it, and "
            "write the adapter by rankwise.save(model, folder)"
        )
    if str(settings.get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(f"{folder / CONFIG} is damaged: its peft_type is {settings.get('peft_type')!r}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys|.* keys did not match")  # errors below
            loaded = PeftModel.from_pretrained(model, str(folder))
        missing = get_peft_model_state_dict(loaded, save_embedding_layers=False).keys() - weights.keys()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unfit(folder, error) from error
    _check_keys(folder, missing, weights.keys() - _known(loaded))
    return loaded


def _known(model: PeftModel) -> set[str]:
    """The names by which a file can speak of tensors of `model`, its adapter's and its own."""
    stored = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    return {*stored, *model.state_dict()}


def _load_learnt(model: nn.Module, folder: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    try:
        method, head, also = build(settings["method"]), settings["head"], settings.get("also", [])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / DESCRIPTION} is damaged: save the adapter again") from error
    model = method.attach(model, head)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted |= buffers(model).keys() | {*also}
    _check_keys(folder, wanted - weights.keys(), weights.keys() - wanted)
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise _unfit(folder, error) from error
    return model.eval()


def _check_keys(folder: Path, model_only: Set[str], file_only: Set[str]) -> None:
    """Raise InputError where a tensor is on one side only."""
    if strange := model_only | file_only:
        first = min(strange)
        side = "file" if first in file_only else "model"
        raise InputError(
            f"{folder} does not fit this model: {first} is in the {side} only ({len(strange)} such in all)"
        )


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a saved adapter."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged, it holds no JSON object: save the adapter again")
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {WEIGHTS}: save the adapter again") from error
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} is damaged ({error}): save the adapter again") from error


def _unfit(folder: Path, error: Exception) -> InputError:
    reason = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)
    return InputError(f"{folder} does not fit this model: {shorten(reason, 300, placeholder=' …')}")
