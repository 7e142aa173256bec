"""DoRA (Liu et al. 2024, arXiv 2402.09353), by PEFT, for comparison.

    h = m ∘ (W + s B A) x / ‖W + s B A‖,    m trained and equal to ‖W‖ at the start, norms over rows of W

The norm is a constant in the backward pass, as the paper proposes in section 4.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from rankwise.errors import require
from rankwise.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(LoRA, name="dora"):
    """LoRA on the direction of each weight, with a trained magnitude for each output (by PEFT)."""

    peft_options: ClassVar[dict[str, Any]] = {"use_dora": True}

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        # PEFT 0.21 reads each weight in every pass; on a CPU that takes bitsandbytes the scales of an 8-bit one.
        on_cpu = [type(p).__name__ for p in model.parameters() if not (p.is_cuda or torch.cuda.is_available())]
        require("Int8Params" not in on_cpu, "dora cannot run on 8-bit weights on a CPU: use quantise = 4bit")
        return super().attach(model, head)

    def beside(self, model: nn.Module) -> list[nn.Parameter]:
        """The magnitudes m, (out,) for each site."""
        return [p for name, p in model.named_parameters() if ".lora_magnitude_vector." in name]
