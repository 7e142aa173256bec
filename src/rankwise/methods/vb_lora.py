"""VB-LoRA (Li et al. 2024, arXiv 2405.15179), by PEFT: the factors of all layers are mixtures of vectors from one bank.

h = W x + B A x,    each piece of a column of A or B is Σ_k softmax(top-k logits) v_k
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from peft import PeftConfig, VBLoRAConfig
from pydantic import Field

from rankwise.methods.peer import Peer


@dataclass(frozen=True)
class VBLoRA(Peer, name="vb-lora"):
    """LoRA whose factors are mixtures of a few trained vectors that all layers share (by PEFT).

    Attributes:
        rank: r of the factors.
        vectors: how many vectors the bank has.
        length: of a vector; it has to divide the inputs and outputs of all layers.
        mixed: how many vectors are mixed for each piece.
        targets: `all-linear` (every linear layer except the output head), or names of modules, matched by their ends.
    """

    configuration: ClassVar[type[PeftConfig]] = VBLoRAConfig
    rank: Annotated[int, Field(ge=1)] = 4
    vectors: Annotated[int, Field(ge=1)] = 256
    length: Annotated[int, Field(ge=1)] = 64
    mixed: Annotated[int, Field(ge=1)] = 2

    sizes = ("vectors",)

    @property
    def settings(self) -> dict[str, Any]:
        own = {"r": self.rank, "num_vectors": self.vectors, "vector_length": self.length, "topk": self.mixed}
        return {**own, "save_only_topk_weights": False}

    @property
    def exact_start(self) -> bool:
        return False
