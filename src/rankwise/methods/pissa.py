"""PiSSA (Meng et al. 2024, arXiv 2404.02948), by PEFT, for comparison.

    W = U diag(S) Vᵀ,    s B A = U_r diag(S_r) V_rᵀ at the start,    W ← W - s B A

The principal part of W trains. Saving turns the result into plain LoRA on the pretrained W, at twice the rank.
"""

from dataclasses import dataclass
from typing import Literal

from rankwise.methods.lora import LoRA


@dataclass(frozen=True)
class PiSSA(LoRA, name="pissa"):
    """LoRA that starts as the principal part of W, and trains that (by PEFT)."""

    init: Literal["kaiming", "normal", "svd", "svd_residual", "svd_authors", "pissa"] = "pissa"
