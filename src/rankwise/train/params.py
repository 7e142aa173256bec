"""How many parameters a method trains on a known architecture, counted on the meta device, without weights."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
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
    """Parameters of a model with a method attached. A classifier's head counts as trainable only if it is named.

    Attributes:
        trainable: at the start.
        head: the part of `trainable` in the head.
        final: the most that train after the last rank change, including the head; None if training decides.
        total: all of the base, including its head, and all that was added, frozen or not.
        per_site: {"name", "rank", "parameters"} for every site; for a method without sites for every module that
            trains, with rank None. Only what trains is counted.
        other: {"name", "parameters"} of modules that train in addition to the sites: the head, ω.
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
        """As `rankwise params --json` prints it."""
        counts = {key: getattr(self, key) for key in ("trainable", "final", "total", "percent", "head")}
        return {**counts, "per_site": self.per_site, "other": self.other}


def count(arch: Arch, method: Method, head: Sequence[str] = ()) -> Count:
    """Attach `method` to the model of `arch` on the meta device and count.

    Args:
        head: modules that train in full, matched by the ends of their names.

    Raises:
        InputError: options that do not fit the architecture, such as a target that it does not have.
    """
    # PEFT warns about merging adapters on tied weights and the like, but here they are only counted.
    with quiet(), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model: Any = build(arch)
        named = head_names(model, head)
        named_ids = {id(p) for name in named for p in model.get_submodule(name).parameters()}
        # a classifier's modules that are new with each task; a language model's output layer is part of the model
        classifier = type(model).__name__.endswith("ForSequenceClassification")
        unnamed = [name for name in (head_modules(model, set()) if classifier else []) if name not in named]
        model = method.attach(model, [*named, *unnamed])
        final = method.final(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    excluded = {
        name: p.numel()
        for name, p in trained
        if id(p) not in named_ids and any(f"{_module(name)}.".startswith(f"{part}.") for part in unnamed)
    }
    trained = [(name, p) for name, p in trained if name not in excluded]
    owners = {id(p): site.name for site in sites(model) if site.present for p in (site.A, site.B)}
    by_module: Counter[str] = Counter()
    for name, p in trained:
        by_module[owners.get(id(p)) or _module(name)] += p.numel()
    per_site = [{"name": s.name, "rank": s.rank, "parameters": by_module.pop(s.name, 0)} for s in sites(model)]
    other = [{"name": name, "parameters": number} for name, number in by_module.items()]
    return Count(
        trainable=sum(p.numel() for _, p in trained),
        head=sum(p.numel() for name, p in trained if id(p) in named_ids or COPY in name),
        final=None if final is None else final - sum(excluded.values()),
        total=sum(p.numel() for name, p in model.named_parameters() if ORIGINAL not in name),
        per_site=per_site or [{"name": o["name"], "rank": None, "parameters": o["parameters"]} for o in other],
        other=other if per_site else [],
    )


COPY, ORIGINAL = ".modules_to_save.", ".original_module."
"""PEFT trains a copy of a head, and keeps the original."""


def build(arch: Arch) -> nn.Module:
    """The model of `arch` on the default device, with random weights unless that is meta."""
    config = transformers.AutoConfig.for_model(**arch.config)
    return getattr(transformers, arch.built_as)(config)


def _module(name: str) -> str:
    """The base model's module of the parameter `name`, without PEFT's wrappers."""
    module = name.removeprefix("base_model.model.").removeprefix("base_model.").rpartition(".")[0]
    return re.sub(r"\.modules_to_save\.\w+|\.lora_\w+(\..*)?$|\.base_layer$", "", module) or name
