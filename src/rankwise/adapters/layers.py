"""What an adapter on disk consists of: the layers it adapts, and the tensors of each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapters.tensors import Tensors
from rankwise.errors import InputError


@dataclass(frozen=True)
class Factors:
    """One adapted layer: ΔW = scale · B A.

    Attributes:
        A: (r, in); of a convolution in = channels · kernel, of an embedding in = tokens.
        B: (out, r).
        kernel: the size of a convolution's kernel, () for any other layer.
        embedding: whether it adapts an embedding, whose ΔW is (tokens, dimensions): the transpose of B A.
    """

    A: Tensor
    B: Tensor
    scale: float
    kernel: tuple[int, ...] = ()
    embedding: bool = False

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def cost(self) -> int:
        """Parameters of one unit of rank: in + out."""
        return self.A.shape[1] + self.B.shape[0]

    @property
    def limit(self) -> int:
        """The largest useful rank: min(in, out)."""
        return min(self.A.shape[1], self.B.shape[0])


@dataclass(frozen=True)
class Layer:
    """An adapted layer in a file.

    Attributes:
        parts: what a tensor is (A, B, alpha, bias, magnitude) -> its name in the file.
        scale: s in ΔW = s · B A.
        rank: r, without the zeros that pad it in the file.
        size: (in, out), as in `Factors`.
        kernel, embedding: as in `Factors`.
        fixed: why its rank cannot change; empty where it can.
    """

    parts: Mapping[str, str]
    scale: float
    rank: int
    size: tuple[int, int]
    kernel: tuple[int, ...] = ()
    embedding: bool = False
    fixed: str = ""


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter on disk. Its tensors stay there until they are asked for.

    Attributes:
        path: the folder, or the file where the format has no folder.
        format: whose names its tensors have: "peft", "kohya", "diffusers" or "comfyui".
        config: the fields of PEFT's LoraConfig; None for a single file, as all but PEFT's are.
        tensors: all tensors by their names in the file.
        layers: the adapted layers by name: that of the base model's module, as far as the format has it.
        others: names of the tensors that belong to no adapted layer: heads, biases, embeddings, statistics.
    """

    path: Path
    format: str
    config: dict[str, Any] | None
    tensors: Tensors
    layers: dict[str, Layer]
    others: list[str]

    @property
    def names(self) -> list[str]:
        """The adapted layers whose rank can change, in the order of the model; `write` keeps the others as they are."""
        return [name for name, layer in self.layers.items() if not layer.fixed]

    def rank(self, name: str) -> int:
        return self.layers[name].rank

    def cost(self, name: str) -> int:
        """Parameters of one unit of rank: in + out."""
        return sum(self.layers[name].size)

    def limit(self, name: str) -> int:
        """The largest useful rank: min(in, out)."""
        return min(self.layers[name].size)

    def factors(self, name: str) -> Factors:
        """A and B of a layer, read from the file. InputError where its rank cannot change."""
        layer = self.layers[name]
        if layer.fixed:
            raise InputError(f"{self.path}: the rank of {name} cannot change: {layer.fixed}")
        A, B = (self.factor(name, part).flatten(1) for part in ("A", "B"))
        return Factors(A, B, layer.scale, layer.kernel, layer.embedding)

    def factor(self, name: str, part: str) -> Tensor:
        """A or B of a layer in the shape of the file, without padding. InputError where that is not zero."""
        layer, dim = self.layers[name], "AB".index(part)
        whole = self.tensors[layer.parts[part]]
        if layer.fixed and layer.kernel:  # groups: B has fewer columns than units
            return whole
        kept, padding = whole.split([layer.rank, whole.shape[dim] - layer.rank], dim)
        if padding.any():
            raise InputError(
                f"{self.path}: {layer.parts[part]} is not zero beyond rank {layer.rank}, where rankwise had padded it: "
                "load the adapter in PEFT and save it again, which gives all layers the padded rank"
            )
        return kept

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the file."""
        return self.tensors[name]

    def check_linear(self, what: str) -> None:
        """Raise InputError if the adapter adds more to a layer than s · B A, so that `what` would be wrong."""
        for name, layer in self.layers.items():
            for part, kind in (("magnitude", "a magnitude (DoRA)"), ("bias", "a bias of its own (lora_bias)")):
                if part in layer.parts:
                    raise InputError(f"{self.path}: {name} has {kind} besides A and B, and {what} has no room for it")


def in_order(name: str) -> list[tuple[int, str]]:
    """For sorting the names of layers: numbers by their size, so that layer 10 comes after layer 2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def sizes(where: Path, name: str, parts: Mapping[str, str], tensors: Tensors) -> Layer:
    """The layer whose tensors are `parts`, with its scale still to be set to another number than 1.

    Raises:
        InputError: A or B is missing, or their shapes do not fit each other.
    """
    for part in ("A", "B"):
        if part not in parts:
            raise InputError(f"{where}: has {next(iter(parts.values()))}, but no {part} of that layer")
    a, b = (tensors.shape[parts[part]] for part in ("A", "B"))
    rank, inputs, fixed = a[0] if a else 0, prod(a[1:]), ""
    fits = 2 <= len(a) == len(b) and 0 not in (*a, *b) and all(size == 1 for size in b[2:])
    if fits and len(a) > 2 and rank % b[1] == 0 and rank != b[1]:
        fixed = "it is a convolution with groups"
    elif not fits or rank != b[1]:
        raise InputError(f"{where}: the shapes of {name} do not match: A is {[*a]} and B is {[*b]}")
    for part in ("A", "B"):
        if not tensors.dtype[parts[part]].is_floating_point:
            raise InputError(f"{where}: {parts[part]} holds codes, not numbers: de-quantise it first")
    return Layer(parts, 1.0, rank, (inputs, b[0]), a[2:], fixed=fixed)
