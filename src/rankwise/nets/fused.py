"""The parts of a fused projection as layers of their own, so that q and v alone can be adapted.

GPT-2 and models like it (OpenAI GPT, ImageGPT, the Decision Transformer) compute query, key and value by one layer
`c_attn` with out = 3 · in: q's outputs first, then k's, then v's. LoRA on GPT-2 (Hu et al. 2021, arXiv 2106.09685,
table 3) adapts those of q and v. `split` gives such a layer three children, on which PEFT puts its own layers:

    c_attn(x) = concat(q(x), k(x), v(x))

The one layer still computes the base, so outputs are bit for bit the same (three smaller products could round
differently), and it keeps its weight and bias: a split model has the same state dict as before.

Only transformers' `Conv1D` layers are split. GPT-BigCode has an `nn.Linear` of this name and shape, with outputs
ordered head by head.
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
    """A third of a fused projection: views of its weight (in, out) and bias (out,), without tensors of its own."""

    def __init__(self, whole: Conv1D, index: int):
        nn.Module.__init__(self)  # Conv1D's would create a weight
        self.nx, self.nf, self.index = whole.nx, whole.nf // len(PARTS), index
        self.whole = (whole,)  # in a tuple, so that torch does not register the parent as a child

    @property
    def columns(self) -> slice:
        """The outputs of the whole that belong to this part."""
        return slice(self.index * self.nf, (self.index + 1) * self.nf)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.whole[0].weight.detach()[:, self.columns].as_subclass(View)

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        return self.whole[0].bias.detach()[self.columns].as_subclass(View)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """The outputs y, which the whole has computed already; PEFT's layer around this one adds to them."""
        return y

    def widened(self, B: Tensor) -> Tensor:
        """This part's factor (out, r) as one of the whole, (3 out, r), with zeros in the rows of the other parts."""
        return functional.pad(B, (0, 0, self.columns.start, self.whole[0].nf - self.columns.stop))


class View(Tensor):
    """A view that assigning to `.data` writes through, as PEFT does when it merges or starts from an SVD."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # returns plain tensors

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
        thirds = y.unflatten(-1, (len(PARTS), -1))
        return torch.cat([getattr(self, part)(x, thirds[..., i, :]) for i, part in enumerate(PARTS)], dim=-1)


def parts(model: nn.Module) -> dict[str, str]:
    """The name of each part of a fused projection of `model`, with the name of that projection."""
    fused = [
        name
        for name, module in model.named_modules()
        if type(module) in (Conv1D, Fused) and name.split(".")[-1] == "c_attn" and module.nf == len(PARTS) * module.nx
    ]
    return {f"{name}.{part}": name for name in fused for part in PARTS}


def split(model: nn.Module, names: Iterable[str]) -> None:
    """Split the fused projections that have a part in `names` (full names); other names are ignored.

    The class of the layer is changed in place, as torch's parametrizations do, so that references to it stay valid.

    Raises:
        InputError: a layer whose `forward` has been replaced, as accelerate does for several devices.
    """
    known = parts(model)
    for name in dict.fromkeys(known[part] for part in names if part in known):
        layer: Any = model.get_submodule(name)
        if "forward" in vars(layer):
            raise InputError(
                f"the forward of {name} has been replaced, so it cannot be split: target {name} as a whole"
            )
        layer.__class__ = Fused
        for index, part in enumerate(PARTS):
            layer.add_module(part, Part(layer, index).train(layer.training))


def join(model: nn.Module) -> nn.Module:
    """Turn split projections whose parts have no adapter back into plain layers, in place."""
    for layer in [module for module in model.modules() if isinstance(module, Fused)]:
        if all(isinstance(part, Part) for part in layer.children()):
            for part in PARTS:
                delattr(layer, part)
            layer.__class__ = Conv1D  # type: ignore[assignment]
    return model
