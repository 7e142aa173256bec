"""FourierFT (Gao et al. 2024, arXiv 2405.03003), by PEFT: some coefficients of the Fourier transform of ΔW.

h = W x + α F⁻¹(c) x,    c is 0 but for n entries at random places, the same for all layers, which train
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from peft import FourierFTConfig, PeftConfig
from pydantic import Field

from rankwise.methods.peer import Peer


@dataclass(frozen=True)
class FourierFT(Peer, name="fourierft"):
    """A few trained Fourier coefficients of each layer's change (by PEFT).

    Attributes:
        frequencies: n, how many coefficients of each layer train.
        alpha: α, the scale of the change.
        targets: `all-linear` (every linear layer except the output head), or names of modules, matched by their ends.
    """

    configuration: ClassVar[type[PeftConfig]] = FourierFTConfig
    frequencies: Annotated[int, Field(ge=1)] = 1000
    alpha: Annotated[float, Field(gt=0)] = 150.0

    sizes = ("frequencies",)

    @property
    def settings(self) -> dict[str, Any]:
        # From 0, so that outputs do not change at the start; PEFT's default is a normal distribution.
        return {"n_frequency": self.frequencies, "scaling": self.alpha, "init_weights": True}
