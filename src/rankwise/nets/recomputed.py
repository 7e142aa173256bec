"""Pointwise results are computed again in the backward pass instead of being kept for it.

Autograd keeps the inputs and outputs of operations for the backward pass. Many of them are cheap to compute from others
that it keeps anyway: what GELU, SiLU, norms and casts return from what goes into them, and the product of
SwiGLU from its two factors. In a forward pass that `Recomputing` carries out, each such operation leaves a recipe of
its result, and autograd's saved-tensor hooks keep the recipe in the place of the tensor. In the backward pass the same
operations run on the same numbers, so that gradients are the same to the bit.

A recipe keeps nothing that would not be kept without it, except for what is at most half as large as its result. If
one of its inputs is changed in place before the backward pass, that raises autograd's own error. Models need not be
known. Where others have put saved-tensor hooks around the model, as checkpointing and offloading do, theirs are used.
In the first pass each tensor is compared with what its recipe gives, since kernels from elsewhere may change tensors in
place without a new version.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.errors import require
from rankwise.ranks.sites import base_of

SMALL = 2**16
"""Bytes below which a tensor is kept."""
LONGEST = 16
"""Operations in a recipe, with those in the recipes of its inputs."""
CHANGED = (
    "activation_memory: a kernel of the model changes tensors in place without telling torch, so that they cannot be "
    "computed again: leave lean out"
)
FREED = (
    "activation_memory: weights are freed between the passes, as FSDP does, so that nothing can be computed from them "
    "again: leave lean out"
)
_ALSO = {"aten::_to_copy", "aten::native_layer_norm", "aten::_fused_rms_norm"}
"""Operations that are as cheap as pointwise ones, and whose result is their first."""


class Kept:
    """A tensor that is kept."""

    __slots__ = ("__weakref__", "tensor", "version")
    steps = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def value(self, caching: bool = True) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{list(self.tensor.shape)} is at version {self.tensor._version}; expected version {self.version}. "
                "If it is no error without activation_memory: lean, leave that out"
            )
        return self.tensor


class Recipe:
    """How to compute a tensor of which others are views."""

    __slots__ = ("args", "cached", "device", "func", "kwargs", "layout", "left", "steps")

    def __init__(self, func: Any, args: list[Any], kwargs: dict[str, Any], result: Tensor) -> None:
        self.func, self.args, self.kwargs, self.layout = func, args, kwargs, _layout(result)
        self.device = result.device.type
        self.steps: int = 1 + sum(each.source.steps for each in args if isinstance(each, View))
        self.left = 0
        """How often the backward pass will ask for it; until then it is cached once it is computed."""
        self.cached: Kept | None = None

    def value(self, caching: bool = True) -> Tensor:
        cached = self.cached or Kept(self._compute(caching))
        self.cached = cached if caching and self.left > 0 else None
        return cached.value()

    def _compute(self, caching: bool) -> Tensor:
        args = (each.value(caching) if isinstance(each, View) else each for each in self.args)
        result = self.func(*args, **self.kwargs)
        whole: Tensor = result[0] if isinstance(result, tuple) else result
        if _layout(whole) != self.layout:
            raise RuntimeError(f"{self.func} gave {_layout(whole)} where it had given {self.layout}")
        return whole


@dataclass(frozen=True, slots=True)
class View:
    """A view of a tensor that is kept or computed."""

    source: Kept | Recipe
    layout: tuple[Any, ...]

    def value(self, caching: bool = True) -> Tensor:
        whole = self.source.value(caching)
        require(whole.untyped_storage().nbytes() > 0 or whole.numel() == 0, FREED)
        return whole if self.layout == _layout(whole) else whole.as_strided(*self.layout)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


class Recording(TorchDispatchMode):
    """Notes recipes while operations run, and keeps them, or else tensors, for the backward pass.

    Args:
        tried: whether recipes are known to give what they should.
    """

    def __init__(self, tried: bool) -> None:
        super().__init__()
        self.tried = tried
        self.compared = False
        """Whether a recipe was tried."""
        self.recipes: dict[int, tuple[Recipe, weakref.ref[Any], int, torch.dtype]] = {}
        """By the address of the storage of the result, which the reference says is alive; with version and dtype."""
        self.kept: dict[int, weakref.ref[Kept]] = {}
        """By the address of the storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if written := _written(func):
            for place, name in written:
                each = args[place] if place < len(args) else kwargs.get(name)
                if _is_plain(each):  # through `.data` it could be changed without a new version
                    self.recipes.pop(each.untyped_storage()._cdata, None)
        elif _is_cheap(func):
            self._note(func, args, kwargs, result[0] if isinstance(result, tuple) else result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        small = SMALL if self.tried else 1  # a model may be tried with few rows, and then get many
        if not _is_plain(result) or result.nbytes < small or any(isinstance(each, Tensor) for each in kwargs.values()):
            return
        sources: list[Any] = []
        steps, free = LONGEST, result.nbytes // 2
        for each in args:
            if not isinstance(each, Tensor):
                sources.append(each)
                continue
            if not _is_plain(each) or (each.dim() and each.device != result.device):
                return
            source = self._source(each)
            if source is None:
                free -= 0 if isinstance(each, nn.Parameter) else each.untyped_storage().nbytes()
                if free < 0:
                    return
                with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
                    source = Kept(each.detach())  # which shares its version
                self.kept[each.untyped_storage()._cdata] = weakref.ref(source)
            steps -= source.steps
            sources.append(View(source, _layout(each)))
        if steps > 0:
            storage = result.untyped_storage()
            key = storage._cdata
            alive = weakref.ref(storage, lambda _: self.recipes.pop(key, None))
            self.recipes[key] = Recipe(func, sources, kwargs, result), alive, result._version, result.dtype

    def _source(self, tensor: Tensor) -> Kept | Recipe | None:
        """Where the numbers of a tensor can be had later without keeping it."""
        key = tensor.untyped_storage()._cdata
        kept = self.kept[key]() if key in self.kept else None
        if kept is not None and kept.tensor.dtype == tensor.dtype and kept.version == tensor._version:
            return kept
        if (found := self.recipes.get(key)) is not None:
            recipe, alive, version, dtype = found
            if alive() is not None and dtype == tensor.dtype and version == tensor._version:
                return recipe
        return None

    def pack(self, tensor: Tensor) -> Kept | View:
        plain = _is_plain(tensor)
        source = self._source(tensor) if plain else None
        if isinstance(source, Recipe):
            view = View(source, _layout(tensor))
            if not self.tried and type(tensor) is not FakeTensor and not tensor.is_meta:
                again = _again(source, view, caching=False)
                require(bool(((again == tensor) | (again != again)).all()), CHANGED)
                self.compared = True
            source.left += 1
            return view
        kept = Kept(tensor if tensor.grad_fn is None else tensor.detach())  # or it would keep what keeps it
        if plain:
            self.kept[tensor.untyped_storage()._cdata] = weakref.ref(kept)
        return kept


def unpack(packed: Kept | View) -> Tensor:
    if isinstance(packed, Kept):
        return packed.value()
    assert isinstance(packed.source, Recipe)
    packed.source.left -= 1
    return _again(packed.source, packed)


def _again(recipe: Recipe, view: View, caching: bool = True) -> Tensor:
    with torch.no_grad(), without_autocast(recipe.device):
        return view.value(caching)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Context without autocast, which the devices of tensors without numbers do not have."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@functools.cache
def _is_cheap(func: Any) -> bool:
    """Whether `func` makes a tensor that it would make again, at little cost."""
    cheap = torch.Tag.pointwise in func.tags or func._schema.name in _ALSO
    return cheap and torch.Tag.nondeterministic_seeded not in func.tags


@functools.cache
def _written(func: Any) -> list[tuple[int, str]]:
    """The arguments that `func` changes in place, by place and name."""
    args = enumerate(func._schema.arguments)
    return [(place, arg.name) for place, arg in args if arg.alias_info is not None and arg.alias_info.is_write]


def _is_plain(tensor: Any) -> bool:
    """Whether all there is to a tensor is its storage and layout."""
    if type(tensor) not in (Tensor, nn.Parameter, FakeTensor) or is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())


_hooks_of_others: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def transformed() -> bool:
    """Whether torch compiles, exports, traces or transforms what is computed, so that it needs the parts."""
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return traced or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check() -> None:
    """InputError if torch is too old to tell whether others have put hooks around a model."""
    require(_hooks_of_others is not None, "activation_memory: lean needs torch 2.8 or newer")


def put_on(model: nn.Module, tried: bool = False) -> None:
    """Let `model` compute pointwise results again, in each forward pass with gradients from now on.

    Args:
        model: is changed in place.
        tried: leave out the comparison in the first pass.
    """
    base = base_of(model)
    if not isinstance(base.forward, Recomputing):
        base.forward = Recomputing(base.forward, tried)


def take_off(model: nn.Module) -> None:
    restore(base_of(model), Recomputing)


def restore(module: Any, kind: type) -> None:
    """Give a module its own forward again, if one of `kind` is in its place."""
    if isinstance(module.forward, kind):
        own = module.forward.own  # type: ignore[attr-defined]
        del module.forward
        if module.forward != own:
            module.forward = own


@dataclass
class Recomputing:
    """What a model does in the place of its `forward`; a copy of the model gets a copy of it."""

    own: Callable[..., Any]
    tried: bool = False
    """Whether a pass has shown that the recipes are right."""

    @property
    def __signature__(self) -> inspect.Signature:  # the Trainer reads which columns a model takes
        return inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or transformed() or _hooks_of_others(True) is not None:
            return self.own(*args, **kwargs)
        recording = Recording(self.tried)
        try:
            with recording, saved_tensors_hooks(recording.pack, unpack):
                result = self.own(*args, **kwargs)
            self.tried = self.tried or recording.compared
            return result
        finally:
            recording.recipes.clear()
            recording.kept.clear()
