"""The kinds of layer that can be adapted: the only place that knows how each stores its weight.

W is read as a matrix (out, in) whatever the layer's own layout, with the factors A (r, in) and B (out, r). For a
convolution A is a convolution with r channels and the layer's kernel, and B one with kernel 1; in the matrices each
entry of the kernel counts as an input. A new kind of layer is a new class here.

This module imports neither PEFT nor transformers, so that `nets.gated` works without them.
"""

import sys
from abc import ABC, abstractmethod
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of weights that are not quantised."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Convolutions that PEFT has no LoRA for."""

Pair = tuple[Any, Any]


class WeightLayer(ABC):
    """A layer with a weight that can be read as a matrix (out, in)."""

    linear: ClassVar[bool] = True
    """Whether it is a linear map, not a convolution."""
    transposed: ClassVar[bool] = False
    """Whether its weight is stored as (in, out), which PEFT calls fan_in_fan_out."""

    def __init__(self, layer: Any):
        self.layer = layer

    @classmethod
    @abstractmethod
    def classes(cls) -> tuple[type[nn.Module], ...]:
        """The classes of this kind of layer."""

    @property
    @abstractmethod
    def features(self) -> tuple[int, int]:
        """(in, out) of the matrix. It may differ from the weight's shape: 4-bit weights are packed into one column."""

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight in the layer's own layout, as a matrix (out, in)."""
        return weight

    def own_layout(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the layout of the layer's weight."""
        return matrix

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """The product of A (r, in) and B (out, r), with as many entries as W."""
        return B @ A

    def factors(self, rank: int, exact: bool = False, **like: Any) -> Pair:
        """Layers for A and B, without bias.

        Args:
            exact: with the layer's groups, dilation and padding mode, which PEFT's layers do not have.
            like: `device` and `dtype`.
        """
        inputs, outputs = self.features
        return nn.Linear(inputs, rank, bias=False, **like), nn.Linear(rank, outputs, bias=False, **like)

    @staticmethod
    def set_rank(A: Any, B: Any, rank: int) -> None:
        """Set the `rank` that the weights of two factors already have as an attribute of their layers."""
        A.out_features = B.in_features = rank

    def add(self, matrix: Tensor) -> None:
        """Add a matrix (out, in) to the layer's weight, in place."""
        weight = self.layer.weight
        weight += self.own_layout(matrix).to(weight)

    def check(self, name: str) -> None:  # noqa: B027 - linear maps always pass
        """Raise InputError for a layer on which PEFT 0.21's factors do not form a matrix BA to add to W."""


class LinearLayer(WeightLayer):
    """torch's linear map."""

    @classmethod
    def classes(cls) -> tuple[type[nn.Module], ...]:
        return (nn.Linear,)

    @property
    def features(self) -> tuple[int, int]:
        return self.layer.in_features, self.layer.out_features


class GPT2Layer(WeightLayer):
    """transformers' Conv1D, the linear map of GPT-2, whose weight is (in, out)."""

    transposed = True

    @classmethod
    def classes(cls) -> tuple[type[nn.Module], ...]:
        module = sys.modules.get("transformers.pytorch_utils")  # if it is not imported, no model has such layers
        return () if module is None else (module.Conv1D,)

    @property
    def features(self) -> tuple[int, int]:
        return self.layer.nx, self.layer.nf

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def own_layout(self, matrix: Tensor) -> Tensor:
        return matrix.T


class ConvolutionLayer(WeightLayer):
    """A convolution that is not transposed."""

    linear = False

    @classmethod
    def classes(cls) -> tuple[type[nn.Module], ...]:
        return nn.Conv1d, nn.Conv2d, nn.Conv3d

    @property
    def features(self) -> tuple[int, int]:
        return self.layer.in_channels * prod(self.layer.kernel_size), self.layer.out_channels

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def own_layout(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.layer.weight.shape)

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """Group by group if the layer has groups: A (r, in / groups), B (out, r / groups)."""
        if (groups := self.layer.groups) == 1:
            return B @ A
        return (B.reshape(groups, -1, B.shape[1]) @ A.reshape(groups, -1, A.shape[1])).flatten(0, 1)

    def factors(self, rank: int, exact: bool = False, **like: Any) -> Pair:
        layer = self.layer
        if not exact:
            kind: Any = type(layer)
            A = kind(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False, **like)
            return A, kind(rank, layer.out_channels, 1, bias=False, **like)
        kind = next(kind for kind in self.classes() if isinstance(layer, kind))
        options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        A = kind(layer.in_channels, rank, layer.kernel_size, bias=False, **options, **like)
        return A, kind(rank, layer.out_channels, 1, bias=False, groups=layer.groups, **like)

    @staticmethod
    def set_rank(A: Any, B: Any, rank: int) -> None:
        A.out_channels = B.in_channels = rank

    def check(self, name: str) -> None:
        if self.layer.groups > 1:
            reason = f"has {self.layer.groups} groups, and PEFT cannot merge an adapter on it"
        elif any(step != 1 for step in self.layer.dilation):
            reason = "is dilated, but PEFT's factors are not"
        elif self.layer.padding_mode != "zeros":
            reason = f"has {self.layer.padding_mode} padding, but PEFT's factors pad with zeros"
        else:
            return
        raise InputError(f"the convolution {name} {reason}; leave it out of targets")


KINDS: tuple[type[WeightLayer], ...] = (LinearLayer, GPT2Layer, ConvolutionLayer)


def weight_layer(module: Any) -> WeightLayer | None:
    """`module` as a layer that can be adapted, or None."""
    return next((kind(module) for kind in KINDS if isinstance(module, kind.classes())), None)


def features(module: Any) -> tuple[int, int]:
    """(in, out) of a layer that can be adapted."""
    layer = weight_layer(module)
    assert layer is not None, f"{type(module).__name__} cannot be adapted"
    return layer.features


def shaped(matrix: Tensor, like: Tensor) -> Tensor:
    """`matrix` reshaped to the kernel of `like` if that is a factor of a convolution."""
    return matrix.reshape(len(matrix), -1, *like.shape[2:]) if like.dim() > 2 else matrix


def holds_codes(weight: Any) -> bool:
    """Whether `weight` is a tensor of quantised codes, as far as its class and dtype show."""
    if not isinstance(weight, Tensor):
        return False
    wrapped = type(weight).__module__.startswith(("bitsandbytes.", "torchao."))  # 4-bit codes may be stored as floats
    return wrapped or weight.dtype not in FLOATS


def keep_codes(model: nn.Module) -> None:
    """Keep bitsandbytes from rewriting 4-bit codes when a model is evaluated on a CPU with AVX512-BF16.

    Version 0.50 then rounds the scales to bf16, lets no gradient through the layer from there on, and fails if the
    layer has a width that is no multiple of 64. What has been rewritten already is turned back, but stays rounded.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # turns it back


def is_quantised(layer: Any) -> bool:
    """Whether the weight of a linear map or convolution holds quantised codes."""
    inputs, outputs = features(layer)
    return holds_codes(layer.weight) or layer.weight.numel() * getattr(layer, "groups", 1) != inputs * outputs


def check_own_weight(model: nn.Module, name: str) -> None:
    """Raise InputError if the weight of the layer `name` cannot take a change: quantised, rounded, or shared."""
    layer: Any = model.get_submodule(name)
    if is_quantised(layer):
        raise InputError(f"{name} is quantised, so its weight cannot change: use empty=drop and no residual start")
    if layer.weight.dtype in (torch.bfloat16, torch.float16):
        kind = str(layer.weight.dtype).removeprefix("torch.")
        raise InputError(
            f"{name} holds {kind} numbers, to which a change would be rounded: load the model in fp32, or use "
            "empty=drop and no residual start"
        )
    if sum(p is layer.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        raise InputError(
            f"{name} shares its weight with another module, which would change too: use empty=drop and no residual "
            "start, or leave it out of targets"
        )
