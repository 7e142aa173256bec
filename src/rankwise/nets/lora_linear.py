"""PEFT's LoRA layer for linear maps as one autograd function, with fewer passes over its tensors.

PEFT computes W x + b, u = A x, B u, s B u and the sum, each as a tensor of its own, and so does autograd backwards.
Here s B u is added to W x by the matrix product that computes it, and the same in the backward pass, with g = ∂L/∂y:

    y = W x + b;  y += s B u              v = s Bᵀ g;  ∂x = Wᵀ g;  ∂x += Aᵀ v;  ∂A = v xᵀ;  ∂B = s g uᵀ

Where there are many more tokens than rows and columns of W it is less work to form the sum of the weights first, once
in each direction and without keeping it:

    y = (W + s B A) x + b                 ∂x = (W + s B A)ᵀ g

For the backward pass x and u are kept, except that the second way computes u again; only u where A is frozen, as in
LoRA-FA; and with dropout a mask of one byte for each entry of x. ω and gates are parametrizations of A, and torch
derives their gradients from ∂A. AdaLoRA's layer has A ∘ E / r in place of A. Several adapters are added one after
another, each to the y of those before it, and so is that of a part of a fused projection, whose y the whole computes.

The layer stays PEFT's. It is asked for its state in each call, and what the function does not cover is computed by
PEFT's forward: disabled, merged or mixed adapters, DoRA and other variants, quantised weights, modules with hooks,
torch.compile and torch.func. So is an evaluation without gradients, so that the scores of a model are those of stock
PEFT with the saved adapter, bit for bit.
"""

import re
from types import NoneType
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.pytorch_utils import Conv1D

from rankwise.errors import InputError, require
from rankwise.nets.fused import Part
from rankwise.nets.recomputed import Recording, transformed, without_autocast
from rankwise.ranks.layers import FLOATS

SUM_FROM = 4.0
"""W + s B A is formed from as many tokens as this times in · out / (in + out), twice the width of a square W.

Chosen with `benchmarks/layer.py --tokens 512 1024 2048 4096 --rank 8`: the way taken is the faster one there, or slower
by a few hundredths. The rank makes no difference, since both ways do work in proportion to it.
"""


class LoraLinearFunction(torch.autograd.Function):
    """y = (W + s B A) x + b for the rows of x (tokens, in), with dropout on A's input. W is frozen; the rest may train.

    Without W, b is (tokens, out): what s B A x is added to. x and b have the dtype of y, A and B one of at least its
    precision. u and v are (r, tokens): products with few rows are computed faster than those with few columns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Any,
        b: Any,
        A: Tensor,
        B: Tensor,
        s: float,
        dropout: float,
        summed: bool,
    ) -> Tensor:
        ctx.s, ctx.dropout, ctx.summed = s, dropout, summed
        for_x, _, _, for_A, for_B, *_ = ctx.needs_input_grad
        u = mask = None
        if summed:
            y = functional.linear(x, _sum(W, A, B, s), b)
            if for_B and not for_A:
                u = A @ x.t()
        else:
            y, into = b if W is None else functional.linear(x, W.to(x.dtype), b), x.to(A.dtype)
            if dropout:
                into, mask = torch.native_dropout(into, dropout, True)
            u = A @ into.t()
            # selective checkpointing is such a mode, and may keep W x + b itself
            alone = isinstance(_get_current_dispatch_mode(), NoneType | Recording)
            add = Tensor.addmm_ if W is not None and alone else torch.addmm
            y = add(y.to(A.dtype), u.t(), B.t(), alpha=s).to(x.dtype)
            if not for_B:
                u = None
        ctx.save_for_backward(x if for_A else None, u, mask if for_A or for_x else None, W, A, B)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise InputError(
                "the fast layer has no second derivatives (create_graph): call fast(model, on=False) first"
            )
        with without_autocast(g.device.type):
            return LoraLinearFunction.gradients(ctx, g)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """With respect to the arguments of `forward`, where they are needed."""
        x, u, mask, W, A, B = ctx.saved_tensors
        for_x, _, for_b, for_A, for_B, *_ = ctx.needs_input_grad
        s, rescale = ctx.s, 1 / (1 - ctx.dropout)
        dx = db = dA = dB = None
        h = g.to(A.dtype)
        v: Any = (B.t() @ h.t()).mul_(s) if for_A or (for_x and not ctx.summed) else None
        if for_A:
            into = x.to(A.dtype)
            dA = v @ (into if mask is None else (into * mask).mul_(rescale))
        if for_B:
            dB = ((A @ x.t() if u is None else u) @ h).mul_(s).t().contiguous()
        if for_b:
            db = g if W is None else g.sum(0)
        if for_x and ctx.summed:
            dx = g @ _sum(W, A, B, s)
        elif for_x:
            dx = None if W is None else (g @ W.to(g.dtype)).to(A.dtype)
            if mask is not None:
                own = (v.t() @ A).mul_(mask)
                dx = own.mul_(rescale) if dx is None else dx.add_(own, alpha=rescale)
            else:
                dx = v.t() @ A if dx is None else dx.addmm_(v.t(), A)
            dx = dx.to(g.dtype)
        return dx, None, db, dA, dB, None, None, None


def _sum(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W + s B A, stored as W is, by rows or by columns."""
    return torch.addmm(W, B, A, alpha=s) if W.is_contiguous() else torch.addmm(W.t(), A.t(), B.t(), alpha=s).t()


class _Fast:
    """PEFT's layer with another forward. Layers become it, and PEFT's again, by a change of their class."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if kwargs or _transformed() else _fast_forward(self, x, *args)
        return super().forward(x, *args, **kwargs) if y is None else y  # type: ignore[misc]

    def _get_name(self) -> str:
        """For `repr`, in which PEFT looks for the kind of a layer."""
        return type(self).__name__.removeprefix("Fast")


class FastLinear(_Fast, LoraLinear):
    """LoRA's."""


class FastSVDLinear(_Fast, SVDLinear):
    """AdaLoRA's."""


KINDS: dict[type, type] = {LoraLinear: FastLinear, SVDLinear: FastSVDLinear}
"""PEFT's layers, and what they become."""


def fast(model: nn.Module, on: bool = True) -> list[str]:
    """Compute each LoRA layer of `model` by one autograd function, which takes less time; or as PEFT does, again.

    Results are PEFT's except for the order of sums. What the function does not cover is computed as before: see
    `rankwise.nets.lora_linear`. Call it once the adapter is on the model, and again for one that adapts more layers.

    Args:
        model: a model with LoRA by PEFT, put there by rankwise or not. It is changed in place.
        on: False for PEFT's own computation.

    Returns:
        The names of the layers that are changed, or were before.

    Raises:
        InputError: the model has no LoRA on a linear layer that is not quantised.
    """
    names = set_fast(model, on)
    require(
        bool(names) or not on,
        f"{type(model).__name__} has no LoRA on linear layers that are not quantised: call fast once it is attached",
    )
    return names


def set_fast(model: nn.Module, on: bool = True) -> list[str]:
    """The same for a model that may have no such layer."""
    names = []
    for name, module in model.named_modules():
        for kinds in KINDS.items():
            if type(module) in kinds:
                module.__class__ = kinds[on]
                names.append(name)
    return names


class Factors(NamedTuple):
    """What a layer adds for one adapter: s B A x, with dropout on x."""

    A: Tensor
    B: Tensor
    s: float
    dropout: float


def _fast_forward(layer: Any, x: Tensor, *args: Any) -> Tensor | None:
    """What the layer gives; None if the function does not cover it or its state."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active or not (layer.training or torch.is_grad_enabled()):
        return None
    base = layer.get_base_layer()
    if len(args) == 1 and _plain(base, Part):
        W, b, inputs = None, args[0], base.nx
    elif not args and _plain(base, nn.Linear, Conv1D) and not base.weight.requires_grad:
        W, b, inputs = base.weight, base.bias, base.weight.shape[0 if isinstance(base, Conv1D) else 1]
    else:
        return None
    factors = [each for name in active if (each := _factors(layer, name)) is not None]
    tensors = [x, *(t for t in (W, b) if t is not None), *(t for each in factors for t in (each.A, each.B))]
    if not all(map(_is_plain_tensor, tensors)) or len({each.device for each in tensors}) > 1:
        return None
    if len(factors) < len(active) or x.dim() == 0 or x.shape[-1] != inputs:
        return None
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        if any(each.dtype == torch.float64 for each in tensors):  # which autocast leaves alone
            return None
        dtype = torch.get_autocast_dtype(device)
        x, b = x.to(dtype), None if b is None else b.to(dtype)
        factors = [each._replace(A=each.A.to(dtype), B=each.B.to(dtype)) for each in factors]
    elif not all(_agree(layer, x, W, b, each) for each in factors):
        return None
    if len(factors) > 1 and any(each.A.dtype != x.dtype for each in factors):  # y would be rounded in between
        return None
    rows, outputs = x.reshape(-1, inputs), len(factors[0].B)
    many = len(rows) * (inputs + outputs) >= SUM_FROM * inputs * outputs
    y = b.reshape(-1, outputs) if W is None else b
    W = W.t() if isinstance(base, Conv1D) and W is not None else W
    for A, B, s, dropout in factors:
        exact = W is not None and x.dtype == A.dtype == W.dtype and x.dtype in (torch.float32, torch.float64)
        y = LoraLinearFunction.apply(rows, W, y, A, B, s, dropout, exact and many and not dropout)
        W = None
    return y.view(*x.shape[:-1], outputs)


def _factors(layer: Any, name: str) -> Factors | None:
    """Those of one adapter; None if the function does not cover them."""
    if name in layer.lora_variant:
        return None
    into_A, into_B, dropout, s = (
        each[name] for each in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.scaling)
    )
    if not _plain(dropout, nn.Identity, nn.Dropout) or not isinstance(s, (int, float)):
        return None
    share = float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if share == 1:
        return None
    if isinstance(layer, SVDLinear):
        # the rank is a tensor, so that it is put into A: as a number it would be waited for on a GPU
        return Factors(into_A * layer.lora_E[name] * (s / (layer.ranknum[name] + 1e-5)), into_B, 1.0, share)
    plain = _plain(into_A, nn.Linear) and _plain(into_B, nn.Linear) and into_A.bias is None is into_B.bias
    return Factors(into_A.weight, into_B.weight, s, share) if plain else None


def _plain(module: Any, *kinds: Any) -> bool:
    """Whether a call of `module` does what a module of one of the `kinds` does, and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in vars(module) and any(type(module).forward is kind.forward for kind in kinds)


def _is_plain_tensor(tensor: Any) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter, FakeTensor)
    return plain and tensor.dtype in FLOATS and tensor.layout is torch.strided


def _agree(layer: Any, x: Tensor, W: Tensor | None, b: Tensor | None, factors: Factors) -> bool:
    """Whether the dtypes are those for which PEFT casts nothing, or x to a more precise one of A and B."""
    A, B, *_ = factors
    same = A.dtype == B.dtype and all(each is None or each.dtype == x.dtype for each in (W, b))
    casts = getattr(layer, "cast_input_dtype_enabled", True)
    return same and (x.dtype == A.dtype or (casts and torch.promote_types(x.dtype, A.dtype) == A.dtype))


GLOBAL_HOOKS = [hooks for name, hooks in vars(torch_module).items() if re.match("_global_(for|back)ward_.*hooks", name)]
"""What torch.nn.modules.module.register_module_forward_hook and its like fill, whatever the version of torch."""


def _transformed() -> bool:
    """Whether torch compiles, exports, traces, transforms or observes what is computed, so that it needs the parts."""
    return any(GLOBAL_HOOKS) or transformed()
