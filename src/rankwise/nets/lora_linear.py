"""PEFT's LoRA layer for linear maps as one autograd function, with fewer passes over its tensors.

PEFT computes W x + b, u = A x, B u, s B u and the sum, each as a tensor of its own, and so does autograd backwards.
Here s B u is added to W x by the matrix product that computes it, and the same in the backward pass, with g = ∂L/∂y:

    y = W x + b;  y += s B u              v = s Bᵀ g;  ∂x = Wᵀ g;  ∂x += Aᵀ v;  ∂A = v xᵀ;  ∂B = s g uᵀ

Where there are many more tokens than rows and columns of W it is less work to form the sum of the weights first, once
in each direction and without keeping it:

    y = (W + s B A) x + b                 ∂x = (W + s B A)ᵀ g

For the backward pass x and u are kept, except that the second way computes u again; only u where A is frozen, as in
LoRA-FA; and with dropout a mask of one byte for each entry of x. ω and gates are parametrizations of A, and torch
derives their gradients from ∂A.

The layer stays PEFT's. It is asked for its state in each call, and what the function does not cover is computed by
PEFT's forward: disabled, merged, mixed or several adapters, DoRA and other variants, quantised weights, modules with
hooks, torch.compile and torch.func.
"""

import re
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.pytorch_utils import Conv1D

from rankwise.errors import InputError, require
from rankwise.ranks.layers import FLOATS

SUM_FROM = 4.0
"""W + s B A is formed from as many tokens as this times in · out / (in + out), twice the width of a square W.

Chosen with `benchmarks/layer.py --tokens 512 1024 2048 4096 --rank 8`: the way taken is the faster one there, or slower
by a few hundredths. The rank makes no difference, since both ways do work in proportion to it.
"""


class LoraLinearFunction(torch.autograd.Function):
    """y = (W + s B A) x + b for the rows of x (tokens, in), with dropout on A's input. W is frozen; the rest may train.

    x and b have the dtype of y, A and B one of at least its precision. u and v are (r, tokens): products with few rows
    are computed faster than those with few columns.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, dropout: float, summed: bool
    ) -> Tensor:
        ctx.s, ctx.dropout, ctx.summed = s, dropout, summed
        for_x, _, _, for_A, for_B, *_ = ctx.needs_input_grad
        u = mask = None
        if summed:
            y = functional.linear(x, _sum(W, A, B, s), b)
            if for_B and not for_A:
                u = A @ x.t()
        else:
            y, into = functional.linear(x, W.to(x.dtype), b), x.to(A.dtype)
            if dropout:
                into, mask = torch.native_dropout(into, dropout, True)
            u = A @ into.t()
            # selective checkpointing is such a mode, and may keep W x + b itself
            add = Tensor.addmm_ if _get_current_dispatch_mode() is None else torch.addmm
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
        with torch.autocast(g.device.type, enabled=False):
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
            db = g.sum(0)
        if for_x and ctx.summed:
            dx = g @ _sum(W, A, B, s)
        elif for_x:
            dx = (g @ W.to(g.dtype)).to(A.dtype)
            dx = dx.addmm_(v.t(), A) if mask is None else dx.add_((v.t() @ A).mul_(mask), alpha=rescale)
            dx = dx.to(g.dtype)
        return dx, None, db, dA, dB, None, None, None


def _sum(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W + s B A, stored as W is, by rows or by columns."""
    return torch.addmm(W, B, A, alpha=s) if W.is_contiguous() else torch.addmm(W.t(), A.t(), B.t(), alpha=s).t()


class FastLinear(LoraLinear):
    """PEFT's layer with another forward. Layers become it, and PEFT's again, by a change of their class."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if args or kwargs or _transformed() else _fast_forward(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


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
    kinds = (LoraLinear, FastLinear)
    names = []
    for name, module in model.named_modules():
        if type(module) in kinds:
            module.__class__ = kinds[on]
            names.append(name)
    return names


def _fast_forward(layer: Any, x: Tensor) -> Tensor | None:
    """What the layer gives; None if the function does not cover it or its state."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    (name,) = active
    base, into_A, into_B = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    dropout, s = layer.lora_dropout[name], layer.scaling[name]
    known = _plain(base, nn.Linear, Conv1D) and _plain(dropout, nn.Identity, nn.Dropout)
    if not (known and _plain(into_A, nn.Linear) and _plain(into_B, nn.Linear) and isinstance(s, (int, float))):
        return None
    W, b, A, B = base.weight, base.bias, into_A.weight, into_B.weight
    tensors = [each for each in (x, W, b, A, B) if each is not None]
    biases = into_A.bias is not None or into_B.bias is not None
    if biases or W.requires_grad or not all(map(_is_plain_tensor, tensors)):
        return None
    inputs = W.shape[0] if isinstance(base, Conv1D) else W.shape[1]
    if x.dim() == 0 or x.shape[-1] != inputs or len({each.device for each in tensors}) > 1:
        return None
    if torch.is_autocast_enabled(x.device.type):
        if any(each.dtype == torch.float64 for each in tensors):  # which autocast leaves alone
            return None
        dtype = torch.get_autocast_dtype(x.device.type)
        x, A, B, b = x.to(dtype), A.to(dtype), B.to(dtype), None if b is None else b.to(dtype)
    elif not _agree(layer, x, W, b, A, B):
        return None
    share = float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if share == 1:
        return None
    rows = x.reshape(-1, inputs)
    outputs, precise = len(B), x.dtype == A.dtype == W.dtype and x.dtype in (torch.float32, torch.float64)
    many = len(rows) * (inputs + outputs) >= SUM_FROM * inputs * outputs
    W = W.t() if isinstance(base, Conv1D) else W
    y = LoraLinearFunction.apply(rows, W, b, A, B, s, share, precise and many and not share)
    return y.view(*x.shape[:-1], outputs)


def _plain(module: Any, *kinds: Any) -> bool:
    """Whether a call of `module` does what a module of one of the `kinds` does, and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in vars(module) and any(type(module).forward is kind.forward for kind in kinds)


def _is_plain_tensor(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in FLOATS and tensor.layout is torch.strided


def _agree(layer: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether the dtypes are those for which PEFT casts nothing, or x to a more precise one of A and B."""
    same = x.dtype == W.dtype and A.dtype == B.dtype and (b is None or b.dtype == x.dtype)
    casts = getattr(layer, "cast_input_dtype_enabled", True)
    return same and (x.dtype == A.dtype or (casts and torch.promote_types(x.dtype, A.dtype) == A.dtype))


GLOBAL_HOOKS = [hooks for name, hooks in vars(torch_module).items() if re.match("_global_(for|back)ward_.*hooks", name)]
"""What torch.nn.modules.module.register_module_forward_hook and its like fill, whatever the version of torch."""


def _transformed() -> bool:
    """Whether torch compiles, exports, traces, transforms or observes what is computed, so that it needs the parts."""
    observed = any(GLOBAL_HOOKS) or torch.jit.is_tracing() or torch.compiler.is_compiling()
    return observed or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
