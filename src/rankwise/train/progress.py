"""What happens between the steps of a run: its lines on disk, evaluations, checkpoints, and stopping."""

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
from transformers import TrainerCallback, TrainerControl, TrainerState

from rankwise.errors import InputError
from rankwise.files import as_new, checkpoints, claim, flush, read_lines, remove_checkpoint, remove_events
from rankwise.methods import Method
from rankwise.processes import together
from rankwise.processes.launched import is_main
from rankwise.processes.stop import Stop
from rankwise.ranks import ranks
from rankwise.reporters import Reporters
from rankwise.train.callback import unwrapped
from rankwise.train.checkpoint_files import append_line, cut_back, mark_complete

MOVED = "was deleted or moved during the run, which has ended: start it again"
KEPT = 2
"""Number of checkpoints to keep: the newest, and another in case that one is damaged."""


class DivergedError(RuntimeError):
    """The loss, the gradient or the weights are no longer finite. Checkpoints on disk are from before that."""


@dataclass(frozen=True)
class Plan:
    """How long a run is and when it evaluates and writes checkpoints, in optimizer steps."""

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
        """Steps averaged in a line of metrics.jsonl: about 200 lines in a long run, each step in a short one."""
        return math.ceil(self.steps / 200)

    def examples(self, step: int) -> int:
        """Training rows seen after `step` steps; the last batch of an epoch may be short."""
        epochs, batches = divmod(step, self.per_epoch)
        return epochs * self.rows + batches * self.batch_size


@dataclass
class Carried:
    """What a checkpoint keeps in addition to the training state. Work lost to a kill is not counted."""

    seconds: float = 0.0
    """Wall time of the training loop, including evaluations and checkpoints."""
    step_seconds: float = 0.0
    """Wall time of the optimizer steps."""
    peak_memory_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    """Losses since the last line of metrics.jsonl."""


class Progress(TrainerCallback):
    """Writes metrics.jsonl and ranks.jsonl, and decides at each step whether to evaluate or write a checkpoint.

    Several processes all decide the same, and the main one writes. `evaluate` is called in all of them.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        method: Method,
        evaluate: Callable[[], dict[str, float]],
        carried: Carried,
        stop: Stop,
        reporters: Reporters,
    ) -> None:
        self.metrics, self.ranks = folder / "metrics.jsonl", folder / "ranks.jsonl"
        self.folder, self.plan, self.method, self.stop = folder, plan, method, stop
        self.evaluate, self.carried, self.reporters = evaluate, carried, reporters
        self._lock = _lock_identity(folder)
        self._there = set[Path]()
        self.loaded = False
        """Whether the checkpoint to resume from, if any, has been loaded."""
        self.counts: list[int] = []
        """Trainable parameters at each line of ranks.jsonl, in the main process."""

    def _append(self, file: Path, line: dict[str, Any]) -> None:
        """A file that was there is not made again: its folder may have been deleted, and made again by another run."""
        append_line(file, line, create=file not in self._there)
        self._there.add(file)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Cut the lines on disk back to the checkpoint's step, or start them."""
        self.since = self.step_since = time.perf_counter()
        self.loaded = True
        if not is_main():
            return
        step = state.global_step
        cut_back(self.folder, self.folder / f"checkpoint-{step}" if step else None)
        lines = read_lines(self.ranks)
        self.last: dict[str, Any] = {key: lines[-1][key] for key in ("ranks", "parameters")} if lines else {}
        self.counts = [line["parameters"] for line in lines]
        if step == 0:
            remove_events(self.folder)
        self.reporters.start(step, self.last.get("ranks", {}))
        if step == 0:
            self._append(self.metrics, {"step": 0, "steps": self.plan.steps})
            self._rank_line(kwargs["model"], 0, kwargs["optimizer"])

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step_since = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        if is_main():
            if _lock_identity(self.folder) != self._lock:  # deleted, and perhaps created again by another run
                raise InputError(f"{self.folder} {MOVED}")
            self._rank_line(kwargs["model"], step, kwargs["optimizer"])
        # Not at the last step: the final evaluation and the adapter follow.
        if step < self.plan.steps:
            control.should_training_stop = self.stop.agreed
            control.should_save = self.stop.agreed or step % self.plan.checkpoint_every == 0
            if control.should_save and is_main():
                claim(self.folder, f"checkpoint-{step}")

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step's loss and then its evaluation; called before the Trainer writes the step's checkpoint."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        self.carried.step_seconds += time.perf_counter() - self.step_since
        del state.log_history[:-1]  # every checkpoint contains it, and it would grow
        step = state.global_step
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise DivergedError(
                    f"{name.replace('grad_norm', 'norm of the gradient')} is {logs[name]} at step {step}"
                )
        if control.should_save and not all(p.isfinite().all() for p in kwargs["model"].parameters() if p.requires_grad):
            raise DivergedError(f"weights are not finite after step {step}")
        told = {name: logs[name] for name in ("loss", "grad_norm", "learning_rate") if name in logs}
        self.reporters.scalars(told, step, "train")
        self.carried.losses.append(logs["loss"])
        if step % self.plan.line_every == 0 or step == self.plan.steps:
            loss = math.fsum(self.carried.losses) / len(self.carried.losses)
            line = {"step": step, "epoch": state.epoch, "loss": loss, "learning_rate": logs["learning_rate"]}
            if is_main():
                self._append(self.metrics, line)
            self.carried.losses.clear()
        if step % self.plan.eval_every == 0 and step < self.plan.steps:
            scores = self.evaluate()
            if is_main():
                self.evaluation_line(step, state.epoch, scores)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.count()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.count()
        together.wait()  # until every process has written its random streams
        if is_main():
            for path in (self.metrics, self.ranks):
                flush(path)
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            as_new(checkpoint)
            mark_complete(checkpoint, asdict(self.carried))
            for old in checkpoints(self.folder)[KEPT:]:
                remove_checkpoint(old)
        together.wait()  # a process that ended now, and so stopped the others, would leave an incomplete checkpoint

    def count(self) -> None:
        """Update time and memory."""
        now = time.perf_counter()
        self.carried.seconds += now - self.since
        self.since = now
        self.carried.peak_memory_bytes = max(self.carried.peak_memory_bytes, peak_memory())

    def evaluation_line(self, step: int, epoch: float | None, scores: dict[str, float]) -> None:
        """Write an evaluation to metrics.jsonl, and report it."""
        self._append(self.metrics, {"step": step, "epoch": epoch, "eval": scores})
        self.reporters.scalars(scores, step, "eval")
        self.reporters.picture(step)

    def _rank_line(self, model: nn.Module, step: int, optimizer: Any) -> None:
        """`rank_line` at a rank change, and at each check of a search."""
        changed = unwrapped(optimizer).changed == step
        checked = self.method.check_every > 0 and step % self.method.check_every == 0
        if changed or checked:  # at every step it would slow down a small model on a GPU by a tenth
            self.rank_line(model, step)

    def rank_line(self, model: nn.Module, step: int) -> None:
        """Write ranks, number of trainable parameters and ω to ranks.jsonl if they are new, and report new ranks."""
        weights = self.method.weights(model)
        current: dict[str, Any] = {"ranks": ranks(model)}
        current["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if current != self.last or weights is not None:
            self._append(self.ranks, {"step": step, **current, **({} if weights is None else {"weights": weights})})
            if current["ranks"] != self.last.get("ranks"):
                self.reporters.ranks(current["ranks"], step)
            self.last = current
            self.counts.append(current["parameters"])


def _lock_identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a run's lock, which stays open as long as the run: a new lock has others."""
    try:
        lock = (folder / "run.lock").stat()
    except FileNotFoundError:
        return None
    return lock.st_dev, lock.st_ino


def peak_memory() -> int:
    """The most bytes in use at once: on a GPU by this process's tensors, else by the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
