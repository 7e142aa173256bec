"""Small random models of real architectures, and data for them: what methods are checked on."""

from typing import Any

import torch
import transformers
from torch import nn

from rankwise.ranks.sites import base_of

SHAPES = ("bert", "gpt2", "llama", "t5", "deberta-v2")
LABELS = 3
VOCABULARY = 64


_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**_BERT, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}),
    "llama": ("LlamaConfig", {**_BERT, "num_key_value_heads": 1, "pad_token_id": 0}),
    "t5": (
        "T5Config",
        {
            **{"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
            **{"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
        },
    ),
    "deberta-v2": (
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
}


def model(shape: str = "bert", seed: int = 0) -> nn.Module:
    """A sequence classifier with a few thousand random weights."""
    name, options = _CONFIGS[shape]
    # without problem_type the first loss would set it, and a compiled model would be compiled again
    options = {"vocab_size": VOCABULARY, "num_labels": LABELS, "problem_type": "single_label_classification", **options}
    config = getattr(transformers, name)(**options)
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def head(shape: str = "bert") -> list[str]:
    return {"gpt2": ["score"], "llama": ["score"], "t5": ["classification_head"]}.get(shape, ["classifier"])


def batch(rows: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens with labels that can be learnt from them. Token 1 ends every row, as T5's classifier wants."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, 10), generator=draw)
    ids[:, -1] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % LABELS}


def rows(count: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """A data set for a Trainer."""
    whole = batch(count, seed)
    return [{name: value[i] for name, value in whole.items()} for i in range(count)]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Logits of one fixed batch in evaluation mode; the model's own mode is left as it was."""
    training = model.training
    model.eval()
    out = model(**batch()).logits
    model.train(training)
    return out


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    """A bare loop, one batch of its own per step; returns the losses."""
    model.train()
    losses = []
    for step in range(start, start + steps):
        loss = model(**batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def recompute(model: nn.Module, options: dict[str, bool] | None = None) -> None:
    """Turn gradient checkpointing on, by the name that this version of transformers has for it."""
    model = base_of(model)
    name = "activation_checkpointing_enable"
    enable: Any = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable(options)
