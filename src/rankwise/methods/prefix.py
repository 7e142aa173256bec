"""PreEmbed and PreLayer, baselines of LoRA (Hu et al. 2021, arXiv 2106.09685, section 5.1; after Li and Liang 2021).

Only l_p virtual tokens before the prompt (prefix) and l_i after it (infix) train:

    PreEmbed   their token embeddings            d (l_p + l_i) parameters
    PreLayer   their inputs to each of L blocks  L d (l_p + l_i) parameters

In PreLayer the next block reads trained activations in place of what a block computed at these tokens. These are L
sets: the token embeddings, and the activations after every block except the last. For GPT-3 with 16 tokens they are 96
· 12,288 · 16 = 18,874,368 parameters; the paper prints 20.2M for its PreLayer.

PEFT has neither: its prompt tuning has no infix, and its prefix tuning trains keys and values inside attention instead
of activations. Section 5.1 does not say how they start, and the released GPT-2 code has neither method. Here the
embeddings start as those of random tokens of the model's vocabulary, since real words are a good start for a prefix (Li
and Liang 2021), and later activations start normal with the standard deviation of the embedding table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from rankwise.errors import require
from rankwise.methods.base import Method
from rankwise.methods.subset import freeze
from rankwise.nets.virtual_tokens import add_virtual_tokens


@dataclass(frozen=True)
class PreEmbed(Method, name="pre-embed"):
    """Trainable embeddings of virtual tokens before and after the prompt, on the frozen model.

    The prompt of a causal language model in training ends before the first label, otherwise with the row's last token.

    Attributes:
        prefix: l_p, the number of tokens before the prompt (after the [CLS] of an encoder, which stays at position 0).
        infix: l_i, the number of tokens after the prompt.
    """

    prefix: Annotated[int, Field(ge=0)] = 8
    infix: Annotated[int, Field(ge=0)] = 8

    sizes = ("prefix",)
    every_layer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prefix + self.infix >= 1, "prefix and infix are both 0: one of them must be 1 or more")

    @property
    def exact_start(self) -> bool:
        return False  # virtual tokens change outputs from the start

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        freeze(model, head)
        add_virtual_tokens(model, self.prefix, self.infix, self.every_layer)
        return model


@dataclass(frozen=True)
class PreLayer(PreEmbed, name="pre-layer"):
    """Trainable activations of virtual tokens at the input of every layer, on the frozen model.

    At the first layer they are token embeddings, as in PreEmbed. In an encoder-decoder the layers are the encoder's. If
    an infix ends a decoder's rows, as for a classifier, no other token reads it before the last layer: its activations
    in earlier layers do not train, and the text reaches the prediction only through the last layer.

    Attributes:
        prefix: l_p, the number of tokens before the prompt (after the [CLS] of an encoder, which stays at position 0).
        infix: l_i, the number of tokens after the prompt.
    """

    every_layer: ClassVar[bool] = True
