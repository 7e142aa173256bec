"""AdamW that also knows plain SGD groups and, after each step, lets the method act on ω and on the ranks.

This is the one code path: a bare loop calls `optimizer.step()`, and so does every Trainer. A step that a gradient
scaler skips never comes here, so it changes no rank either.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankwise.ranks.resize import RankPlan, Structure, follow, resize

REWARM_FROM = 1e-3  # where a re-warm-up begins, as a share of the rate (SimplexLoRA, authors' LinearLR)


class Decides(Protocol):
    """What the optimizer asks of a method."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]: ...
    def before_step(self, model: nn.Module) -> None: ...
    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None: ...
    @property
    def rewarm_steps(self) -> int: ...


class SimplexAdam(torch.optim.AdamW):
    """AdamW over the method's parameter groups, the method's step on ω, and the rank changes it asks for.

    A group may set `lr`, `weight_decay` and `rule`: "adamw" (default) or "sgd", which is p ← p − lr ∂L/∂p.

    Args:
        method: a rankwise method.
        model: the model it was attached to.
        lr, betas, eps, weight_decay: of the groups that do not set their own.
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
        groups = [{"rule": "adamw", **group} for group in method.param_groups(model)]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.defaults["rule"] = "adamw"  # of groups that are added later
        if Structure.of(model).ranks:
            follow(model, self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group, then the method's; returns what `closure` returned.

        Raises:
            RuntimeError: if ranks would change in one of several processes (DistributedDataParallel).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        with self._rewarmed():
            scales = (g["lr"] for g in self.param_groups if g.get("name") in ("omega", "gates"))
            lr = next(scales, self.param_groups[0]["lr"])
            self.method.before_step(self.model)
            with self._sgd():
                super().step()
        plan = self.method.after_step(self.model, self.steps, lr)
        if plan is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "ranks cannot change under DistributedDataParallel: it would go on averaging the gradients of the "
                "replaced parameters only, and the processes would drift apart; train the search in one process"
            )
        if plan is not None and resize(self.model, plan):
            self.changed = self.steps
        return loss

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

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, the step counters, and the ranks that the state belongs to."""
        now = Structure.of(self.model)
        own = {"steps": self.steps, "changed": self.changed, "ranks": now.ranks, "scaled": now.scaled}
        return {**super().state_dict(), "rankwise": own}

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
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "rankwise"})
        self.steps, self.changed = own["steps"], own["changed"]
