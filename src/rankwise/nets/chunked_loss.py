"""The loss of a language model, with logits for a few tokens at a time.

With a large vocabulary the logits, one number for each token and word, are the largest tensor of a training step, and
the loss and its gradient make several copies of it. After `put_on`, the head returns `Logits` that are not computed.
What a model does with them before the loss, such as scaling, capping or leaving out the last token, is only noted.
Cross-entropy then takes one chunk of tokens after the other: their logits, their loss, and at once its gradients for
the hidden states and the head, so that no logits outlive their chunk. The backward pass multiplies these gradients by
that of the loss. Loss and gradients differ from the model's own by the order of sums; nothing waits for the device.

Anything else that is done with the logits computes all of them, and is right too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from rankwise.errors import InputError, require
from rankwise.nets.recomputed import restore
from rankwise.nets.undisturbed import undisturbed
from rankwise.processes import together
from rankwise.ranks.sites import base_of

CHUNK = 256
"""Tokens: enough for fast products with the weight of the head."""
_ASKS = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")}
_ASKS |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point}
"""What needs no numbers."""
_BY_NUMBER = {
    *("mul", "div", "add", "sub", "tanh", "float", "to", "neg", "true_divide", "multiply", "divide"),
    *("__mul__", "__rmul__", "__truediv__", "__add__", "__radd__", "__sub__", "__neg__"),
}
"""What is done to each logit by itself."""
_BY_GRADIENT = {"register_hook", "retain_grad"}
"""What needs the gradient of all logits."""
_NO_SECOND = "a loss in chunks has no second derivatives (create_graph): call lean(model, on=False) first"
_NO_GRADIENT = "logits whose loss is computed in chunks have no gradient for {}: call lean(model, on=False) first"


def put_on(model: nn.Module) -> None:
    """Let `model` compute its loss in chunks from now on, when gradients are.

    Raises:
        InputError: its loss is not the cross-entropy of what its head returns, scaled or capped. It is tried out.
    """
    params = [p for p in model.parameters() if p.requires_grad]

    def tried() -> list[Tensor | None]:
        loss = model(**_tiny(model)).loss
        return [loss, *torch.autograd.grad(loss, params, allow_unused=True)] if params else [loss]

    chunked, same = None, False
    try:
        with undisturbed(model), torch.enable_grad():
            model.eval()
            own = tried()
            chunked = untried(model)
            chunked.tokens = 4
            same = _close(tried(), own, _exact(model)) and chunked.losses == 1 and not chunked.whole_logits
            chunked.tokens = CHUNK
    except Exception as error:
        if isinstance(error, InputError) or together.out_of_memory(error):
            raise
        raise _refused(model, f" ({' '.join(str(error).split())[:200]})") from error
    finally:
        if chunked is not None and not same:
            take_off(model)
    if not same:
        hooks = any(p._backward_hooks for p in output_layer(model).parameters())
        raise _refused(model, " (a weight of its head has a hook)" if hooks else "")


def take_off(model: nn.Module) -> None:
    restore(output_layer(model), Chunked)


def untried(model: nn.Module) -> "Chunked":
    """`put_on` for a model whose loss is known, or that has no numbers to try it with."""
    head = output_layer(model)
    if not isinstance(head.forward, Chunked):
        head.forward = Chunked(head.forward)
    chunked: Chunked = head.forward
    return chunked


def output_layer(model: nn.Module) -> Any:
    if (head := getattr(base_of(model), "get_output_embeddings", lambda: None)()) is None:
        raise _refused(model)
    return head


@dataclass
class Smoothed:
    """In the place of transformers' LabelSmoother, whose steps need all logits."""

    epsilon: float

    def __call__(self, outputs: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None) -> Any:
        logits = outputs["logits"]
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        rows = logits.reshape(-1, logits.shape[-1])
        loss = functional.cross_entropy(rows, labels.reshape(-1), label_smoothing=self.epsilon, reduction="sum")
        return loss / count


@dataclass
class Chunked:
    """What a head does in the place of its `forward`; a copy of the model gets a copy of it."""

    own: Callable[..., Tensor]
    tokens: int = CHUNK
    losses: int = 0
    """How many were computed in chunks."""
    whole_logits: int = 0
    """How often all logits were computed after all."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # gradients of fp16 are right only once the loss has been scaled up
        fp16 = torch.float16 in (hidden.dtype, autocast[0] if autocast[1] else None)
        if args or kwargs or fp16 or not torch.is_grad_enabled():
            return self.own(hidden, *args, **kwargs)
        none = self.own(hidden.detach().flatten(0, -2)[:0])
        learnt = _leaves(none)
        if any(p._backward_hooks for p in learnt):  # a hook would also see the gradient of each chunk
            return self.own(hidden)
        frame = torch.empty(*hidden.shape[:-1], none.shape[-1], device="meta")
        return Logits(Pending(hidden, self, learnt, none.detach(), frame, autocast))


@dataclass(frozen=True)
class Pending:
    """How to compute logits (…, words) of `hidden` (…, features)."""

    hidden: Tensor
    chunked: Chunked
    learnt: list[Tensor]
    """The parameters that train among those that the head computes them with."""
    none: Tensor
    """The logits of no token (0, words), after the steps, which have their dtype."""
    frame: Tensor
    """Has the layout that the logits would have, without numbers."""
    autocast: tuple[torch.dtype, bool]
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    """What the model does to each of them."""

    def of(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, *self.autocast):
            logits = self.chunked.own(hidden)
            for step in self.steps:
                logits = step(logits)
            return logits

    def after(self, func: Any, rest: Sequence[Any], kwargs: dict[str, Any]) -> "Pending | None":
        """What `func` makes of these logits; None if it needs all of them."""
        name = func.__name__
        if name in _BY_NUMBER:
            others = [each for each in tree_leaves((rest, kwargs)) if isinstance(each, Tensor)]
            if any(each.requires_grad or each.numel() not in (1, *each.shape[-1:]) for each in others):
                return None
            flat, more = tree_map(_flat, (rest, kwargs))
            step = lambda logits: func(logits, *flat, **more)  # noqa: E731
            none = step(self.none)
            if none is self.none:
                return self
            if none.shape != self.none.shape:
                return None
            return replace(self, none=none, frame=torch.empty_like(self.frame), steps=(*self.steps, step))
        hidden = None
        if name == "contiguous" and not rest and not kwargs:
            hidden = self.hidden
        if name in ("view", "reshape") and not kwargs:
            sizes = rest[0] if isinstance(rest[0], (tuple, list)) else rest
            if len(sizes) > 1 and sizes[-1] == self.none.shape[-1]:
                hidden = self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1])
        if name == "__getitem__" and _keeps_words(rest[0], self.hidden.dim()):
            hidden = self.hidden[rest[0]]
        return None if hidden is None else replace(self, hidden=hidden, frame=func(self.frame, *rest))


class Logits(Tensor):
    """Logits that are computed only if something needs all of them."""

    pending: Pending
    before: "Logits | None"
    """What these were made from."""
    shared_by: tuple[Any, Sequence[Any], dict[str, Any]] | None
    """The call that made them, if they share the numbers of those, as a view does."""
    computed: Tensor | None
    used: bool
    """Whether a loss in chunks, or logits that are not computed, were made from them."""

    def __new__(cls, pending: Pending, before: Any = None, shared_by: Any = None) -> "Logits":
        dtype, device = pending.none.dtype, pending.none.device
        logits: Logits = Tensor._make_wrapper_subclass(cls, pending.frame.shape, dtype=dtype, device=device)
        logits.pending, logits.before, logits.shared_by = pending, before, shared_by
        logits.computed, logits.used = None, False
        return logits

    def settled(self) -> bool:
        """Whether they have been computed, or what they are a view of has, so that they may have been changed."""
        viewed = self.before if self.shared_by is not None else None
        return self.computed is not None or (viewed is not None and viewed.settled())

    def whole(self) -> Tensor:
        if self.computed is None:
            with torch.enable_grad():  # whoever asks first may need no gradients, and the loss comes after
                if self.before is not None and self.shared_by is not None:
                    func, rest, kwargs = self.shared_by
                    self.computed = func(self.before.whole(), *rest, **kwargs)
                else:
                    self.pending.chunked.whole_logits += 1
                    self.computed = self.pending.of(self.pending.hidden)
        return self.computed

    def use(self) -> None:
        """Note that something in chunks was made from them, and so from all that they were made from."""
        self.used = True
        if self.before is not None:
            self.before.use()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ASKS:
                return func(*args, **kwargs)
            first = args[0] if args else None
            if isinstance(first, Logits):
                name = func.__name__
                require(name not in _BY_GRADIENT or not first.used, _NO_GRADIENT.format(name))
                if not first.settled():
                    if func is functional.cross_entropy:
                        loss = _cross_entropy(*args, **kwargs)
                        if loss is not None:
                            first.use()
                            return loss
                    elif (pending := first.pending.after(func, args[1:], kwargs)) is not None:
                        if _share(pending.frame, first.pending.frame):
                            return Logits(pending, first, (func, args[1:], kwargs))
                        first.use()
                        return Logits(pending, first)
            return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} takes logits that are not computed: do not compute this loss in chunks")


def _keeps_words(index: Any, dim: int) -> bool:
    """Whether an index leaves the last of `dim` dimensions as it is."""
    parts = index if isinstance(index, tuple) else (index,)
    if len(parts) > dim or not all(part is Ellipsis or isinstance(part, (slice, int)) for part in parts):
        return False
    if Ellipsis in parts or len(parts) == dim:
        return parts[-1] is Ellipsis or parts[-1] == slice(None)
    return len(parts) < dim


def _flat(value: Any) -> Any:
    """A copy, since it may be changed later: a number for all words or one for each, as fits logits (tokens, words)."""
    if not isinstance(value, Tensor):
        return value
    return value.reshape(-1).clone() if value.dim() else value.clone()


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, Logits) else value


def _cross_entropy(
    input: Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`functional.cross_entropy` in chunks; None where it is not of logits (tokens, words) and a label for each."""
    pending = input.pending
    if any(each is not None for each in (weight, size_average, reduce)) or reduction not in ("mean", "sum"):
        return None
    if pending.hidden.dim() != 2 or target.shape != pending.hidden.shape[:1] or target.is_floating_point():
        return None
    pending.chunked.losses += 1
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "sum"}
    total: Tensor = _Sum.apply(pending.hidden, target, pending, options, *pending.learnt)
    loss = total / (target != ignore_index).sum() if reduction == "mean" else total
    return loss.to(functional.cross_entropy(pending.none, target[:0], reduction="sum").dtype)


class _Sum(torch.autograd.Function):
    """The sum of the losses of all tokens, and its gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, pending: Pending, options: Any, *learnt: Tensor) -> Tensor:
        by_hidden = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=target.device)
        grads: list[Tensor | None] = [torch.empty_like(hidden) if by_hidden else None, *[None for _ in learnt]]
        # hooks around the model, such as those of checkpointing, must not see what is saved and gone before the end
        with saved_tensors_hooks(_unchanged, _unchanged):
            for start in range(0, len(hidden), pending.chunked.tokens):
                rows = slice(start, start + pending.chunked.tokens)
                chunk = hidden[rows].detach().requires_grad_(by_hidden)
                with torch.enable_grad():
                    loss = functional.cross_entropy(pending.of(chunk), target[rows], **options)
                total += loss.detach()
                if not (wanted := [*([chunk] if by_hidden else []), *learnt]):
                    continue
                with torch.autocast(hidden.device.type, enabled=False):
                    found = [*torch.autograd.grad(loss, wanted, allow_unused=True)]
                if (by_chunk := grads[0]) is not None:
                    by_chunk[rows] = found.pop(0)
                for place, grad in enumerate(found, 1):
                    if grad is not None:  # bf16 would round away what later chunks add
                        grad, before = grad.to(torch.promote_types(grad.dtype, torch.float32)), grads[place]
                        grads[place] = grad if before is None else before.add_(grad)
        for place, each in enumerate(learnt, 1):
            if (sum_of_all := grads[place]) is not None:
                grads[place] = sum_of_all.to(each.dtype)
        ctx.known = [grad is not None for grad in grads]
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        require(not torch.is_grad_enabled(), _NO_SECOND)
        saved = iter(ctx.saved_tensors)
        first, *others = (next(saved) * grad if known else None for known in ctx.known)
        return first, None, None, None, *others


def _unchanged(tensor: Tensor) -> Tensor:
    """To save and to give back; a result of its own node would keep that."""
    return tensor if tensor.grad_fn is None else tensor.detach()


def _tiny(model: Any) -> dict[str, Any]:
    """A batch of a few tokens, one of them without a label."""
    ids = torch.arange(12, device=next(model.parameters()).device).reshape(2, 6)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 3, -100), "use_cache": False}


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The parameters that `tensor` was computed from."""
    todo, seen, leaves = [tensor.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            todo += [before for before, _ in node.next_functions]
    return leaves


def _exact(model: nn.Module) -> bool:
    """Whether `model` computes in fp32, whatever the dtype of its loss and of what trains."""
    params = [*model.parameters()]
    return all(p.dtype == torch.float32 and not torch.is_autocast_enabled(p.device.type) for p in params)


def _close(some: Sequence[Tensor | None], others: Sequence[Tensor | None], exact: bool) -> bool:
    """Whether a loss and its gradients are those of another computation, except for rounding: of fp32 if `exact`."""
    # some gradients are 0, and what is left of them is noise
    largest = max(float(each.abs().max()) for each in others if each is not None)
    for one, other in zip(some, others, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
        elif not (one - other).abs().max() <= (1e-4 if exact else 0.05) * (other.abs().max() + 0.01 * largest):
            return False
    return True


def _refused(model: Any, reason: str = "") -> InputError:
    name = type(base_of(model)).__name__
    return InputError(f"activation_memory: the loss of {name} cannot be computed in chunks{reason}: leave it out")
