"""SoRA (Ding et al. 2023, arXiv 2311.11696): gates decide which units of rank stay.

    h = W x + b + s B diag(g) A x
    g ← T_{η_t λ}(g - η_t ∂L/∂g),    T_ξ(x) = sign(x) max(|x| - ξ, 0)

is the proximal gradient step on L + λ‖g‖₁ (eq. 5), which sets gates that are not worth the threshold to exactly 0. At
the end units with gate 0 are cut and the others folded into B, which leaves plain LoRA of rank nnz(g).

The authors' released code differs: its threshold is a constant ξ, not a multiple of the rate, it also adds an ℓ1 term
to the loss, and because of the order of two in-place operations it zeroes all |x| < 2ξ. A gate without influence on the
loss shrinks by λ Σ_t η_t in total. With the paper's λ = 3e-4 and the rate of the weights, 8e-4, no gate would reach 0,
so gates have their own rate, by default 10, at which 1,000 steps close gates that start near 1. While B is near 0, so
are the gradients of the gates: in short runs all shrink equally before the loss can distinguish them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rankwise.methods.lora import LoRA
from rankwise.optim import project
from rankwise.ranks import RankPlan
from rankwise.ranks.scales import Gates, trained_scales
from rankwise.runs.search import Search


@dataclass(frozen=True)
class SoRA(LoRA, name="sora"):
    """LoRA with a gate per unit of rank; a soft threshold closes gates, and closed units are cut at the end.

    Attributes:
        sparsity: λ, the weight of ‖g‖₁. The threshold of a step is the gates' rate times λ.
        gates: the start of the gates: `normal`, from N(0, 1) (authors' code), or `ones` (a course report on SoRA).
        gate_rate: learning rate of the gates, which follows the run's schedule; 0 for the run's own rate.
        gate_rule: the optimizer of the gates before the threshold: `sgd`, or `adamw` without weight decay.
    """

    sparsity: Annotated[float, Field(ge=0)] = 3e-4
    gates: Literal["normal", "ones"] = "ones"
    gate_rate: Annotated[float, Field(ge=0)] = 10.0
    gate_rule: Literal["sgd", "adamw"] = "sgd"

    keeps_ranks: ClassVar[bool] = False

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        model = super().attach(model, head)
        Gates.put_on(model, torch.randn if self.gates == "normal" else torch.ones)
        return model

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        gates = trained_scales(model)
        gate_ids = {id(g) for g in gates}
        groups = super().param_groups(model)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in gate_ids]
        rate = {"lr": self.gate_rate} if self.gate_rate else {}
        own = {"name": "gates", "scale": True, "params": gates, "rule": self.gate_rule, "weight_decay": 0.0, **rate}
        return [*groups, own]

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None:
        alike: dict[Any, list[Tensor]] = {}
        for gates in trained_scales(model):
            alike.setdefault((gates.device, gates.dtype), []).append(gates)
        for group in alike.values():  # as one tensor: far fewer operations than there are sites
            flat = torch.cat(group)
            project.check_finite(flat, "gates are", "gate_rate", step, due=step % self.check_every == 0)
            closed = project.prox_l1(flat, lr * self.sparsity).split([len(gates) for gates in group])
            torch._foreach_copy_(group, list(closed))
        return None

    def final(self, model: nn.Module) -> int | None:
        return (super().final(model) or 0) - sum(g.numel() for g in trained_scales(model))

    def search(self, model: nn.Module, moved: float | None = None) -> Search | None:
        result = super().search(model)
        if result is None:
            return None
        if not result.changed:
            result = replace(result, advice="no gate has closed: raise sparsity or gate_rate, or train longer")
        gates = trained_scales(model)
        if self.gates != "ones" or not gates:  # the start of random gates is not kept
            return result
        return replace(result, moved=max(float((g.detach() - 1).abs().max()) for g in gates), weights="gates")

    @property
    def check_every(self) -> int:
        return 20
