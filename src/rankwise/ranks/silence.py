"""Sites that take no part in the loss: being a linear layer is no proof that a layer's own forward ever runs.

Attention that reads the weights of its projections instead of calling them (WavLM, SigLIP, torch's MultiheadAttention,
Jamba's `dt_proj`) leaves their adapters without a gradient. B shows which these are: its gradient is not 0 from the
first batch on wherever the site is used, while that of A is 0 as long as B is. Gradients are read before each step, so
one micro-batch is enough to clear a site.

An expert that no token was routed to yet has no gradient either, and is not dead: none of its sites has one, while
other experts of the same list have had theirs.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from rankwise.ranks.sites import peft_model, sites

PATIENCE = 10
"""Steps after which a run whose ranks stay warns of them."""


class Silence:
    """The sites of a model that have had no gradient yet, with one warning at step `due`.

    Args:
        model: a model; without sites nothing happens.
        due: the step before whose rank change the warning comes; 0 where ranks stay.
    """

    def __init__(self, model: nn.Module, due: int = 0):
        self.due, self.warned = due or PATIENCE, False
        # a shard's gradient is no proof of anything, and ranks stay there
        self.waiting = [site for site in sites(model) if site.present and not hasattr(site.B, "device_mesh")]

    def check_gradients(self, model: nn.Module, step: int) -> None:
        """Before step `step` (from 1), with all gradients there and no term in them that no loss function has."""
        if self.warned:
            return
        self.waiting = [s for s in self.waiting if not s.present or s.B.grad is None or not s.B.grad.any()]
        if step >= self.due:
            self.warn(model)

    def warn(self, model: nn.Module) -> None:
        """Warn of the sites that are dead, the first time; from then on `Site.dead` says so."""
        if self.warned:
            return
        self.warned = True
        names = _dead(model, {site.name for site in self.waiting if site.present})
        self._mark(names)
        if names:
            shapes = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
            which = ", ".join(f"{shape} ({count})" if "*" in shape else shape for shape, count in shapes.items())
            warnings.warn(
                f"no gradient has reached {len(names)} of {len(sites(model))} sites, so nothing is learnt there: "
                f"{which}; leave them out of targets",
                stacklevel=2,
            )

    def _mark(self, names: Iterable[str]) -> None:
        for site in self.waiting:
            if site.name in names:
                site.layer.__dict__.setdefault("lora_dead", set()).add(site.adapter)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        waiting = [site.name for site in self.waiting if not self.warned or site.dead]
        return {"told": self.warned, "waiting": waiting}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; a warning that was given is not given again."""
        self.waiting = [site for site in self.waiting if site.name in state["waiting"]]
        if state["told"]:
            self.warned = True
            self._mark(state["waiting"])


def _dead(model: nn.Module, silent: set[str]) -> list[str]:
    """Those of the `silent` sites, in model order, that lie in no expert waiting for its first token."""
    base = peft_model(model).get_base_model() if silent else model
    heard = [site.name for site in sites(model) if site.present and site.name not in silent]

    def waits(name: str) -> bool:
        steps = name.split(".")
        for end in range(1, len(steps)):
            holder, expert = ".".join(steps[:end]), ".".join(steps[: end + 1])
            if "expert" in steps[end - 1] and isinstance(base.get_submodule(holder), (nn.ModuleList, nn.ModuleDict)):
                others = any(other.startswith(f"{holder}.") for other in heard)
                return others and not any(f"{other}.".startswith(f"{expert}.") for other in heard)
        return False

    return [site.name for site in sites(model) if site.name in silent and not waits(site.name)]
