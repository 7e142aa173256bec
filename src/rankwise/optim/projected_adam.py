"""PEFT's LoRA-FA optimizer with what rankwise's optimizers have: its method, a step count and exact resume."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.optimizers import create_lorafa_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import Tensor, nn

from rankwise.optim.simplex_adam import Decides
from rankwise.ranks import sites
from rankwise.ranks.replace import follow
from rankwise.ranks.restore import Structure
from rankwise.ranks.silence import Silence
from rankwise.ranks.sites import peft_model

MARKS = ("names", "scaling_factors")  # lists in each group of PEFT's optimizer, with an entry for each parameter


class ProjectedAdam(LoraFAOptimizer):
    """AdamW over the method's groups that replaces the gradient of each B, whose A is frozen, by

        g = s⁻² ∂L/∂B (A Aᵀ)⁻¹.

    PEFT computes this product in bfloat16 where available, on CPUs too, adds 1e-8 to the diagonal of A Aᵀ, and decays
    weights after the step.

    Args:
        method: a method with frozen A and fixed ranks.
        model: the model that it was attached to.
        lr, betas, eps, weight_decay: for groups that do not set their own.
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
        self.steps, self.changed = 0, 0  # as in SimplexAdam; `changed` stays 0
        # PEFT's own groups have one weight decay for all parameters. It ignores r and alpha.
        peft_group = create_lorafa_optimizer(peft_model(model), r=1, lora_alpha=1, lr=lr).param_groups[0]
        lists = (peft_group[key] for key in MARKS)
        marks = {id(p): mark for p, *mark in zip(peft_group["params"], *lists, strict=True)}
        frozen = {id(site.B): site.A for site in sites(model) if site.present}
        groups = method.param_groups(model)
        for group in groups:  # each A right before its B
            group["params"] = [q for p in group["params"] for q in ([frozen[id(p)], p] if id(p) in frozen else [p])]
            group |= {key: [marks[id(p)][i] for p in group["params"]] for i, key in enumerate(MARKS)}
        super().__init__(groups, lr, betas, eps, weight_decay)  # type: ignore[arg-type]  # PEFT takes groups too
        self._initial = self._params()
        self.silence = Silence(model)
        follow(model, self)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the result of `closure`.

        Raises:
            RuntimeError: ranks have changed, but PEFT keeps moments by the layer's name, whatever its factors are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        current = self._params()
        if len(current) != len(self._initial) or any(p is not q for p, q in zip(current, self._initial, strict=True)):
            raise RuntimeError("ranks have changed, which ProjectedAdam cannot follow: make a new one")
        self.steps += 1
        self.silence.check_gradients(self.model, self.steps)
        for p, name in ((p, name) for g in self.param_groups for p, name in zip(g["params"], g["names"], strict=True)):
            if p.grad is None and "lora_B" in name:  # PEFT expects a gradient for every B
                p.grad = torch.zeros_like(p)
        super().step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """PEFT's state, the step count, and the ranks that the state belongs to."""
        own = {"steps": self.steps, "ranks": Structure.of(self.model).ranks, "silence": self.silence.state()}
        return {**super().state_dict(), "projected": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state with the same ranks as the model; load the model's weights first.

        Raises:
            RuntimeError: the state is from another optimizer or has other ranks.
        """
        own = state_dict.get("projected")
        if own is None:
            raise RuntimeError("this optimizer state was not written by ProjectedAdam")
        if own["ranks"] != Structure.of(self.model).ranks:
            raise RuntimeError("the optimizer's checkpoint has other ranks than the model: load its weights first")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "projected"})
        device = self._params()[0].device
        for state in self.state.values():  # torch moves only state kept by parameter, and PEFT keeps it by name
            state.update({key: value.to(device) for key, value in state.items() if isinstance(value, Tensor)})
        self.steps = own["steps"]
        self.silence.load(own["silence"])
