"""AdamW with groups stepped by plain SGD, which after each step lets the method change ω and the ranks.

Bare loops and Trainers all call `optimizer.step()`, so this is the only code path. A step that a gradient scaler skips
does not call it, and so changes no rank.
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
    "ranks cannot be learnt on a model that is sharded (FSDP): search without sharding, save the adapter, and train "
    "that sharded with a fixed-rank method"
)
REWARM_FROM = 1e-3  # start of a re-warm-up, as a share of the rate (SimplexLoRA, authors' LinearLR)


class Decides(Protocol):
    """What the optimizer needs from a method."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]: ...
    def before_step(self, model: nn.Module) -> None: ...
    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None: ...
    def search(self, model: nn.Module, moved: float | None = None) -> Search | None: ...
    @property
    def check_every(self) -> int: ...
    @property
    def rewarm_steps(self) -> int: ...


class SimplexAdam(torch.optim.AdamW):
    """AdamW over the method's parameter groups, followed by the method's step on ω and its rank changes.

    A group may set `lr`, `weight_decay` and `rule`: "adamw" (default) or "sgd", which is p ← p − lr ∂L/∂p. A group with
    a `clock` is stepped by AdamW with that rate instead of `lr`, each entry by at most that, and not while `lr` is 0,
    so that schedules and re-warm-ups do not change its steps. A group marked `scale` holds ω or gates, and `after_step`
    gets the size of its steps.

    If several processes train one model (torch.distributed), each takes every step, on averaged gradients. They compare
    the new ranks at each change, and new factors are copied from the first process.

    Args:
        method: a rankwise method.
        model: the model that it was attached to.
        lr, betas, eps, weight_decay: for groups that do not set their own.
    Raises:
        InputError: a method that learns ranks, on a model that is sharded (FSDP).
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
        self.moved: float | None = None  # `moved` of the method's last plan
        groups = [{"rule": "adamw", **group} for group in method.param_groups(model)]
        if method.check_every and any(hasattr(p, "device_mesh") for group in groups for p in group["params"]):
            raise InputError(SHARDED)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.defaults["rule"] = "adamw"  # for groups that are added later
        self.silence = Silence(model, method.check_every)
        if Structure.of(model).ranks:
            follow(model, self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group, then the method's; returns the result of `closure`.

        Raises:
            RuntimeError: several processes chose different ranks, or did not average their gradients after a change.
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
        """The result of the method's search for ranks so far; None for a method that learns none.

        Call it before `method.fold`, which removes scales that may not have been turned into ranks yet.
        """
        return self.method.search(self.model, self.moved)

    def _change(self, plan: RankPlan) -> None:
        """Carry out a rank change, the same one in all processes."""
        self.silence.warn(self.model)
        if not together.agree(str(sorted(plan.items())), self._device):
            raise RuntimeError(
                f"the processes chose different ranks at step {self.steps}, so their steps differed: average gradients "
                "before each step, with rankwise.average_gradients(model)"
            )
        if plan.moved is not None:
            self.moved = plan.moved
        if resize(self.model, plan):
            self.changed = self.steps
            # each process drew new factors from its own random stream, which may differ after dropout
            together.spread(p for group in self.param_groups for p in group["params"])

    def _check_averaged(self) -> None:
        """Check that gradients are averaged: DistributedDataParallel still averages those of replaced parameters."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not together.agree(str(norm), self._device):
            raise RuntimeError(
                f"gradients differ between the processes since ranks changed at step {self.changed}: use RankTrainer, "
                "or call rankwise.average_gradients(model) before each step, or wrap the model again in "
                "DistributedDataParallel whenever optimizer.changed == optimizer.steps"
            )

    @property
    def _device(self) -> torch.device:
        return next(p.device for group in self.param_groups for p in group["params"])

    @contextmanager
    def _rewarmed(self) -> Iterator[None]:
        """Context that scales all rates linearly from REWARM_FROM to 1 in the steps after a rank change."""
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
        """Context that steps the SGD groups and hides their gradients from AdamW."""
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
        """Context in which AdamW steps the groups with a clock by that."""
        groups = [group for group in self.param_groups if "clock" in group]
        clocked = [(group, group["lr"], [p.clone() for p in group["params"]]) for group in groups]
        for group, *_ in clocked:
            group["lr"] = _step_size(group)
        try:
            yield
            for group, _, before in clocked:  # Adam's steps can exceed its rate when gradients grow
                for p, old in zip(group["params"], before, strict=True):
                    p.clamp_(old - group["lr"], old + group["lr"])
        finally:
            for group, rate, _ in clocked:
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, the step counters, and the ranks that the state belongs to."""
        structure = Structure.of(self.model)
        counted = {"steps": self.steps, "changed": self.changed, "moved": self.moved, "silence": self.silence.state()}
        return {**super().state_dict(), "rankwise": {**counted, "ranks": structure.ranks, "scaled": structure.scaled}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state with the same ranks as the model; load the model's weights first, which sets its ranks.

        Raises:
            RuntimeError: the state belongs to other ranks, so its moments are of other parameters.
        """
        own = state_dict.get("rankwise")
        if own is None:
            raise RuntimeError("this optimizer state was not written by SimplexAdam")
        if Structure(dict(own["ranks"]), own["scaled"]) != Structure.of(self.model):
            raise RuntimeError(
                "the optimizer's checkpoint has other ranks than the model: first load the model's weights from the "
                "same checkpoint (rankwise.load_checkpoint, or model.load_state_dict), which sets the ranks"
            )
        marks = [group.get("scale", False) for group in self.param_groups]  # missing in older checkpoints
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "rankwise"})
        for group, mark in zip(self.param_groups, marks, strict=True):
            group |= {"scale": True} if mark else {}
        self.steps, self.changed, self.moved = own["steps"], own["changed"], own.get("moved")
        self.silence.load(own["silence"])


def _step_size(group: Mapping[str, Any]) -> float:
    """The size of a group's step: its rate, or its clock if it has one and the rate is not 0."""
    return group["clock"] if "clock" in group and group["lr"] > 0 else group["lr"]
