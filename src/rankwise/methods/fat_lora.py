"""FatLoRA (Shalygin, Davydenko, Veprikov, MIPT 2025; also WeightLoRA+): SimplexLoRA's search with other defaults.

`FatLoRA[mfs=K, fs=T]` in their tables is `times: K, every: T`. ω is stepped by SGD with rate 5. Ranks are rounded up,
so that they may cost more than uniform ranks, and changed sites start again. At the end of the search ω is set to 1
instead of folded, as in their code, which may change outputs abruptly.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from rankwise.methods.simplex_lora import SimplexLoRA
from rankwise.ranks.allocate import Rounding


@dataclass(frozen=True)
class FatLoRA(SimplexLoRA, name="fat-lora"):
    """simplex-lora with its authors' defaults: SGD on ω, ranks rounded up, changed sites restart, ω = 1 at the end."""

    times: int = 2
    rounding: Rounding = "ceil"
    change: Literal["svd", "reinit"] = "reinit"
    omega_rate: float | None = 5.0

    resets: ClassVar[bool] = True
