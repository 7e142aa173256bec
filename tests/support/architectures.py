"""Every family of models in transformers, as small as its configuration allows, and one tokenizer for all of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY, POSITIONS, LABELS = 64, 40, 3
LARGEST = 2_000_000
"""Parameters of a model that is built; some configurations have no key for what makes them large."""
_WIDTHS = ("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "dim")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_INNER = ("intermediate_size", "ffn_dim", "d_ff", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim")
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), POSITIONS),
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys((*_DEPTHS, "decoder_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys((*_HEADS, "num_experts", "num_local_experts", "n_routed_experts", "rotary_dim"), 4),
    **dict.fromkeys(_INNER, 64),
    **dict.fromkeys(("d_kv", "head_dim", "attention_head_size"), 8),
    "moe_intermediate_size": 16,
}


def small(kind: str, **more: Any) -> PreTrainedConfig:
    """The configuration of a family, with what of SMALL it has a key for."""
    keys = type(AutoConfig.for_model(kind))().to_dict()
    return AutoConfig.for_model(kind, **{key: value for key, value in SMALL.items() if key in keys}, **more)


def built(auto: Any, kinds: Mapping[str, Any], **more: Any) -> Iterator[tuple[str, PreTrainedModel]]:
    """A model of each family that can be built so small, with weights that are drawn at random and large."""
    for kind in kinds:
        try:
            config = small(kind, **more)
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(config).parameters())
            if size > LARGEST:
                continue
            torch.manual_seed(0)
            model = auto.from_config(config)
        except Exception:  # cannot be so small, or needs a package that is not installed
            continue
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.3)
        yield kind, model.eval()


CLASSIFIERS = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
WRITERS = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
TRANSLATORS = transformers.models.auto.modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


def words(*marks: str, ended: bool = True, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, … followed by `marks`; `</s>` and `?` are marks of every tokenizer.

    Unknown words are read as `?`, and each punctuation mark as a word of its own.

    Args:
        ended: put `</s>` at the end of every row.
        named: marks by their role, as in pad_token="<pad>".
    """
    listed = [*(f"w{number}" for number in range(VOCABULARY - 10)), "</s>", "?", *marks]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(listed)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ended:
        end = listed.index("</s>")
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, **{"eos_token": "</s>", "unk_token": "?", **named})
