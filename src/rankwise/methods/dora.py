"""DoRA (Liu et al. 2024, arXiv 2402.09353), by PEFT, for comparison.

    h = m ∘ (W + s B A) x / ‖W + s B A‖,    m trained and equal to ‖W‖ at the start, norms over rows of W

The norm is a constant in the backward pass, as the paper proposes in section 4.3.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(LoRA, name="dora"):
    """LoRA on the direction of each weight, with a trained magnitude for each output (by PEFT)."""

    peft_options: ClassVar[dict[str, Any]] = {"use_dora": True}

    def beside(self, model: nn.Module) -> list[nn.Parameter]:
        """The magnitudes m, (out,) for each site."""
        return [p for name, p in model.named_parameters() if ".lora_magnitude_vector." in name]
