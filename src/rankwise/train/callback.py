"""rankwise inside anyone's Trainer."""

import logging
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.methods import Method
from rankwise.ranks import sites

_log = logging.getLogger(__name__)


class RankCallback(TrainerCallback):
    """Add to any Trainer, together with the method's optimizer:

        Trainer(..., callbacks=[RankCallback(method)], optimizers=(method.optimizer(model, args), None))

    The optimizer does the work. The callback makes sure that it is the method's own, adds the adapters' parameters and
    the number of empty sites to what the Trainer logs, and logs what a search for ranks has come to. Resuming takes
    nothing more: the weights of a checkpoint bring their ranks along.
    """

    def __init__(self, method: Method):
        self.method = method
        self._told = -1  # the step at which the search's end was told
        self._counted: tuple[int, dict[str, float]] = (-1, {})  # the step of the last rank change, and what it left

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: Any = _inner(kwargs["optimizer"])
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer: Any = _inner(kwargs["optimizer"])
        if self.method.check_every and optimizer.steps == self.method.search_steps:
            self._tell(optimizer, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: Any = _inner(kwargs["optimizer"])
        ended = self.method.search_steps is not None and optimizer.steps >= self.method.search_steps
        if self.method.check_every and not ended and state.global_step >= state.max_steps:
            self._tell(optimizer, state)

    def _tell(self, optimizer: Any, state: TrainerState) -> None:
        """Log what the search has come to, at its end; a warning where no rank has changed."""
        found = optimizer.search()
        if found is not None and state.is_world_process_zero and self._told != optimizer.steps:
            self._told = optimizer.steps  # which a gradient scaler may hold up
            _log.log(logging.INFO if found.changed else logging.WARNING, "%s: %s", self.method.name, found)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        changed = getattr(_inner(kwargs["optimizer"]), "changed", 0)
        if changed != self._counted[0]:  # walking a large model at every log would cost as much as a small step
            here = sites(kwargs["model"])
            parameters, empty = sum(site.parameters for site in here), sum(not site.present for site in here)
            self._counted = changed, {"adapter_parameters": parameters, "empty_sites": empty} if here else {}
        if logs is not None:
            logs.update(self._counted[1])  # what the callbacks after this one report
            state.log_history[-1].update(self._counted[1])


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
