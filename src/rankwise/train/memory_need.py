"""How much memory a run needs, counted before its model is loaded.

A training step is taken with torch's fake tensors, which have shapes, dtypes and a device but no numbers, and the bytes
of all storages that are alive are added up. So what counts is what the model really keeps, with checkpointing,
autocast and the attention in use. Not counted are torch itself (on a CPU about 0.7 GiB), what a kernel needs for
itself, and memory lost between allocations.
"""

import logging
import math
import resource
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankwise import methods, tasks
from rankwise.nets import chunked_loss, recomputed
from rankwise.processes import together
from rankwise.ranks.layers import features, holds_codes
from rankwise.ranks.sites import base_of
from rankwise.settings import RunConfig
from rankwise.train import model as models
from rankwise.train.arguments import DTYPES, HOW, RECOMPUTE, Loading, computing

GIB = 2**30
LARGE = 4 * GIB
"""A run that needs less, and less than half of the memory, is not worth a note."""
SMALL_FILES, SMALL_BATCH = GIB // 4, 2**15
"""Bytes of weights and tokens at once below which nothing is counted."""


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs on one device."""

    weights: int
    activations: int | None
    """The most that the forward and backward pass keep at once; None if they cannot be counted."""
    optimizer: int
    """Gradients, and two moments of each."""
    rows: int
    tokens: int
    why: str = ""
    """Why the activations cannot be counted."""

    @property
    def total(self) -> int:
        return self.weights + (self.activations or 0) + self.optimizer

    def __str__(self) -> str:
        batch = f"{self.rows} {'row' if self.rows == 1 else 'rows'} of up to {self.tokens} tokens at once"
        if self.activations is None:
            parts, more = f", and the activations of {batch}, which cannot be counted ({self.why})", "more than"
        else:
            parts, more = f", activations {_gib(self.activations)} ({batch})", "about"
        return (
            f"training needs {more} {_gib(self.total)} GiB of memory: weights {_gib(self.weights)}, gradients and "
            f"optimizer {_gib(self.optimizer)}{parts}"
        )


def note(configs: Sequence[RunConfig], shipped: bool = False) -> str:
    """What the run needs that needs most, in one line, with a warning if that is more than there is; else "".

    Runs that need little are not worth a line. `shipped`: see `model.check`.
    """
    chosen: dict[str, RunConfig] = {}
    for config in configs:
        if config.method["name"] == "none":  # nothing trains
            continue
        key = config.model_dump_json(include={*_DECIDES})
        if key not in chosen or methods.registry()[config.method["name"]].whole:
            chosen[key] = config
    needs = [(each, config) for config in chosen.values() if (each := need(config, shipped)) is not None]
    if not needs:
        return ""
    most, config = max(needs, key=lambda each: each[0].total)
    there, where = available()
    if most.total < min(LARGE, there // 2):
        return ""
    if most.total <= there:
        return f"{most}; {where} has {_gib(there)} GiB"
    advice = [
        *(["quantise: 4bit"] if config.quantise != "4bit" else []),
        *(["dtype: bf16"] if config.dtype == "fp32" else []),
        *(["gradient_checkpointing: true"] if not config.gradient_checkpointing else []),
        *(["activation_memory: lean"] if _can_be_lean(config) else []),
        *([f"a micro_batch below {most.rows}"] if most.rows > 1 else []),
    ]
    return f"{most}; {where} has only {_gib(there)} GiB: use {', '.join([*advice, 'a smaller model'])}"


def _can_be_lean(config: RunConfig) -> bool:
    allowed = not config.compile and "fp16" not in (config.dtype, config.autocast)
    return allowed and config.activation_memory != "lean"


_DECIDES = (
    *("model", "task", "max_length", "batch_size", "micro_batch", "packing"),
    *("gradient_checkpointing", "activation_memory", "dtype", "autocast", "quantise", "attention", "fast", "compile"),
)


def need(config: RunConfig, shipped: bool = False) -> Need | None:
    """What a run needs; None for segmentation, and for a small batch on a model with small files."""
    task: Any = tasks.build(config.task)
    if task.family == "segmentation":
        return None
    rows = math.ceil(config.batch_size / together.count())
    rows = min(rows, config.micro_batch or rows)
    if rows * config.max_length < SMALL_BATCH and models.file_bytes(config.model, task) < SMALL_FILES:
        return None
    model: Any = models.attached_skeleton(
        config.model, task, methods.build(config.method), config.max_length, shipped, Loading.of(config)
    )
    models.prepare(model, config)
    weights = weight_bytes(model)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    joined = not config.packing and not model.config.is_encoder_decoder  # what is read and what is written
    tokens = config.max_length + (sum(task.written().values()) if joined else 0)
    try:
        peak, why = _peak(model, config, task, rows, tokens), ""
    except Exception as error:
        peak, why = None, f"{type(error).__name__} in {type(model).__name__}"
    return Need(weights, None if peak is None else max(0, peak - gradients), 3 * gradients, rows, tokens, why)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, with the scales of quantised ones."""
    total = sum(b.nbytes for b in model.buffers())
    for p in model.parameters():
        state: Any = getattr(p, "quant_state", None)
        scales = [getattr(p, "SCB", None), getattr(state, "absmax", None)]
        scales += [getattr(getattr(state, "state2", None), "absmax", None)]
        total += sum(each.nbytes for each in (p, *scales) if each is not None)
    return total


class Alive(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make, while these are alive; those of `model` do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):  # how many is not known: all
            result = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        else:
            result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and (key := (storage := each.untyped_storage())._cdata) not in self._known:
                self._known.add(key)
                self.now += (size := storage.nbytes())
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _peak(model: Any, config: RunConfig, task: Any, rows: int, tokens: int) -> int:
    """The most bytes that a training step of a model on the meta device keeps, gradients included."""
    codes = _without_codes(model, DTYPES[config.dtype])
    log = logging.getLogger("torch._subclasses.fake_tensor")  # what is wrong is in the error
    silent, log.disabled = log.disabled, True
    try:
        with FakeTensorMode():
            _made_fake(model, "cuda" if torch.cuda.is_available() else "cpu")
            return kept_by_step(model, config, task, rows, tokens) + codes
    finally:
        log.disabled = silent


def kept_by_step(model: Any, config: RunConfig, task: Any, rows: int, tokens: int) -> int:
    """The most bytes that are alive at once in a training step of `model`, without the model, but with gradients."""
    model.config.use_cache = False
    model.train()
    if config.gradient_checkpointing:
        getattr(base_of(model), f"{RECOMPUTE}_enable")({**HOW, "preserve_rng_state": False})
    ids = torch.ones(rows, tokens, dtype=torch.long, device=next(model.parameters()).device)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # without any padding, attention would need no mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": _labels(task, model, ids)}
    if config.activation_memory == "lean":
        recomputed.put_on(model, tried=True)
        if task.family == "generation":
            chunked_loss.untried(model)
    with warnings.catch_warnings(), models.quiet(), computing(config), Alive(model) as alive:
        warnings.simplefilter("ignore")
        model(**batch).loss.backward()
    return alive.peak


def _labels(task: Any, model: Any, ids: Tensor) -> Tensor:
    if task.family == "generation":
        return ids[:, : task.target_length] if model.config.is_encoder_decoder else ids
    return ids[:, 0].float() if not task.labels else torch.zeros_like(ids[:, 0])


def _without_codes(model: nn.Module, dtype: torch.dtype) -> int:
    """Turn quantised layers into frozen ones of `dtype` that keep the same; returns the bytes of the largest.

    So much does a layer need when it runs, for its weight as numbers.
    """
    most = 0
    for module in model.modules():
        if holds_codes(codes := module._parameters.get("weight")):
            module.__class__ = KeepsInput if type(codes).__name__ == "Int8Params" else Dequantised
            inputs, outputs = features(module)
            weight = torch.empty(outputs, inputs, dtype=dtype, device="meta")
            module.weight = nn.Parameter(weight, requires_grad=False)
            most = max(most, weight.nbytes)
    return most


class Dequantised(nn.Linear):
    """A frozen layer in the place of a 4-bit one: it has a forward of its own, so that no fast layer takes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class KeepsInput(nn.Linear):
    """A frozen layer that keeps its input until the backward pass, as bitsandbytes' 8-bit layers do.

    These keep it outside of autograd's saved tensors, where checkpointing cannot drop it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _Kept.apply(x, self.weight, self.bias)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.x, ctx.weight = x, weight
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad @ ctx.weight.to(grad.dtype), None, bias


def _made_fake(model: nn.Module, device: str) -> None:
    """Put fake tensors on `device` in the place of all parameters and buffers; what is shared stays so."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    learnt = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if learnt else fake
                own[name] = fakes[id(tensor)]  # type: ignore[assignment]


def available() -> tuple[int, str]:
    """The bytes of memory that there are for a run, and where."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, "this GPU"
    limits = [psutil.virtual_memory().total]
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(limit)
    with suppress(OSError, ValueError):  # "max" without a limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits), "this machine"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
