"""Adapters: a small trainable MLP with a skip connection of its own after sublayers of every frozen block.

    f(x) = x + U σ(D n(x) + d) + u        D: (size, width), U: (width, size), started at U = 0, u = 0

adapter-h is Houlsby et al. 2019 (arXiv 1902.00751, section 2.1 and figure 2): n is the identity, σ is GELU, and one f
stands after the output projection of every attention and one after the feed-forward part's, before the residual
addition: 2·width·size + size + width parameters each. Their released code differs: both layers start from a normal of
deviation 1e-3 instead of U = 0, f stands after the sublayer's dropout, GELU is the tanh form, and the model's own
layer norms train too. The counts in Hu et al. 2021 (arXiv 2106.09685) are without these norms, and so are ours.

adapter-l is Lin et al. 2020 (arXiv 2004.03829) as Hu et al. (section 5.1) count it: n is a layer norm that trains,
σ is ReLU, one f per block after the feed-forward part; 2·width more for the norm. Their released code applies f to the
sum after the residual addition; ours stands before it, as all adapters here do.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rankwise.errors import require
from rankwise.methods.base import Method
from rankwise.methods.subset import freeze
from rankwise.nets.blocks import Outputs, outputs
from rankwise.nets.hooks import let_compile_see_hooks
from rankwise.ranks.layers import features, holds_codes

_SIGMA = {"gelu": nn.GELU, "relu": nn.ReLU}


class Bottleneck(nn.Module):
    """f(x) = x + U σ(D n(x) + d) + u for x of shape (…, width), in the type of x; exactly x at the start."""

    def __init__(self, width: int, size: int, activation: str, norm: bool, **where: Any):
        super().__init__()
        self.norm = nn.LayerNorm(width, **where) if norm else nn.Identity()
        self.down = nn.Linear(width, size, **where)
        self.activation = _SIGMA[activation]()
        self.up = nn.Linear(size, width, **where)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(self.norm(x.to(self.down.weight.dtype)))
        return x + self.up(self.activation(inner)).to(x.dtype)


def apply_adapter(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a layer with an adapter, which is reached through the layer, so that a copy uses its own."""
    return module.adapter(output)


@dataclass(frozen=True)
class Adapter(Method):
    """What both placements share: the options, and how a bottleneck is put after a layer."""

    sizes = ("size",)
    norm: ClassVar[bool]
    size: Annotated[int, Field(ge=1)] = 8
    activation: Literal["gelu", "relu"] = "gelu"

    @abstractmethod
    def places(self, block: Outputs) -> list[nn.Module]:
        """The layers of a block that an adapter stands after."""

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        held = any(isinstance(part, Bottleneck) for part in model.modules())
        require(not held, "this model has an adapter already: take the base model instead")
        layers = [layer for block in outputs(model) for layer in self.places(block)]
        freeze(model, head)
        for layer in layers:
            weight: Any = layer.weight
            # At least fp32, as PEFT holds its adapters: a step is often too small to change a bf16 number.
            kind = torch.float32 if holds_codes(weight) else torch.promote_types(weight.dtype, torch.float32)
            width, like = features(layer)[1], {"device": weight.device, "dtype": kind}
            layer.add_module("adapter", Bottleneck(width, self.size, self.activation, self.norm, **like))
            layer.register_forward_hook(apply_adapter)
        let_compile_see_hooks()
        return model


@dataclass(frozen=True)
class AdapterH(Adapter, name="adapter-h"):
    """Houlsby's adapters: a bottleneck MLP after every attention and after the feed-forward part.

    Attributes:
        size: features of the bottleneck.
        activation: σ between the two layers, `gelu` or `relu`.
    """

    norm: ClassVar[bool] = False

    def places(self, block: Outputs) -> list[nn.Module]:
        return [*block.attention, block.feed_forward]


@dataclass(frozen=True)
class AdapterL(Adapter, name="adapter-l"):
    """Lin's adapters: a layer norm and a bottleneck MLP after the feed-forward part alone.

    Attributes:
        size: features of the bottleneck.
        activation: σ between the two layers, `relu` or `gelu`.
    """

    norm: ClassVar[bool] = True
    activation: Literal["gelu", "relu"] = "relu"

    def places(self, block: Outputs) -> list[nn.Module]:
        return [block.feed_forward]
