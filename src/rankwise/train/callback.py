"""rankwise inside anyone's Trainer."""

import logging
import sys
import warnings
from math import nan
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from rankwise.methods import Method
from rankwise.nets.undisturbed import undisturbed
from rankwise.ranks import ranks, sites
from rankwise.train.scaling import scales

_log = logging.getLogger(__name__)


class MethodCallback(TrainerCallback):
    """Makes sure that the optimizer is the method's own, and tells of the ranks what there is to tell.

    The Trainer's history gets the adapters' parameters and the number of empty sites; whoever reports (TensorBoard,
    W&B, trackio, …) gets `ranks/total`, `ranks/empty` and `ranks/` with the name of each site, at the start and where
    they change; the log gets what a search for ranks has come to.
    """

    def __init__(self, method: Method):
        self.method = method
        self._told = -1  # the step at which the search's end was told
        self._counted: tuple[int, dict[str, float]] = (-1, {})  # the step of the last rank change, and what it left
        self._reported: dict[str, int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._counted, self._reported = (-1, {}), None
        optimizer = unwrapped(kwargs["optimizer"])
        if getattr(optimizer, "method", None) != self.method:
            raise RuntimeError(
                f"the method {self.method.name} needs its own optimizer: pass the Trainer "
                "optimizers=(method.optimizer(model, args), None)"
            )
        if optimizer.steps > state.global_step:
            raise RuntimeError(
                f"training starts at step {state.global_step}, but the optimizer has taken {optimizer.steps} already: "
                "resume from a checkpoint, or make a new Trainer for a second training"
            )
        if state.global_step and not optimizer.steps:  # fewer are right: a gradient scaler skips some
            raise RuntimeError(
                f"training goes on at step {state.global_step}, but the optimizer is at step {optimizer.steps}: resume "
                "from a checkpoint that holds the optimizer (save_only_model=False)"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._reported is None:  # not when the training begins: those who report may stand behind this one
            self._report(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = unwrapped(kwargs["optimizer"])
        checked = self.method.check_every > 0 and state.global_step % self.method.check_every == 0
        if checked or optimizer.changed == optimizer.steps:
            self._report(args, state, control, **kwargs)
        if self.method.check_every and optimizer.steps == self.method.search_steps:
            self._tell(optimizer, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrapped(kwargs["optimizer"])
        ended = self.method.search_steps is not None and optimizer.steps >= self.method.search_steps
        if self.method.check_every and not ended and state.global_step >= state.max_steps:
            self._tell(optimizer, state)

    def _tell(self, optimizer: Any, state: TrainerState) -> None:
        """Log what the search has come to, at its end; a warning where no rank has changed."""
        found = optimizer.search()
        if found is not None and state.is_world_process_zero and self._told != optimizer.steps:
            self._told = optimizer.steps  # which a gradient scaler may hold up
            _log.log(logging.INFO if found.changed else logging.WARNING, "%s: %s", self.method.name, found)

    def _report(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = ranks(kwargs["model"])
        if now and now != self._reported:
            scalars = {"total": sum(now.values()), "empty": sum(not rank for rank in now.values()), **now}
            for each in _reporters():
                logs = {f"ranks/{name}": value for name, value in scalars.items()}
                each.on_log(args, state, control, logs=logs, **kwargs)
        self._reported = now

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        changed = getattr(unwrapped(kwargs["optimizer"]), "changed", 0)
        if changed != self._counted[0]:  # walking a large model at every log would cost as much as a small step
            here = sites(kwargs["model"])
            parameters, empty = sum(site.parameters for site in here), sum(not site.present for site in here)
            self._counted = changed, {"adapter_parameters": parameters, "empty_sites": empty} if here else {}
        if state.log_history:  # not into logs: that is the caller's, such as the metrics that evaluate() returns
            state.log_history[-1].update(self._counted[1])


class RankCallback(MethodCallback):
    """Add to any Trainer, together with the method's optimizer:

        Trainer(..., callbacks=[RankCallback(method)], optimizers=(method.optimizer(model, args), None))

    The optimizer does the work. The callback makes sure that it is the method's own, and tells of the ranks: the
    adapters' parameters and the number of empty sites in the Trainer's history, every rank to whoever reports, and in
    the log what a search has come to. Where accumulated gradients would be too large, it warns. Resuming takes nothing
    more: the weights of a checkpoint bring their ranks along.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if args.gradient_accumulation_steps > 1:
            _ask(kwargs["model"], args.gradient_accumulation_steps)


def _ask(model: nn.Module, pieces: int) -> None:
    """Warn at the first training batch if neither the Trainer nor the loss divides by the number of batches."""

    def ask(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        hook.remove()
        if (items := named.get("num_items_in_batch")) is None:  # the Trainer divides
            return

        def loss(number: int) -> float:
            with undisturbed(model):
                told = torch.full_like(torch.as_tensor(items), number)
                found: Any = model(*given, **{**named, "num_items_in_batch": told})
                value = found.get("loss") if isinstance(found, dict) else found[0]
                return nan if value is None else float(value.mean())

        if scales(loss, int(torch.as_tensor(items).flatten()[0])) is False:
            warnings.warn(
                f"this Trainer adds up the gradients of {pieces} batches and nobody divides them by {pieces}, since "
                "the loss of this model does not look at num_items_in_batch: clipping, ω, gates and ranks are not "
                "those of the whole batch; use rankwise.RankTrainer",
                stacklevel=2,
            )

    hook = model.register_forward_pre_hook(ask, with_kwargs=True)


def _reporters() -> list[TrainerCallback]:
    """The callbacks of the calling Trainer that report to TensorBoard, W&B and others, found on the call stack.

    There is no other way in transformers: an event hands a callback neither its Trainer nor the other callbacks; those
    that report are called before the user's own, so what is added to `logs` comes too late for them (and `logs` is the
    caller's); none of them reads `state.log_history`; and `control` can ask for a log, but not say what is in it.
    """
    frame: Any = sys._getframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    here: list[TrainerCallback] = [] if frame is None else frame.f_locals["self"].callbacks
    kinds: tuple[type, ...] = tuple(INTEGRATION_TO_CALLBACK.values())
    return [each for each in here if isinstance(each, kinds)]


def unwrapped(optimizer: Optimizer | None) -> Any:
    """The optimizer itself, which accelerate wraps in a Trainer."""
    return getattr(optimizer, "optimizer", optimizer)
