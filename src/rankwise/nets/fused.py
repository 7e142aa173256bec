"""The parts of a fused projection as layers of their own, so that adapters can sit on q and v alone.

GPT-2 and its kin (OpenAI GPT, ImageGPT, the Decision Transformer) compute query, key and value by one layer `c_attn`
with out = 3 · in, q's outputs first, then k's, then v's. LoRA on GPT-2 (Hu et al. 2021, arXiv 2106.09685, table 3)
adapts those of q and v. `split` gives such a layer three children, on which PEFT puts its own layers:

    c_attn(x) = concat(q(x), k(x), v(x))

The base is still computed by the one layer, so the outputs stay bit for bit what they were: three smaller products
need not round as one does. Its weight and bias stay where they were too, under their names: a split model has the
state dict of an unsplit one.

Only `Conv1D` layers are taken. GPT-BigCode has an `nn.Linear` of this name and shape that goes through q, k and v head
by head.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rankwise.errors import InputError

PARTS = ("q", "k", "v")


class Part(Conv1D):
    """A third of a fused projection: views of its weight (in, out) and bias (out,), and no tensors of its own."""

    def __init__(self, whole: Conv1D, place: int):
        nn.Module.__init__(self)  # Conv1D would draw a weight
        self.nx, self.nf, self.place = whole.nx, whole.nf // len(PARTS), place
        self.whole = (whole,)  # in a tuple, so that torch does not take the parent for a child

    @property
    def columns(self) -> slice:
        """Where the outputs of this part stand among those of the whole."""
        return slice(self.place * self.nf, (self.place + 1) * self.nf)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.whole[0].weight.detach()[:, self.columns].as_subclass(View)

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        return self.whole[0].bias.detach()[self.columns].as_subclass(View)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """The whole has computed the outputs y already, and hands them on through PEFT's layers."""
        return y

    def widened(self, B: Tensor) -> Tensor:
        """A factor of this part, (out, r), as one of the whole, (3 out, r): zeros in the rows of the other parts."""
        return functional.pad(B, (0, 0, self.columns.start, self.whole[0].nf - self.columns.stop))


class View(Tensor):
    """A view that also writes through where `.data` is assigned, as PEFT does when it merges or starts from an SVD."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain

    @property
    def data(self) -> Tensor:
        return self.detach().as_subclass(Tensor)

    @data.setter
    def data(self, new: Tensor) -> None:
        self.data.copy_(new)


class Fused(Conv1D):
    """A fused projection with children q, k and v, each of them a Part or an adapter's layer on one."""

    __repr__ = nn.Module.__repr__  # Conv1D's does not show children

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        places = y.unflatten(-1, (len(PARTS), -1))
        return torch.cat([getattr(self, part)(x, places[..., i, :]) for i, part in enumerate(PARTS)], dim=-1)


def parts(model: nn.Module) -> dict[str, str]:
    """Names of the parts that fused projections of `model` can be split into, and of the projections they are of."""
    fused = [name for name, module in model.named_modules() if _fused(name, module)]
    return {f"{name}.{part}": name for name in fused for part in PARTS}


def _fused(name: str, module: Any) -> bool:
    return type(module) in (Conv1D, Fused) and name.split(".")[-1] == "c_attn" and module.nf == len(PARTS) * module.nx


def split(model: nn.Module, names: Iterable[str]) -> None:
    """Split those fused projections of which `names` holds a part, by full names; other names mean nothing here.

    The class of the layer is changed in place, as torch's parametrizations do: the module stays the one that others
    may refer to.

    Raises:
        InputError: a layer whose `forward` somebody has replaced, as accelerate does for several devices.
    """
    known = parts(model)
    for name in dict.fromkeys(known[part] for part in names if part in known):
        layer: Any = model.get_submodule(name)
        if "forward" in vars(layer):
            raise InputError(f"the forward of {name} has been replaced, so it cannot be split: name {name} as a whole")
        layer.__class__ = Fused
        for place, part in enumerate(PARTS):
            layer.add_module(part, Part(layer, place).train(layer.training))


def join(model: nn.Module) -> nn.Module:
    """Make plain layers again, in place, of all fused projections whose parts have no adapter on them."""
    for layer in [module for module in model.modules() if isinstance(module, Fused)]:
        if all(isinstance(part, Part) for part in layer.children()):
            for part in PARTS:
                delattr(layer, part)
            layer.__class__ = Conv1D  # type: ignore[assignment]
    return model
