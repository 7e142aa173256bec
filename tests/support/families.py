"""Tiny models of the classes in transformers, built from their own configurations, for checks of every model."""

import inspect
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "classes": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
VOCABULARY = 64
LARGEST = 100_000  # parameters; models that are larger even so are left out
# The value for a number in a configuration, by a part of its name; the first match counts.
SIZES = (
    (("chunk",), None),
    (("vocab_size",), VOCABULARY),
    (("layers", "n_layer", "num_blocks", "depth", "n_blocks"), 2),
    (("heads", "n_head"), 2),
    (("head_dim", "d_kv", "qk_rope_head_dim"), 16),
    (("ffn", "intermediate", "inner", "d_ff", "feed_forward"), 64),
    (("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "embed_dim", "dim"), 32),
    (("experts",), 4),
)


def names(task: str) -> list[str]:
    """The classes of a task that take **kwargs, so that the Trainer expects them to scale their loss themselves."""
    found = []
    for name in getattr(modeling_auto, TASKS[task]).values():
        for each in [name] if isinstance(name, str) else name:
            kind = getattr(transformers, each, None)
            if kind is not None and any(
                p.kind is p.VAR_KEYWORD for p in inspect.signature(kind.forward).parameters.values()
            ):
                found.append(each)
    return sorted(set(found))


def build(name: str) -> nn.Module | None:
    """A model with random weights, or None where such small numbers do not fit its architecture."""
    kind = getattr(transformers, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            default = vars(kind.config_class())
            given = {key: _size(key, value) for key, value in default.items() if type(value) is int}
            config = kind.config_class(**{key: value for key, value in given.items() if value is not None})
            config.pad_token_id = 0
            with torch.device("meta"):
                if sum(p.numel() for p in kind(config).parameters()) > LARGEST:
                    return None
            torch.manual_seed(0)
            model = kind(config).eval()
            model(**batch(name)).loss.backward()
    except Exception:  # every architecture has conditions of its own
        return None
    return model


def batch(name: str, rows: int = 8) -> dict[str, Any]:
    """Rows that a model of this class takes. Token 1 ends each, as some classifiers want."""
    ids = torch.randint(3, VOCABULARY - 4, (rows, 8), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 1
    labels = ids[:, 0] % 2 if name.endswith("ForSequenceClassification") else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _size(key: str, value: int) -> int | None:
    size = next((size for parts, size in SIZES if any(part in key for part in parts)), None)
    return None if size is None else min(size, value) if value > 0 else None
