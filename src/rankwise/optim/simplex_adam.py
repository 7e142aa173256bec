"""AdamW that also knows plain SGD groups and, after each step, lets the method act on ω and on the ranks.

This is the one code path: a bare loop calls `optimizer.step()`, and so does every Trainer. A step that a gradient
scaler skips never comes here, so it changes no rank either.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankwise.errors import InputError
from rankwise.processes import together
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.replace import follow
from rankwise.ranks.resize import resize
from rankwise.ranks.restore import Structure
from rankwise.ranks.silence import Silence
from rankwise.runs.search import Search

SHARDED = (
    "ranks cannot be learnt on a model that is sharded (FSDP): search without it, save the adapter, and train that one "
    "sharded with a fixed-rank method"
)
REWARM_FROM = 1e-3  # where a re-warm-up begins, as a share of the rate (SimplexLoRA, authors' LinearLR)


class Decides(Protocol):
    """What the optimizer asks of a method."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]: ...
    def before_step(self, model: nn.Module) -> None: ...
    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None: ...
    def search(self, model: nn.Module, moved: float | None = None) -> Search | None: ...
    @property
    def check_every(self) -> int: ...
    @property
    def rewarm_steps(self) -> int: ...


class SimplexAdam(torch.optim.AdamW):
    """AdamW over the method's parameter groups, the method's step on ω, and the rank changes it asks for.

    A group may set `lr`, `weight_decay` and `rule`: "adamw" (default) or "sgd", which is p ← p − lr ∂L/∂p. With a
    `clock` AdamW steps it by that and not by `lr`, no entry by more, and not while `lr` is 0: what sets rates, such as
    a schedule or a re-warm-up, moves no clock. A group marked `scale` holds ω or gates: `after_step` is told the size
    of its steps.

    Where several processes train one model (torch.distributed), each takes every step, on gradients that were averaged
    before. They compare the new ranks at each change, and fresh factors are those of the first process.

    Args:
        method: a rankwise method.
        model: the model it was attached to.
        lr, betas, eps, weight_decay: of the groups that do not set their own.
    Raises:
        InputError: a method that learns ranks on a model that is sharded (FSDP).
    """

    def __init__(
        self,
        method: Decides,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.method, self.model = method, model
        self.steps = 0  # steps taken
        self.changed = 0  # the step of the last rank change, 0 before any
        self.moved: float | None = None  # what the method's last plan has said of it
        groups = [{"rule": "adamw", **group} for group in method.param_groups(model)]
        if method.check_every and any(hasattr(p, "device_mesh") for group in groups for p in group["params"]):
            raise InputError(SHARDED)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.defaults["rule"] = "adamw"  # of groups that are added later
        self.silence = Silence(model, method.check_every)
        if Structure.of(model).ranks:
            follow(model, self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group, then the method's; returns what `closure` returned.

        Raises:
            RuntimeError: if several processes have decided on different ranks, or if after a rank change their
                gradients were not averaged any more.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.changed and self.changed == self.steps:
            self._check_averaged()
        self.steps += 1
        self.silence.check_gradients(self.model, self.steps)
        with self._rewarmed():
            lr = next((_step_size(g) for g in self.param_groups if g.get("scale")), self.param_groups[0]["lr"])
            self.method.before_step(self.model)
            with self._sgd(), self._clocked():
                super().step()
        plan = self.method.after_step(self.model, self.steps, lr)
        if plan is not None:
            self._change(plan)
        return loss

    def search(self) -> Search | None:
        """What the method's search for ranks has come to by now; None for a method that learns none.

        Ask before `method.fold`, which takes away what may not have been turned into ranks yet.
        """
        return self.method.search(self.model, self.moved)

    def _change(self, plan: RankPlan) -> None:
        """Carry out a rank change, the same one in all processes."""
        self.silence.warn(self.model)
        if not together.agree(str(sorted(plan.items())), self._device):
            raise RuntimeError(
                f"the processes found different ranks at step {self.steps}: they did not take the same steps; average "
                "the gradients before each, with rankwise.average_gradients(model)"
            )
        if plan.moved is not None:
            self.moved = plan.moved
        if resize(self.model, plan):
            self.changed = self.steps
            # each has drawn fresh factors from its own random stream, which dropout may have moved apart
            together.spread(p for group in self.param_groups for p in group["params"])

    def _check_averaged(self) -> None:
        """DistributedDataParallel would go on averaging the gradients of the parameters that were replaced."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not together.agree(str(norm), self._device):
            raise RuntimeError(
                f"the gradients differ between the processes since ranks changed at step {self.changed}: use "
                "RankTrainer, or rankwise.average_gradients(model) before each step, or wrap the model anew in "
                "DistributedDataParallel whenever optimizer.changed == optimizer.steps"
            )

    @property
    def _device(self) -> torch.device:
        return next(p.device for group in self.param_groups for p in group["params"])

    @contextmanager
    def _rewarmed(self) -> Iterator[None]:
        """Every rate times the share that a re-warm-up allows at this step, from REWARM_FROM at the first one on."""
        rewarm, since = self.method.rewarm_steps, self.steps - self.changed
        if not self.changed or since > rewarm:
            yield
            return
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * (REWARM_FROM + (1 - REWARM_FROM) * (since - 1) / rewarm)
        try:
            yield
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    @contextmanager
    def _sgd(self) -> Iterator[None]:
        """Step the SGD groups, and keep their gradients out of AdamW's sight."""
        hidden: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for p in group["params"] if group["rule"] == "sgd" else ():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-float(group["lr"]))
                    hidden.append((p, p.grad))
                    p.grad = None
        yield
        for p, grad in hidden:
            p.grad = grad

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        """Let AdamW step the groups that have a clock by that."""
        groups = [group for group in self.param_groups if "clock" in group]
        clocked = [(group, group["lr"], [p.clone() for p in group["params"]]) for group in groups]
        for group, *_ in clocked:
            group["lr"] = _step_size(group)
        try:
            yield
            for group, _, before in clocked:  # Adam's steps can be longer than its rate where gradients grow
                for p, old in zip(group["params"], before, strict=True):
                    p.clamp_(old - group["lr"], old + group["lr"])
        finally:
            for group, rate, _ in clocked:
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, the step counters, and the ranks that the state belongs to."""
        now = Structure.of(self.model)
        counted = {"steps": self.steps, "changed": self.changed, "moved": self.moved, "silence": self.silence.state()}
        return {**super().state_dict(), "rankwise": {**counted, "ranks": now.ranks, "scaled": now.scaled}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state whose ranks are the model's own; load the model's weights first, they bring their ranks.

        Raises:
            RuntimeError: if the state belongs to other ranks. Going on would train with moments of other parameters.
        """
        own = state_dict.get("rankwise")
        if own is None:
            raise RuntimeError("this optimizer state was not written by SimplexAdam")
        if Structure(dict(own["ranks"]), own["scaled"]) != Structure.of(self.model):
            raise RuntimeError(
                "the optimizer's checkpoint has other ranks than the model: load the model's weights from the same "
                "checkpoint first (rankwise.load_checkpoint, or model.load_state_dict), they bring their ranks along"
            )
        marks = [group.get("scale", False) for group in self.param_groups]  # which older checkpoints do not have
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "rankwise"})
        for group, mark in zip(self.param_groups, marks, strict=True):
            group |= {"scale": True} if mark else {}
        self.steps, self.changed, self.moved = own["steps"], own["changed"], own.get("moved")
        self.silence.load(own["silence"])


def _step_size(group: Mapping[str, Any]) -> float:
    """The size of a group's step: its rate, or its clock's unless the rate is 0."""
    return group["clock"] if "clock" in group and group["lr"] > 0 else group["lr"]
