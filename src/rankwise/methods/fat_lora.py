"""FatLoRA (Shalygin, Davydenko, Veprikov, MIPT 2025; also WeightLoRA+): SimplexLoRA's search with other defaults.

`FatLoRA[mfs=K, fs=T]` of their tables is `times: K, every: T`. SGD steps ω, at 5. Ranks are rounded up, so that it may
spend more than uniform ranks; changed sites start afresh; and at the end of the search ω is set to 1 and not folded in,
as their code does: the function may jump there.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from rankwise.methods.simplex_lora import SimplexLoRA


@dataclass(frozen=True)
class FatLoRA(SimplexLoRA, name="fat-lora"):
    """As simplex-lora with the authors' defaults: SGD on ω, ranks rounded up, changed sites afresh, ω = 1 at last."""

    times: int = 2
    rounding: Literal["floor", "ceil", "budget"] = "ceil"
    change: Literal["svd", "reinit"] = "reinit"
    omega_rate: float | None = 5.0

    resets: ClassVar[bool] = True
