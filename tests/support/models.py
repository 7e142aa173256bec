"""Small models and their tokenizer, in one place, so that every test means the same thing.

First those that methods are checked on (`model`), then a causal one that is loaded from a folder (`llama`), one of each
family in transformers (`every_model`), and one of each class in it (`of_class`).
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

from rankwise.conformance.models import LABELS as LABELS
from rankwise.conformance.models import SHAPES as SHAPES
from rankwise.conformance.models import VOCABULARY as VOCABULARY
from rankwise.conformance.models import batch as batch
from rankwise.conformance.models import head as head
from rankwise.conformance.models import logits as logits
from rankwise.conformance.models import model as model
from rankwise.conformance.models import recompute as recompute
from rankwise.conformance.models import rows as rows
from rankwise.conformance.models import train as train
from rankwise.ranks import sites


def adapted(rank: int = 4, shape: str = "bert") -> PeftModel:
    """A model adapted by PEFT alone, whose B is no longer 0."""
    torch.manual_seed(1)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["query", "value", "dense"])
    made = get_peft_model(model(shape), config)
    for site in sites(made):
        torch.nn.init.normal_(site.B, std=0.1)
    return made.eval()


class Half(nn.Module):
    """Two linear layers; the second takes no part in the output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


LLAMA_IDS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def write_llama(folder: Path) -> Path:
    """Save a small causal model with random weights in `folder`, to be loaded from there as users load theirs."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def llama(folder: Path) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(folder, use_cache=False).eval()


@torch.no_grad()
def llama_logits(model: nn.Module, **more: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=LLAMA_IDS, **more).logits


@torch.no_grad()
def stirred(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model, with noise added to everything that trains."""
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += 0.1 * torch.randn(p.shape, generator=draw)
    return model


POSITIONS = 40
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


def small_config(kind: str, **more: Any) -> PreTrainedConfig:
    """The configuration of a family, with the values of SMALL for the keys that it has."""
    keys = type(AutoConfig.for_model(kind))().to_dict()
    return AutoConfig.for_model(kind, **{key: value for key, value in SMALL.items() if key in keys}, **more)


def every_model(auto: Any, kinds: Mapping[str, Any], **more: Any) -> Iterator[tuple[str, PreTrainedModel]]:
    """A model of each family that can be built this small, with large random weights."""
    for kind in kinds:
        try:
            config = small_config(kind, **more)
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


def tokenizer(*marks: str, ended: bool = True, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, … followed by `marks`; `</s>` and `?` are marks of every tokenizer.

    Unknown words are read as `?`, and each punctuation mark as a word of its own.

    Args:
        ended: put `</s>` at the end of every row.
        named: marks by their role, as in pad_token="<pad>".
    """
    listed = [*(f"w{number}" for number in range(VOCABULARY - 10)), "</s>", "?", *marks]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(listed)}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    if ended:
        end = listed.index("</s>")
        made.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, **{"eos_token": "</s>", "unk_token": "?", **named})


CLASS_TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "classes": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
LARGEST_OF_CLASS = 100_000  # parameters; larger models are left out
# The value for a number in a configuration, by a part of its name; the first match counts.
CLASS_SIZES = (
    (("chunk",), None),
    (("vocab_size",), VOCABULARY),
    (("layers", "n_layer", "num_blocks", "depth", "n_blocks"), 2),
    (("heads", "n_head"), 2),
    (("head_dim", "d_kv", "qk_rope_head_dim"), 16),
    (("ffn", "intermediate", "inner", "d_ff", "feed_forward"), 64),
    (("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "embed_dim", "dim"), 32),
    (("experts",), 4),
)


def class_names(task: str) -> list[str]:
    """The classes of a task that take **kwargs, so that the Trainer expects them to scale their loss themselves."""
    found = []
    for name in getattr(modeling_auto, CLASS_TASKS[task]).values():
        for each in [name] if isinstance(name, str) else name:
            kind = getattr(transformers, each, None)
            if kind is not None and any(
                p.kind is p.VAR_KEYWORD for p in inspect.signature(kind.forward).parameters.values()
            ):
                found.append(each)
    return sorted(set(found))


def of_class(name: str) -> nn.Module | None:
    """A model with random weights, or None if its architecture does not allow such small sizes."""
    kind = getattr(transformers, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            default = vars(kind.config_class())
            given = {key: _size(key, value) for key, value in default.items() if type(value) is int}
            config = kind.config_class(**{key: value for key, value in given.items() if value is not None})
            config.pad_token_id = 0
            with torch.device("meta"):
                if sum(p.numel() for p in kind(config).parameters()) > LARGEST_OF_CLASS:
                    return None
            torch.manual_seed(0)
            model = kind(config).eval()
            model(**class_batch(name)).loss.backward()
    except Exception:  # every architecture has conditions of its own
        return None
    return model


def class_batch(name: str, rows: int = 8) -> dict[str, Any]:
    """Rows that a model of this class takes. Token 1 ends each, as some classifiers want."""
    ids = torch.randint(3, VOCABULARY - 4, (rows, 8), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 1
    labels = ids[:, 0] % 2 if name.endswith("ForSequenceClassification") else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _size(key: str, value: int) -> int | None:
    size = next((size for parts, size in CLASS_SIZES if any(part in key for part in parts)), None)
    return None if size is None else min(size, value) if value > 0 else None
