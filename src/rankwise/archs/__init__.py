"""Configurations of known models, one JSON file each: what their parameters can be counted from without weights.

A file holds `source`, where the numbers are from, and `config`, the part of Hugging Face's config.json that decides
names and shapes. `architectures` names the class that papers fine-tune: a classifier with 2 labels for encoders.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from rankwise.errors import InputError, nearest

_LAYERS, _WIDTH = ("num_hidden_layers", "n_layer", "num_layers"), ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class Arch:
    """A model by its configuration."""

    name: str
    source: str
    config: dict[str, Any]

    @property
    def built_as(self) -> str:
        """Name of the class of transformers."""
        return self.config["architectures"][0]

    @property
    def layers(self) -> int:
        """Blocks of the stack, of each of the two in an encoder-decoder."""
        return next(self.config[key] for key in _LAYERS if key in self.config)

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        return next(self.config[key] for key in _WIDTH if key in self.config)


def archs() -> dict[str, Arch]:
    """All configurations by name."""
    known = {}
    for file in sorted(files(__name__).iterdir(), key=lambda file: file.name):
        name, _, kind = file.name.rpartition(".")
        if kind == "json":
            known[name] = Arch(name, **json.loads(file.read_text(encoding="utf-8")))
    return known


def behind(model: str) -> Arch | None:
    """The configuration of what the hub calls `model`, if it is one of these."""
    return next((arch for arch in archs().values() if arch.source == model), None)


def find(name: str) -> Arch:
    """The configuration called `name`.

    Raises:
        InputError: if there is none.
    """
    known = archs()
    if name not in known:
        raise InputError(f"arch = {name!r}: no such arch{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]
