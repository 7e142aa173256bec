"""VeRA (Kopiczko et al. 2024, arXiv 2310.11454), by PEFT: two vectors a layer, between matrices that all layers share.

h = W x + Λ_b B Λ_d A x,    A, B random and frozen; b (out,) starts at 0 and d (r,) at a constant
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from peft import PeftConfig, VeraConfig
from pydantic import Field

from rankwise.methods.peer import Peer


@dataclass(frozen=True)
class VeRA(Peer, name="vera"):
    """Trained vectors between frozen random matrices that all layers share (by PEFT).

    Attributes:
        rank: r, the entries of d.
        targets: `all-linear` (every linear layer except the output head), or names of modules, matched by their ends.
        start: the start of d.
    """

    configuration: ClassVar[type[PeftConfig]] = VeraConfig
    rank: Annotated[int, Field(ge=1)] = 256
    start: Annotated[float, Field(gt=0)] = 0.1

    sizes = ("rank",)

    @property
    def settings(self) -> dict[str, Any]:
        return {"r": self.rank, "d_initial": self.start}
