"""What happens around the steps of a run: its lines on disk, evaluations, checkpoints, and the reasons to end it."""

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import InputError
from rankwise.files import as_new, checkpoints, claim, flush, read_lines, remove_checkpoint
from rankwise.methods import Method
from rankwise.processes import together
from rankwise.processes.launched import is_main
from rankwise.processes.stop import Stop
from rankwise.ranks import ranks
from rankwise.train.callback import unwrapped
from rankwise.train.checkpoint_files import append_line, cut_back, mark_complete

KEPT = 2
"""Checkpoints that are kept: the newest, and one to go back to."""


class DivergedError(RuntimeError):
    """The loss, the gradient or the weights are not finite any more. The checkpoints on disk are from before that."""


@dataclass(frozen=True)
class Plan:
    """How long a run is and what is due when, all in optimizer steps."""

    rows: int
    batch_size: int
    steps: int
    eval_every: int
    checkpoint_every: int

    @property
    def per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def line_every(self) -> int:
        """Steps that a line of metrics.jsonl averages over: some 200 lines in a long run, each step in a short one."""
        return math.ceil(self.steps / 200)

    def examples(self, step: int) -> int:
        """Training rows seen after `step` steps; the last batch of an epoch may be short."""
        epochs, batches = divmod(step, self.per_epoch)
        return epochs * self.rows + batches * self.batch_size


@dataclass
class Carried:
    """What a checkpoint carries over a restart beside the training state. Work lost to a kill is not in it."""

    seconds: float = 0.0
    """Wall time of the training loop, with its evaluations and checkpoints."""
    step_seconds: float = 0.0
    """Wall time of the optimizer steps alone."""
    peak_memory_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    """Losses since the last line of metrics.jsonl."""


class Progress(TrainerCallback):
    """Writes metrics.jsonl and ranks.jsonl, and decides at each step what is due: line, evaluation, checkpoint.

    Of several processes all decide alike, and the main one writes. `evaluate` is called in all of them.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        method: Method,
        evaluate: Callable[[], dict[str, float]],
        carried: Carried,
        stop: Stop,
    ) -> None:
        self.metrics, self.ranks = folder / "metrics.jsonl", folder / "ranks.jsonl"
        self.folder, self.plan, self.method, self.stop = folder, plan, method, stop
        self.evaluate, self.carried = evaluate, carried
        self._lock = _place(folder)
        self.begun = False
        """Whether what a checkpoint holds has been loaded."""
        self.counts: list[int] = []
        """Trainable parameters at each line of ranks.jsonl, in the main process."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the lines on disk back to the checkpoint's step, or begin them."""
        self.since = self.step_since = time.perf_counter()
        self.begun = True
        if not is_main():
            return
        step = state.global_step
        cut_back(self.folder, self.folder / f"checkpoint-{step}" if step else None)
        lines = read_lines(self.ranks)
        self.last: dict[str, Any] = {key: lines[-1][key] for key in ("ranks", "parameters")} if lines else {}
        self.counts = [line["parameters"] for line in lines]
        if step == 0:
            append_line(self.metrics, {"step": 0, "steps": self.plan.steps})
            self._rank_line(kwargs["model"], 0, kwargs["optimizer"])

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step_since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        if is_main():
            self._still_there()
            self._rank_line(kwargs["model"], step, kwargs["optimizer"])
        # Nothing at the last step: what follows the training evaluates and saves for good.
        if step < self.plan.steps:
            control.should_training_stop = self.stop.agreed
            control.should_save = self.stop.agreed or step % self.plan.checkpoint_every == 0
            if control.should_save and is_main():
                claim(self.folder, f"checkpoint-{step}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step's loss and then its evaluation; the Trainer comes here before it writes the step's checkpoint."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # the Trainer's own summary at the end
            return
        self.carried.step_seconds += time.perf_counter() - self.step_since
        del state.log_history[:-1]  # it would be written into each checkpoint, longer each time
        step = state.global_step
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise DivergedError(
                    f"{name.replace('grad_norm', 'norm of the gradient')} is {logs[name]} at step {step}"
                )
        if control.should_save and not all(p.isfinite().all() for p in kwargs["model"].parameters() if p.requires_grad):
            raise DivergedError(f"weights are not finite after step {step}")
        self.carried.losses.append(logs["loss"])
        if step % self.plan.line_every == 0 or step == self.plan.steps:
            loss = math.fsum(self.carried.losses) / len(self.carried.losses)
            line = {"step": step, "epoch": state.epoch, "loss": loss, "learning_rate": logs["learning_rate"]}
            if is_main():
                append_line(self.metrics, line)
            self.carried.losses.clear()
        if step % self.plan.eval_every == 0 and step < self.plan.steps:
            scores = self.evaluate()
            if is_main():
                self.evaluation_line(step, state.epoch, scores)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.count()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.count()
        together.wait()  # until each has written its random streams
        if is_main():
            for path in (self.metrics, self.ranks):
                flush(path)
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            as_new(checkpoint)
            mark_complete(checkpoint, asdict(self.carried))
            for old in checkpoints(self.folder)[KEPT:]:
                remove_checkpoint(old)
        together.wait()  # none may end, and take the others along, before the checkpoint is whole

    def _still_there(self) -> None:
        """Raise InputError where the folder was deleted, and perhaps made again, which would be another run's."""
        if _place(self.folder) != self._lock:
            raise InputError(f"{self.folder}: was deleted or moved while the run was at work; it has ended")

    def count(self) -> None:
        """Bring time and memory up to now."""
        now = time.perf_counter()
        self.carried.seconds += now - self.since
        self.since = now
        self.carried.peak_memory_bytes = max(self.carried.peak_memory_bytes, peak_memory())

    def evaluation_line(self, step: int, epoch: float | None, scores: dict[str, float]) -> None:
        """One evaluation into metrics.jsonl."""
        append_line(self.metrics, {"step": step, "epoch": epoch, "eval": scores})

    def _rank_line(self, model: nn.Module, step: int, optimizer: Any) -> None:
        """A line when the ranks or the number of trainable parameters have changed, and at each check of a search."""
        changed = unwrapped(optimizer).changed == step
        checked = self.method.check_every > 0 and step % self.method.check_every == 0
        if not (changed or checked):  # to walk a small model at each step would cost a tenth of its speed on a GPU
            return
        self.rank_line(model, step)

    def rank_line(self, model: nn.Module, step: int) -> None:
        """The ranks, the number of trainable parameters and ω into ranks.jsonl, where there is something new."""
        weights = self.method.weights(model)
        now: dict[str, Any] = {"ranks": ranks(model)}
        now["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if now != self.last or weights is not None:
            append_line(self.ranks, {"step": step, **now, **({} if weights is None else {"weights": weights})})
            self.last = now
            self.counts.append(now["parameters"])


def _place(folder: Path) -> tuple[int, int] | None:
    """What tells the lock of a run, which is open as long as it lives, from one of the same name made later."""
    try:
        found = (folder / "run.lock").stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def peak_memory() -> int:
    """Most bytes in use at once: on a GPU those of this process's tensors, else the whole process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
