"""PreEmbed and PreLayer, baselines of LoRA (Hu et al. 2021, arXiv 2106.09685, section 5.1; after Li and Liang 2021).

l_p virtual tokens before the prompt (prefix) and l_i after it (infix) are the only thing that trains:

    PreEmbed   their word embeddings             d (l_p + l_i) parameters
    PreLayer   their inputs to each of L blocks  L d (l_p + l_i) parameters

In PreLayer what a block computed at these tokens is thrown away, and the next block reads trained activations there.
That makes L sets: the word embeddings, and the activations after every block but the last, which no block reads. GPT-3
with 16 tokens has 96 · 12,288 · 16 = 18,874,368 of them; the paper prints 20.2M for its PreLayer.

Neither is in PEFT: its prompt tuning has prefixes and no infix, its prefix tuning trains keys and values inside
attention and not activations. Section 5.1 names no start for either, and the released GPT-2 code has neither method.
Here the embeddings are those of words drawn at random from the model's own vocabulary, since real words start a prefix
well (Li and Liang 2021), and later activations are normal with the standard deviation of the embedding table.
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
    """Trainable word embeddings of virtual tokens before and after the prompt, on the frozen model.

    The prompt ends before the first label of a causal language model in training, else with the row's last token.

    Attributes:
        prefix: l_p, how many tokens come before the prompt (after the [CLS] of an encoder, whose place is position 0).
        infix: l_i, how many tokens follow the prompt.
    """

    prefix: Annotated[int, Field(ge=0)] = 8
    infix: Annotated[int, Field(ge=0)] = 8

    sizes = ("prefix",)
    every_layer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prefix + self.infix >= 1, "prefix and infix are both 0: at least one virtual token must train")

    @property
    def exact_start(self) -> bool:
        return False  # the new tokens are read from the first step on

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        freeze(model, head)
        add_virtual_tokens(model, self.prefix, self.infix, self.every_layer)
        return model


@dataclass(frozen=True)
class PreLayer(PreEmbed, name="pre-layer"):
    """Trainable activations of virtual tokens at the input of every layer, on the frozen model.

    The first layer's are word embeddings, as in PreEmbed. In an encoder-decoder the layers are the encoder's. Where an
    infix ends a decoder's rows, as before its classifier, no other token reads it in the layers before the last: there
    its activations keep their start, and the text reaches the prediction through the last layer alone.

    Attributes:
        prefix: l_p, how many tokens come before the prompt (after the [CLS] of an encoder, whose place is position 0).
        infix: l_i, how many tokens follow the prompt.
    """

    every_layer: ClassVar[bool] = True
