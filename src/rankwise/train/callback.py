"""Callbacks with which rankwise's methods work in any Trainer."""

import logging
import sys
import warnings
from math import nan
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from rankwise.methods import Method
from rankwise.nets.undisturbed import undisturbed
from rankwise.ranks import ranks, sites
from rankwise.reporters import rank_scalars
from rankwise.train.scaling import scales

_log = logging.getLogger(__name__)


class MethodCallback(TrainerCallback):
    """Checks that the optimizer is the method's own, and reports ranks.

    The Trainer's history gets the adapters' parameters and the number of empty sites. Reporters (TensorBoard, W&B,
    trackio, …) get `ranks/total`, `ranks/empty` and `ranks/` with the name of each site, at the start and whenever they
    change. The log gets the result of a search for ranks.
    """

    def __init__(self, method: Method):
        self.method = method
        self._logged = -1  # the step at which the result of the search was logged
        self._counts: tuple[int, dict[str, float]] = (-1, {})  # the step of the last rank change, and counts after it
        self._reported: dict[str, int] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._counts, self._reported = (-1, {}), None
        optimizer = unwrapped(kwargs["optimizer"])
        if getattr(optimizer, "method", None) != self.method:
            raise RuntimeError(
                f"the method {self.method.name} needs its own optimizer: pass the Trainer "
                "optimizers=(method.optimizer(model, args), None)"
            )
        if optimizer.steps > state.global_step:
            raise RuntimeError(
                f"training starts at step {state.global_step}, but the optimizer has already taken {optimizer.steps} "
                "steps: resume from a checkpoint, or make a new Trainer for a second training"
            )
        if state.global_step and not optimizer.steps:  # a gradient scaler may have skipped some steps, but not all
            raise RuntimeError(
                f"training goes on at step {state.global_step}, but the optimizer is at step 0: resume from a "
                "checkpoint that includes the optimizer (save_only_model=False)"
            )

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._reported is None:  # not in on_train_begin, which may come before that of the reporters
            self._report(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = unwrapped(kwargs["optimizer"])
        checked = self.method.check_every > 0 and state.global_step % self.method.check_every == 0
        if checked or optimizer.changed == optimizer.steps:
            self._report(args, state, control, **kwargs)
        if self.method.check_every and optimizer.steps == self.method.search_steps:
            self._log_search(optimizer, state)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = unwrapped(kwargs["optimizer"])
        ended = self.method.search_steps is not None and optimizer.steps >= self.method.search_steps
        if self.method.check_every and not ended and state.global_step >= state.max_steps:
            self._log_search(optimizer, state)

    def _log_search(self, optimizer: Any, state: TrainerState) -> None:
        """Log the result of the search at its end, as a warning if no rank has changed."""
        search = optimizer.search()
        if search is not None and state.is_world_process_zero and self._logged != optimizer.steps:
            self._logged = optimizer.steps  # it does not grow at a step that a gradient scaler skips
            _log.log(logging.INFO if search.changed else logging.WARNING, "%s: %s", self.method.name, search)

    def _report(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        current = ranks(unwrapped(kwargs["optimizer"]).model)  # which may be a part of the Trainer's
        if current and current != self._reported:
            for reporter in _reporters():
                reporter.on_log(args, state, control, logs=rank_scalars(current), **kwargs)
        self._reported = current

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = unwrapped(kwargs["optimizer"])
        changed = getattr(optimizer, "changed", 0)
        if changed != self._counts[0]:  # in a large model finding the sites takes as long as a small step
            all_sites = sites(getattr(optimizer, "model", kwargs["model"]))
            parameters, empty = sum(site.parameters for site in all_sites), sum(not site.present for site in all_sites)
            self._counts = changed, {"adapter_parameters": parameters, "empty_sites": empty} if all_sites else {}
        if state.log_history:  # not `logs`, which is the caller's, such as the metrics that evaluate() returns
            state.log_history[-1].update(self._counts[1])


class RankCallback(MethodCallback):
    """Add to any Trainer, together with the method's optimizer:

        Trainer(..., callbacks=[RankCallback(method)], optimizers=(method.optimizer(model, args), None))

    The optimizer does the work. The callback checks that it is the method's own, and reports ranks: the adapters'
    parameters and the number of empty sites to the Trainer's history, every rank to reporters, and the result of a
    search to the log. It warns if accumulated gradients would be too large. Resuming needs nothing more, since the
    weights of a checkpoint set the ranks.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if args.gradient_accumulation_steps > 1:
            _check_scaling(kwargs["model"], args.gradient_accumulation_steps)


def _check_scaling(model: nn.Module, pieces: int) -> None:
    """Warn at the first training batch if neither the Trainer nor the loss divides by the number of batches."""

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        hook.remove()
        if (items := kwargs.get("num_items_in_batch")) is None:  # the Trainer divides
            return

        def loss(count: int) -> float:
            with undisturbed(model):
                counts = torch.full_like(torch.as_tensor(items), count)
                output: Any = model(*args, **{**kwargs, "num_items_in_batch": counts})
                value = output.get("loss") if isinstance(output, dict) else output[0]
                return nan if value is None else float(value.mean())

        if scales(loss, int(torch.as_tensor(items).flatten()[0])) is False:
            warnings.warn(
                f"this Trainer adds the gradients of {pieces} batches, but neither it nor the model's loss, which "
                f"ignores num_items_in_batch, divides them by {pieces}, so clipping, ω, gates and ranks differ from "
                "those of one large batch: use rankwise.RankTrainer",
                stacklevel=2,
            )

    hook = model.register_forward_pre_hook(check, with_kwargs=True)


def _reporters() -> list[TrainerCallback]:
    """The callbacks of the calling Trainer that report to TensorBoard, W&B and others, from the call stack.

    transformers offers no other way: events pass neither the Trainer nor its callbacks; reporters are called before the
    user's callbacks, so that additions to `logs` (which is the caller's) come too late; they do not read
    `state.log_history`; and `control` can ask for a log, but not set its content.
    """
    frame: Any = sys._getframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    callbacks: list[TrainerCallback] = [] if frame is None else frame.f_locals["self"].callbacks
    kinds: tuple[type, ...] = tuple(INTEGRATION_TO_CALLBACK.values())
    return [callback for callback in callbacks if isinstance(callback, kinds)]


def unwrapped(optimizer: Optimizer | None) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
