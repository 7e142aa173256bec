"""PEFT's LoRA-FA optimizer as a stepper of rankwise: it knows its method, counts its steps and resumes exactly."""

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

MARKS = ("names", "scaling_factors")  # what PEFT's optimizer wants to know of each parameter of a group


class ProjectedAdam(LoraFAOptimizer):
    """AdamW over the method's groups that takes for the gradient of each B, its A being frozen,

        g = s⁻² ∂L/∂B (A Aᵀ)⁻¹.

    PEFT forms this product in bfloat16 wherever that is at hand, on CPUs too, adds 1e-8 to the diagonal of A Aᵀ, and
    decays weights after the step.

    Args:
        method: a method whose A is frozen and whose ranks stay.
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
        self.steps, self.changed = 0, 0  # as SimplexAdam counts; `changed` stays, since no rank does
        # Its own groups put all parameters under one weight decay. The r and alpha given here it does not use.
        peft_group = create_lorafa_optimizer(peft_model(model), r=1, lora_alpha=1, lr=lr).param_groups[0]
        marks = {
            id(p): mark for p, *mark in zip(peft_group["params"], *(peft_group[key] for key in MARKS), strict=True)
        }
        frozen = {id(site.B): site.A for site in sites(model) if site.present}
        groups = method.param_groups(model)
        for group in groups:  # each A right before its B
            group["params"] = [q for p in group["params"] for q in ([frozen[id(p)], p] if id(p) in frozen else [p])]
            group |= {key: [marks[id(p)][i] for p in group["params"]] for i, key in enumerate(MARKS)}
        super().__init__(groups, lr, betas, eps, weight_decay)  # type: ignore[arg-type]  # PEFT means groups too
        self._begun_with = self._params()
        self.silence = Silence(model)
        follow(model, self)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returned.

        Raises:
            RuntimeError: if ranks have changed, for PEFT keeps moments by a layer's name, whatever its factors are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        now = self._params()
        if len(now) != len(self._begun_with) or any(p is not q for p, q in zip(now, self._begun_with, strict=True)):
            raise RuntimeError("ranks have changed, which ProjectedAdam cannot follow: make a new one")
        self.steps += 1
        self.silence.check_gradients(self.model, self.steps)
        for p, name in ((p, name) for g in self.param_groups for p, name in zip(g["params"], g["names"], strict=True)):
            if p.grad is None and "lora_B" in name:  # PEFT takes for granted that each B had a part in the loss
                p.grad = torch.zeros_like(p)
        super().step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """PEFT's state, the steps taken, and the ranks that the state belongs to."""
        own = {"steps": self.steps, "ranks": Structure.of(self.model).ranks, "silence": self.silence.state()}
        return {**super().state_dict(), "projected": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state whose ranks are the model's own; load the model's weights first.

        Raises:
            RuntimeError: if the state is of another optimizer or of other ranks.
        """
        own = state_dict.get("projected")
        if own is None:
            raise RuntimeError("this optimizer state was not written by ProjectedAdam")
        if own["ranks"] != Structure.of(self.model).ranks:
            raise RuntimeError("the optimizer's checkpoint has other ranks than the model: load its weights first")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "projected"})
        device = self._params()[0].device
        for state in self.state.values():  # torch moves what it knows by a parameter, and PEFT goes by names
            state.update({key: value.to(device) for key, value in state.items() if isinstance(value, Tensor)})
        self.steps = own["steps"]
        self.silence.load(own["silence"])
