"""(IA)³ (Liu et al. 2022, arXiv 2205.05638), by PEFT: a vector a layer that scales its outputs, starting at 1.

    h = l ∘ (W x + b)

The paper scales keys, values, and the hidden activations of the feed-forward part, here the outputs of all targets.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import IA3Config, PeftConfig

from rankwise.methods.peer import Peer


@dataclass(frozen=True)
class IA3(Peer, name="ia3"):
    """A trained scale for each output of each layer (by PEFT).

    Attributes:
        targets: `all-linear` (every linear layer except the output head), or names of modules, matched by their ends.
    """

    configuration: ClassVar[type[PeftConfig]] = IA3Config

    @property
    def settings(self) -> dict[str, Any]:
        return {"feedforward_modules": []}
