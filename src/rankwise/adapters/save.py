"""Saving and loading what was learnt: as a plain PEFT adapter with its ranks if the method is a kind of LoRA."""

import json
import shutil
import warnings
from collections.abc import Sequence, Set
from contextlib import nullcontext, suppress
from copy import copy
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, get_args

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rankwise.adapters import card
from rankwise.adapters.auto import task
from rankwise.adapters.beside import write_tokenizer
from rankwise.adapters.card import Base, Facts
from rankwise.adapters.layers import Layer, StoredAdapter
from rankwise.adapters.layouts import (
    Layout,
    compact,
    ends_of,
    exact_targets,
    one_rank,
    portable,
    sparse,
    targeted,
)
from rankwise.adapters.peft_folder import PADDED, STATE, own_targets, why_unread
from rankwise.adapters.plain import base_tensors, folded, joined, modules, on_part, state_of
from rankwise.adapters.stored import stored
from rankwise.adapters.tensors import Tensors
from rankwise.errors import InputError, require
from rankwise.files import ADAPTER, check_files, check_replaceable, read_json, replace_folder, unfinished
from rankwise.methods import Method, build
from rankwise.methods.peer import DRAWN_AGAIN
from rankwise.methods.targets import check_bare
from rankwise.nets.new_weights import buffers, new_weights
from rankwise.ranks.kept import adapters_subtracted, merged_sites, peft_residual_start, start_of
from rankwise.ranks.peft_records import alpha, record, write_ranks
from rankwise.ranks.sites import peft_model, sites
from rankwise.ranks.triplets import to_lora, triplets
from rankwise.runs.use import Use

CONFIG, DESCRIPTION, WEIGHTS, CARD = ADAPTER[:4]
REPEATABLE = ("pissa", "olora")
"""PEFT's starts that change the base weights, and change them again in the same way when the adapter is loaded."""


def save(
    model: nn.Module,
    folder: str | PathLike[str],
    method: Method | None = None,
    head: Sequence[str] = (),
    use: Use | None = None,
    tokenizer: Any = None,
    facts: Facts | None = None,
    *,
    layout: Layout | None = None,
) -> Path:
    """Write the adapter to `folder`, completely or not at all.

    A PEFT model is written as PEFT does, except where that would not give the same outputs in PEFT without rankwise: ω
    is folded into the file (not into the model), sites of rank 0 are left out, adapters on parts of a fused projection
    become one on the whole, and weights that the model's checkpoint does not have are included (`new_weights`). For
    methods without an adapter (such as `head`), what trains, such weights and buffers are written, together with
    `method` and `head`, and `rankwise.load` reads them. A model card says what it is and how to load it; one of the
    user's stays.

    Args:
        use: what must be known to use it, for `rankwise predict` and `evaluate`.
        tokenizer: written beside it.
        facts: for the card.
        layout: for other programs than PEFT. `compact` has the scales in B, so that one alpha is enough; `portable` one
            rank for all layers, padded with zeros, so that most programs read it right. Without, portable where the
            ranks differ and the layers can be padded. An adapter on half or fewer of the layers that portable would
            have gets one rank for its own layers alone. All else is compact. PEFT's variants that are not the product
            of A and B alone keep PEFT's own layout.

    Raises:
        InputError: products were merged into the base weights (`empty: merge`), a model without adapter is given
            without its method, the base weights were changed by a start that PEFT cannot repeat or by that of another
            adapter, the layout does not fit the adapter, or `folder` is a file or holds something other than an
            adapter, which would be lost.
    """
    layouts = get_args(Layout)
    require(layout in (None, *layouts), f"layout is {layout!r}, but must be one of {', '.join(layouts)}")
    folder = Path(folder)
    check_replaceable(folder, {*ADAPTER}, "an adapter")
    with suppress(TypeError):
        model = peft_model(model)  # out of its wrappers
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder, folder=True) as temporary:
        written = temporary / "adapter"
        written.mkdir()
        base, ranks = Base.of(model, use), dict[str, int]()
        if isinstance(model, PeftModel):
            if triplets(model):  # AdaLoRA
                model = to_lora(model)
            plain = _save_adapter(model, written)
            ranks, written = card.stored_ranks(plain), _laid_out(model, plain, layout)
        elif method is not None:
            also = new_weights(model)
            description = {"method": {"name": method.name, **asdict(method)}, "head": list(head), "also": also}
            save_file(_learnt(model, also), written / WEIGHTS)
            (written / DESCRIPTION).write_text(json.dumps(description, indent=2))
        else:
            raise InputError("this model has no adapter: pass the method that trained it, save(model, folder, method)")
        if use is not None:
            use.write(written)
        if tokenizer is not None:
            write_tokenizer(tokenizer, model, written)
        if card.users(folder):
            shutil.copyfile(folder / CARD, written / CARD)
        else:
            (written / CARD).write_text(card.text(written, base, ranks, use, facts), encoding="utf-8")
        replace_folder(folder, written)
    return folder


@torch.no_grad()
def settle(model: PeftModel) -> None:
    """Give a folded model the scales and the numbers that `load` reads from what `save` writes, to the last bit.

    A run is scored after that, so that what it has saved has its scores. Models whose sites are not all plain LoRA stay
    as they are; `save` writes these in PEFT's own layout, or joined.
    """
    live = [site for site in sites(model) if site.present]
    plain = not why_unread(model.peft_config[model.active_adapter].to_dict())
    if not live or not plain or any(on_part(s) or s.scale is not None or start_of(s) is not None for s in live):
        return
    if any(getattr(site.layer, "lora_bias", {}).get(site.adapter) for site in live):
        return
    with TemporaryDirectory() as temporary:
        _take(model, stored(save(model, Path(temporary) / "adapter")))


@torch.no_grad()
def _take(model: PeftModel, like: StoredAdapter) -> None:
    """The scales and B of `like`, without padding: it may have put a part of a scale into B, and rounded that."""
    for site in sites(model):
        layer = like.layers.get(site.name)
        if layer is not None and site.present and not layer.fixed:
            site.B.copy_(like.factor(site.name, "B").reshape(site.B.shape))
            site.layer.scaling[site.adapter] = layer.scale
            site.layer.lora_alpha[site.adapter] = alpha(site, site.rank)


def _learnt(model: nn.Module, also: Sequence[str]) -> dict[str, Tensor]:
    """What trains, each tensor under one name, the parameters named in `also`, and all buffers in the state dict."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    more = {name: parameters[name].detach() for name in also if name not in trained}
    return {name: value.clone().contiguous() for name, value in {**trained, **more, **buffers(model)}.items()}


def _save_adapter(model: PeftModel, folder: Path) -> Path:
    """Save the active adapter and return its folder: a subfolder of its name, except for `default`."""
    name = model.active_adapter
    _check_base(model, name)
    original: Any = model.peft_config[name]
    model.peft_config[name] = config = copy(original)
    factors, targets = folded(model), modules(model)
    try:
        if targets:
            by_site = {s.name: len(factors[s.name][0]) if s.name in factors else s.rank for s in sites(model)}
            ranks = {module: sum(by_site[s.name] for s in on_it) for module, on_it in targets.items()}
            records = {module: (ranks[module], alpha(on_it[0], ranks[module])) for module, on_it in targets.items()}
            write_ranks(config, records, model, [*by_site])
            if factors:  # the file fits the pretrained W, so PEFT must not subtract a start again
                config.init_lora_weights = True
            config.task_type = config.task_type or task(model)
        # sorted: the order of sets differs between processes, but equal runs must write equal files
        for option, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, option, sorted(value))
        # Embeddings belong to the base; to decide that by itself PEFT would look for the base model on the hub.
        state = state_of(model, factors) if targets else None
        config.start_written = None  # this is a finished adapter
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False, selected_adapters=[name])
    finally:
        model.peft_config[name] = original
    written = folder if name == "default" else folder / name
    file = written / WEIGHTS
    stored = from_bytes(file.read_bytes())
    tensors = joined(targets, stored)
    tensors.update({name: value for name, value in base_tensors(model).items() if name not in tensors})
    if tensors.keys() != stored.keys():
        file.write_bytes(to_bytes(tensors, {"format": "pt"}))
    return written


def _laid_out(model: PeftModel, written: Path, layout: Layout | None) -> Path:
    """The folder of the adapter in `written` in another layout: that one, if the adapter is not plain LoRA."""
    config = _read(written / CONFIG)
    if why := why_unread(config):
        require(layout != "portable", f"this adapter cannot be written as portable: {why}")
        return written
    try:
        like, out = stored(written), written.with_name(f"{written.name} laid out")
    except InputError:  # it has tensors of a variant that is not known here
        if layout:
            raise
        return written
    base, layers = model.get_base_model(), dict[str, Layer]()
    cannot = nullcontext() if layout == "portable" else suppress(InputError)  # a layer that cannot be padded
    with cannot:
        layers = targeted(base, config, ends_of(like.layers), written)
    few = layout is None and sparse(like, layers)
    own = own_targets(config) or [*like.layers]
    targets = exact_targets(base, like) if like.layers.keys() & {*own} else own
    missing = len(layers.keys() - like.layers.keys()) if layers else None
    with cannot:
        if layers and layout != "compact" and not few and (layout or not one_rank(like, layers)):
            return portable(out, like, layers)
        if few:
            return compact(out, like, targets=targets, left_out=missing, level=True)
    return compact(out, like, targets=targets, left_out=missing)


def _check_base(model: PeftModel, name: str) -> None:
    """Raise InputError if the base weights are no longer those into which the adapter `name` will be loaded."""
    if names := merged_sites(model):
        raise InputError(
            f"the product of {names[0]} ({len(names)} layers in total) was merged into the base weights, which an "
            "adapter does not contain: save model.merge_and_unload(), or train with empty=drop"
        )
    by_peft = [other for other in model.peft_config if peft_residual_start(model, other)]
    if others := [other for other in (*adapters_subtracted(model), *by_peft) if other != name]:
        raise InputError(
            f"the adapter {others[0]!r} has a residual start, subtracted from the base weights that {name!r} was "
            "trained on: attach each of them to its own base model"
        )
    start = peft_residual_start(model, name)
    if start and start.lower() not in REPEATABLE:
        raise InputError(
            f"the start {start} has changed the base weights, which PEFT cannot repeat from the adapter: save "
            "model.merge_and_unload(), or use PEFT's save_pretrained with path_initial_model_for_weight_conversion"
        )


def load(model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
    """Load what `save` wrote into the base `model`, for inference.

    Raises:
        InputError: the model already has an adapter, or the folder holds none, a damaged one, a training checkpoint, or
            one that does not fit the model: both must have the same tensors, of the same shapes. The model may then be
            partly adapted.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (CONFIG, DESCRIPTION)):
        raise InputError(f"{folder} holds no adapter: it has neither {CONFIG} nor {DESCRIPTION}")
    check_files(folder)
    check_bare(model)
    if not (folder / CONFIG).is_file():
        return _load_learnt(model, folder, _read(folder / DESCRIPTION), _weights(folder))
    settings, weights = _read(folder / CONFIG), _weights(folder)
    if why_unread(settings) or PADDED not in Tensors([folder / WEIGHTS]).metadata:
        return _load_adapter(model, folder, folder, settings, weights)
    like = stored(folder)
    with TemporaryDirectory() as temporary:
        unpadded = compact(Path(temporary) / "adapter", like, targets=exact_targets(model, like))
        loaded = _load_adapter(model, folder, unpadded, settings, _weights(unpadded))
    _take(loaded, like)  # what the file has, and not what a compact one would round it to
    record(loaded, sites(loaded))
    return loaded


@torch.no_grad()
def _load_adapter(
    model: nn.Module, folder: Path, files: Path, settings: dict[str, Any], weights: dict[str, Tensor]
) -> PeftModel:
    """Load the adapter in `files`; messages name `folder`."""
    if live := [name for name in weights if STATE.search(name)]:
        raise InputError(
            f"{folder} holds the state of a training ({live[0]}), not a finished adapter: resume from it, and write "
            "the adapter with rankwise.save(model, folder)"
        )
    if str(settings.get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{folder / CONFIG} is damaged, its peft_type is {settings.get('peft_type')!r}: save the adapter again"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys|.* keys did not match")  # errors below
            warnings.filterwarnings("ignore", DRAWN_AGAIN)
            loaded = PeftModel.from_pretrained(model, str(files))
        stored = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unfit(folder, error) from error
    known = stored.keys()
    _check_keys(folder, known - weights.keys(), weights.keys() - known - loaded.state_dict().keys())
    for name, value in stored.items():
        if not torch.equal(value, weights[name].to(value)):  # renamed by PEFT on the way, as for Laguna, and not found
            value.copy_(weights[name])
    return loaded


def _load_learnt(model: nn.Module, folder: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    try:
        method, head, also = build(settings["method"]), settings["head"], settings.get("also", [])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / DESCRIPTION} is damaged: save the adapter again") from error
    model = method.attach(model, head)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    expected |= buffers(model).keys() | {*also}
    _check_keys(folder, expected - weights.keys(), weights.keys() - expected)
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise _unfit(folder, error) from error
    return model.eval()


def _check_keys(folder: Path, model_only: Set[str], file_only: Set[str]) -> None:
    """Raise InputError if a tensor is only in the model or only in the file."""
    if unmatched := model_only | file_only:
        first = min(unmatched)
        side = "file" if first in file_only else "model"
        raise InputError(
            f"{folder} does not fit this model: {first} is only in the {side} ({len(unmatched)} such tensors); load it "
            "into the model that it was trained on"
        )


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a saved adapter."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged, it holds no JSON object: save the adapter again")
    return content


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
