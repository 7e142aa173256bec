"""Dead sites, which have no part in the loss because the forward of their layer is never called.

Attention that reads the weights of its projections instead of calling them (WavLM, SigLIP, torch's MultiheadAttention,
Jamba's `dt_proj`) leaves their adapters without a gradient. The gradient of B shows which these are: wherever a site is
used it is not 0 from the first batch on, while that of A is 0 as long as B is. Gradients are read before each step, so
one micro-batch is enough to clear a site.

An expert to which no token has been routed yet has no gradients either, but is not dead: none of its sites has had a
gradient, while other experts of the same list have.
"""

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from rankwise.ranks.sites import kind, peft_model, sites

PATIENCE = 10
"""Steps after which a run whose ranks do not change warns of dead sites."""


class Silence:
    """The sites of a model that have had no gradient yet, with one warning at step `due`.

    Args:
        model: any model; without sites nothing happens.
        due: the step of the first rank change, which the warning precedes; 0 if ranks never change.
    """

    def __init__(self, model: nn.Module, due: int = 0):
        self.due, self.warned = due or PATIENCE, False
        # the gradient of a shard proves nothing; ranks of sharded models do not change
        self.waiting = [site for site in sites(model) if site.present and not hasattr(site.B, "device_mesh")]

    def check_gradients(self, model: nn.Module, step: int) -> None:
        """Call before step `step` (from 1), when gradients are complete and nothing but the loss has added to them."""
        if self.warned:
            return
        self.waiting = [s for s in self.waiting if not s.present or s.B.grad is None or not s.B.grad.any()]
        if step >= self.due:
            self.warn(model)

    def warn(self, model: nn.Module) -> None:
        """Warn about dead sites at the first call, after which their `Site.dead` is True."""
        if self.warned:
            return
        self.warned = True
        names = _dead(model, {site.name for site in self.waiting if site.present})
        self._mark(names)
        if names:
            shapes = Counter(map(kind, names))
            which = ", ".join(f"{shape} ({count})" if "*" in shape else shape for shape, count in shapes.items())
            warnings.warn(
                f"no gradient has reached {len(names)} of {len(sites(model))} sites, so they learn nothing: "
                f"{which}; leave them out of targets",
                stacklevel=2,
            )

    def _mark(self, names: Iterable[str]) -> None:
        for site in self.waiting:
            if site.name in names:
                site.layer.__dict__.setdefault("lora_dead", set()).add(site.adapter)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        waiting = [site.name for site in self.waiting if not self.warned or site.dead]
        return {"told": self.warned, "waiting": waiting}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`, without repeating its warning."""
        self.waiting = [site for site in self.waiting if site.name in state["waiting"]]
        if state["told"]:
            self.warned = True
            self._mark(state["waiting"])


def _dead(model: nn.Module, silent: set[str]) -> list[str]:
    """The `silent` sites in model order, without those in an expert that waits for its first token."""
    base = peft_model(model).get_base_model() if silent else model
    active = [site.name for site in sites(model) if site.present and site.name not in silent]

    def waits(name: str) -> bool:
        parts = name.split(".")
        for end in range(1, len(parts)):
            experts, expert = ".".join(parts[:end]), ".".join(parts[: end + 1])
            if "expert" in parts[end - 1] and isinstance(base.get_submodule(experts), (nn.ModuleList, nn.ModuleDict)):
                others = any(other.startswith(f"{experts}.") for other in active)
                return others and not any(f"{other}.".startswith(f"{expert}.") for other in active)
        return False

    return [site.name for site in sites(model) if site.name in silent and not waits(site.name)]
