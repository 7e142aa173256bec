"""Adapters: a small trainable MLP with its own skip connection after sublayers of every frozen block.

    f(x) = x + U σ(D n(x) + d) + u        D: (size, width), U: (width, size), at the start U = 0, u = 0

adapter-h is Houlsby et al. 2019 (arXiv 1902.00751, section 2.1 and figure 2): n is the identity, σ is GELU, and there
is one f after the output projection of every attention and of the feed-forward part, before the residual addition, with
2·width·size + size + width parameters each. Their released code differs: D and U start normal with standard deviation
1e-3, f follows the sublayer's dropout, GELU is the tanh form, and the model's layer norms train too. The counts in Hu
et al. 2021 (arXiv 2106.09685) exclude these norms, and so do ours.

adapter-l is Lin et al. 2020 (arXiv 2004.03829) as Hu et al. (section 5.1) count it: n is a trained layer norm, σ is
ReLU, and there is one f per block, after the feed-forward part; the norm adds 2·width parameters. Their released code
applies f after the residual addition, ours before it, as for all adapters here.
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
    """f(x) = x + U σ(D n(x) + d) + u for x of shape (…, width), in the dtype of x; exactly x at the start."""

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
    """Forward hook of a layer with an adapter. It looks the adapter up in the layer, so that copies use their own."""
    return module.adapter(output)


@dataclass(frozen=True)
class Adapter(Method):
    """What both adapters share: the options, and how a bottleneck is put after a layer."""

    sizes = ("size",)
    norm: ClassVar[bool]
    size: Annotated[int, Field(ge=1)] = 8
    activation: Literal["gelu", "relu"] = "gelu"

    @abstractmethod
    def places(self, block: Outputs) -> list[nn.Module]:
        """The layers of a block that get an adapter after them."""

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        adapted = any(isinstance(part, Bottleneck) for part in model.modules())
        require(not adapted, "this model already has an adapter: use the base model")
        layers = [layer for block in outputs(model) for layer in self.places(block)]
        freeze(model, head)
        for layer in layers:
            weight: Any = layer.weight
            # At least fp32, like PEFT's adapters: steps are often too small to change a bf16 number.
            dtype = torch.float32 if holds_codes(weight) else torch.promote_types(weight.dtype, torch.float32)
            width, like = features(layer)[1], {"device": weight.device, "dtype": dtype}
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
    """Lin's adapters: a layer norm and a bottleneck MLP after the feed-forward part only.

    Attributes:
        size: features of the bottleneck.
        activation: σ between the two layers, `relu` or `gelu`.
    """

    norm: ClassVar[bool] = True
    activation: Literal["gelu", "relu"] = "relu"

    def places(self, block: Outputs) -> list[nn.Module]:
        return [block.feed_forward]
