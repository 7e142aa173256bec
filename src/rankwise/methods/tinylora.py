"""TinyLoRA (Morris et al. 2026, arXiv 2602.04118), by PEFT: a few numbers a layer, or for all layers together.

h = W x + U Σ (Σ_i v_i P_i) Vᵀ x,    U Σ Vᵀ the SVD of W at rank r, P random and frozen, v (u,) trained
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from peft import PeftConfig, TinyLoraConfig
from pydantic import Field
from torch import nn

from rankwise.errors import require
from rankwise.methods.peer import Peer
from rankwise.ranks.layers import holds_codes


@dataclass(frozen=True)
class TinyLoRA(Peer, name="tinylora"):
    """A short trained vector in the leading singular directions of each weight (by PEFT).

    Attributes:
        rank: r, how many singular directions.
        entries: u, the entries of a vector.
        tying: which share of the layers have a vector in common: 0, each has its own; 1, all have one.
        targets: `all-linear` (every linear layer except the output head), or names of modules, matched by their ends.
    """

    configuration: ClassVar[type[PeftConfig]] = TinyLoraConfig
    rank: Annotated[int, Field(ge=1)] = 2
    entries: Annotated[int, Field(ge=1)] = 64
    tying: Annotated[float, Field(ge=0, le=1)] = 0.0

    sizes = ("entries",)

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        codes = any(map(holds_codes, model.parameters()))
        require(not codes, "tinylora decomposes weights, which it cannot do with codes: leave quantise out")
        return super().attach(model, head)

    @property
    def settings(self) -> dict[str, Any]:
        own = {"r": self.rank, "u": self.entries, "weight_tying": self.tying}
        return {**own, "init_v_bound": 0.0}  # so that outputs do not change at the start
