"""How many parameters a method trains on a known architecture, counted on the meta device: no weights, no memory."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from rankwise.archs import Arch
from rankwise.methods import Method
from rankwise.methods.targets import head_names
from rankwise.ranks import sites
from rankwise.train.model import head_modules, quiet


@dataclass(frozen=True)
class Count:
    """Parameters of a model with a method attached. A classifier's head counts as trainable only where it is named.

    Attributes:
        trainable: at the start.
        head: those of `trainable` that are in the head.
        final: the most that train once the structure has settled, the head's among them; None where training decides.
        total: all of the base, its head included, and all that was added, frozen or not.
        per_site: {"name", "rank", "parameters"} for every site; for a method without sites what trains, module by
            module, with rank None. Only what trains is counted.
        other: {"name", "parameters"} of what trains beside the sites, module by module: the head, ω.
    """

    trainable: int
    head: int
    final: int | None
    total: int
    per_site: list[dict[str, Any]]
    other: list[dict[str, Any]]

    @property
    def percent(self) -> float:
        """100 · trainable / total."""
        return 100 * self.trainable / self.total

    def as_json(self) -> dict[str, Any]:
        """What `rankwise params --json` prints."""
        counts = {key: getattr(self, key) for key in ("trainable", "final", "total", "percent", "head")}
        return {**counts, "per_site": self.per_site, "other": self.other}


def count(arch: Arch, method: Method, head: Sequence[str] = ()) -> Count:
    """Attach `method` to the model of `arch` on the meta device and count.

    Args:
        head: modules that train whole beside the method, matched by the ends of their names.

    Raises:
        InputError: options that do not fit the architecture, such as a target that it has not.
    """
    # PEFT warns of adapters on tied weights and the like, which is about merging them; here only numbers leave.
    with quiet(), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = build(arch)
        named = {id(p) for name in head_names(model, head) for p in model.get_submodule(name).parameters()}
        whole = head_names(model, head)
        own = [name for name in _head(model) if name not in whole]
        model = method.attach(model, [*whole, *own])
        final = method.final(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rest = [(name, p) for name, p in trained if id(p) not in named and _lies_in(own, name)]
    aside = sum(p.numel() for _, p in rest)
    trained = [(name, p) for name, p in trained if name not in dict(rest)]
    owners = {id(p): site.name for site in sites(model) if site.present for p in (site.A, site.B)}
    by_module: Counter[str] = Counter()
    for name, p in trained:
        by_module[owners.get(id(p)) or _place(name)] += p.numel()
    per_site = [{"name": s.name, "rank": s.rank, "parameters": by_module.pop(s.name, 0)} for s in sites(model)]
    other = [{"name": name, "parameters": number} for name, number in by_module.items()]
    return Count(
        trainable=sum(p.numel() for _, p in trained),
        head=sum(p.numel() for name, p in trained if id(p) in named or COPY in name),
        final=None if final is None else final - aside,
        total=sum(p.numel() for p in _once(model)),
        per_site=per_site or [{"name": o["name"], "rank": None, "parameters": o["parameters"]} for o in other],
        other=other if per_site else [],
    )


COPY, ORIGINAL = ".modules_to_save.", ".original_module."
"""PEFT trains a copy of a head and keeps the original beside it."""


def build(arch: Arch) -> nn.Module:
    """The model of `arch` on the default device, with random weights where that is not meta."""
    config = transformers.AutoConfig.for_model(**arch.config)
    return getattr(transformers, arch.built_as)(config)


def _head(model: Any) -> list[str]:
    """The modules of a classifier that are new with each task. What a language model puts out with is its own."""
    classifier = type(model).__name__.endswith("ForSequenceClassification")
    return head_modules(model, set()) if classifier else []


def _lies_in(modules: Sequence[str], name: str) -> bool:
    return any(f"{_place(name)}.".startswith(f"{module}.") for module in modules)


def _once(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for name, p in model.named_parameters() if ORIGINAL not in name)


def _place(name: str) -> str:
    """The module in the base model that a parameter belongs to, by the parameter's name, without PEFT's wrapping."""
    module = name.removeprefix("base_model.model.").removeprefix("base_model.").rpartition(".")[0]
    return re.sub(r"\.modules_to_save\.\w+|\.lora_\w+(\..*)?$|\.base_layer$", "", module) or name
