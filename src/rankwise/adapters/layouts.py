"""The layouts of an adapter with several ranks: which of them each consumer reads right is in `consumers`.

`compact` has the scales in B and `rank_pattern`; it is what `stored.write` writes. `portable` has one rank for all
layers, padded with zeros, and no pattern: it also has the layers of rank 0, since its targets are ends of names. The
ranks without padding are in the metadata of its weights, and `stored` reads those.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rankwise.adapters import consumers
from rankwise.adapters.consumers import CONSUMERS, HEADS, not_served, portable_rank, sglang_fault
from rankwise.adapters.layers import Factors, Layer, StoredAdapter, in_order
from rankwise.adapters.peft_folder import PREFIX, module, said_left_out
from rankwise.adapters.stored import padding, write
from rankwise.errors import InputError
from rankwise.ranks.layers import weight_layer

Layout = Literal["compact", "portable"]


def compact(
    out: Path,
    like: StoredAdapter,
    *,
    force: bool = False,
    targets: Sequence[str] | str | None = None,
    left_out: int | None = None,
    level: bool = False,
) -> Path:
    """Write `like` with the scales in B. Raises as `write` does, whose `targets` and `left_out` these are.

    Args:
        level: pad the layers to the rank of the largest, so that no pattern is needed.
    """
    same, ranks = ((name, like.factors(name)) for name in like.names), {layer.rank for layer in like.layers.values()}
    padded = max(ranks) if level and len(ranks) > 1 else 0
    return write(out, like, same, force=force, padded=padded, targets=targets, left_out=left_out, card=True)


def exact_targets(base: nn.Module, like: StoredAdapter) -> list[str] | str:
    """`target_modules` that mean the layers of `like` in its base model and no others.

    These are their names, or a pattern where other names end as one of them does.
    """
    names = dict.fromkeys(map(module, like.layers))
    for name, _ in base.named_modules():
        parts = name.split(".")
        if name not in names and any(".".join(parts[start:]) in names for start in range(1, len(parts))):
            return "|".join(map(re.escape, names))
    return [*names]


def portable(
    out: Path, like: StoredAdapter, modules: Mapping[str, Layer] | None = None, *, force: bool = False
) -> Path:
    """Write `like` with one rank for all layers.

    Args:
        modules: the layers of the base model that the targets of the new adapter mean, as `targeted` has them; without,
            those that the adapter's own layers have next to them (`neighbours`).

    Raises:
        InputError: as `write`, or a layer cannot be padded.
    """
    rank, ends = max(layer.rank for layer in like.layers.values()), None
    if like.config is None:
        modules = {}
    else:
        modules = neighbours(like) if modules is None else modules
        rank, ends = portable_rank(rank), ends_of([*like.layers, *modules])
    if strange := [name for name in like.layers if modules and name not in modules]:
        raise InputError(f"{like.path}: adapts {strange[0]}, which its base model does not have")
    kind = _dtype(like)

    def factors() -> Iterator[tuple[str, Factors]]:
        for name in like.names:
            yield name, like.factors(name)
        for name in sorted(modules.keys() - like.layers.keys(), key=in_order):
            (inputs, outputs), layer = modules[name].size, modules[name]
            A, B = torch.zeros(0, inputs, dtype=kind), torch.zeros(outputs, 0, dtype=kind)
            yield name, Factors(A, B, 1.0, layer.kernel, layer.embedding)

    return write(out, like, factors(), force=force, padded=rank, targets=ends, card=True)


def one_rank(like: StoredAdapter, modules: Mapping[str, Layer]) -> bool:
    """Whether all that `portable` would have is there already, at one rank."""
    return modules.keys() == like.layers.keys() and len({layer.rank for layer in like.layers.values()}) == 1


def sparse(like: StoredAdapter, modules: Mapping[str, Layer]) -> bool:
    """Whether half of the layers that `portable` would have, or more, are empty: padded, its file would be large."""
    return 2 * len(like.layers) <= len(modules)


def read_as(like: StoredAdapter) -> consumers.Layout:
    """The layout as which programs read a written adapter."""
    if not padding(like) and len({layer.rank for layer in like.layers.values()}) > 1:
        return "compact"
    if (said := said_left_out(like.tensors)) is not None:
        return "gaps" if said else "portable"
    return "portable" if padding(like) or one_rank(like, neighbours(like)) else "gaps"


def not_read(adapter: StoredAdapter) -> dict[str, consumers.Reading]:
    """The programs that do not read the layers of a PEFT adapter right, by name: refused or wrong.

    That follows from its layout. Besides, TGI and LoRAX pad other ranks than those of `portable` and read them wrong
    in all names but the first; and SGLang knows layers by parts of their names, and wants some together.
    """
    layout = read_as(adapter)
    found = {each.name: each.reads(layout) for each in not_served(layout)}
    rank = max(layer.rank for layer in adapter.layers.values())
    plain = layout == "portable" and not padding(adapter) and len(ends_of(adapter.layers)) > 1
    if plain and portable_rank(rank) != rank:
        found |= {each.name: "wrong" for each in CONSUMERS if each.target == "tgi"}
    if fault := in_sglang(adapter):
        found["SGLang"] = fault[0]
    elif layout == "gaps":
        found.pop("SGLang", None)
    return found


def in_sglang(adapter: StoredAdapter) -> tuple[consumers.Reading, str] | None:
    """How SGLang fails to read the layers of an adapter of one rank, and why; None if it reads them right."""
    keys = [key.removeprefix(PREFIX) for key in adapter.tensors.shape if key.endswith(".lora_A.weight")]
    zeros = {key.removesuffix(".lora_A.weight") for key in keys} - adapter.layers.keys()
    return sglang_fault(adapter.layers, zeros)


def unread(adapter: StoredAdapter, to: str) -> str | None:
    """A tensor of a PEFT adapter that the program `to` refuses or ignores: one that is no A or B. None without one."""
    if to not in HEADS:
        return None
    more = [key for layer in adapter.layers.values() for part, key in layer.parts.items() if part not in ("A", "B")]
    for key in adapter.others:
        if not key.endswith(".base_layer.weight") and key.split(".")[-2:-1] not in ([head] for head in HEADS[to]):
            more.append(key)
    return next(iter(more), None)


def reading(adapter: StoredAdapter) -> str:
    """What to know about other programs that read a written adapter, "" where there is nothing to say."""
    if adapter.config is None:
        return ""
    said, found = list[str](), not_read(adapter)
    if padded := padding(adapter):
        said.append(
            f"padded with zeros to rank {adapter.config['r']}, so that programs that expect one rank read it right; "
            f"rankwise export --for peft writes it without, {padded:,} bytes smaller"
        )
    wrong = [each for each in CONSUMERS if found.get(each.name) == "wrong" and each.portable == "right"]
    with_export, with_merge = list[str](), list[str]()
    for each in wrong:
        if unread(adapter, each.target):
            with_merge.append(each.name)
        elif each.target != "sglang":  # what SGLang reads wrongly has no other form
            with_export.append(each.name)
    ways = {"rankwise export writes it in a form that they read right": with_export}
    if read_as(adapter) != "portable":  # at one rank, a head is of a model that they do not serve
        ways["they do not read its other tensors either; rankwise merge makes a model of all"] = with_merge
    said += [f"read wrongly, without an error, by {', '.join(names)}: {way}" for way, names in ways.items() if names]
    return "\n".join(said)


def ends_of(layers: Iterable[str]) -> list[str]:
    """The last parts of the names of layers, with the part before a number, as in `to_out.0`."""
    found = (re.search(r"[^.]+(?:\.\d+)*$", re.sub(r"\.base_layer\..*", "", name)) for name in layers)
    return sorted({each.group() for each in found if each})


def targeted(base: nn.Module, config: Mapping[str, Any], ends: Sequence[str], where: Path) -> dict[str, Layer]:
    """The layers of a base model that PEFT adapts where `target_modules` is `ends`.

    Args:
        base: the model, with an adapter on it or not; its weights are not looked at.

    Raises:
        InputError: an end is the name of something that PEFT cannot adapt.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists

    options = LoraConfig(target_modules=[*ends], modules_to_save=config.get("modules_to_save"))
    inner = tuple(f"{name}." for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer))
    found = {}
    for name, adapted in base.named_modules():
        if name.startswith(inner) or not bool(check_target_module_exists(options, name)):
            continue
        layer: Any = adapted.get_base_layer() if isinstance(adapted, BaseTunerLayer) else adapted
        if isinstance(layer, nn.Embedding):
            found[name] = Layer({}, 1.0, 0, (layer.num_embeddings, layer.embedding_dim), (), True)
        elif (weight := weight_layer(layer)) and getattr(layer, "groups", 1) == 1:
            found[name] = Layer({}, 1.0, 0, weight.features, tuple(getattr(layer, "kernel_size", ())))
        else:
            raise InputError(
                f"{where}: one rank for all would need an adapter on {name}, a {type(layer).__name__} whose name "
                "ends as that of an adapted layer: use the layout compact"
            )
    return found


def neighbours(like: StoredAdapter) -> dict[str, Layer]:
    """The adapted layers, and those that must be next to them: what layer 3 has, layers 0 to the last have too."""
    numbers: dict[str, set[tuple[int, ...]]] = {}
    forms: dict[str, Layer] = {}
    for name, layer in like.layers.items():
        form, own = re.sub(r"\.\d+(?=\.)", ".*", name), tuple(map(int, re.findall(r"\.(\d+)(?=\.)", name)))
        forms.setdefault(form, layer)
        numbers.setdefault(form.rpartition("*")[0], set()).add(own)
    found = dict(like.layers)
    for form, layer in forms.items():
        for own in _filled(numbers[form.rpartition("*")[0]]):
            parts = iter(own)
            found.setdefault(re.sub(r"\*", lambda _: str(next(parts)), form), layer)  # noqa: B023
    return found


def _filled(numbers: set[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """The tuples, and those between them that differ in the last number alone."""
    for first, group in groupby(sorted(numbers), key=lambda each: each[:-1]):
        last = [each[-1] for each in group if each]
        yield from (((*first, number) for number in range(max(last) + 1)) if last else [()])


def _dtype(like: StoredAdapter) -> torch.dtype:
    return like.tensors.dtype[next(iter(like.layers.values())).parts["A"]]
