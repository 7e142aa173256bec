"""Small random models of real architectures, and data for them. One place, so that every test means the same thing."""

from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rankwise.ranks import sites

SHAPES = ("bert", "gpt2", "llama", "t5", "deberta-v2")
LABELS = 3
VOCABULARY = 64


def model(shape: str = "bert", seed: int = 0) -> nn.Module:
    """A sequence classifier with a few thousand random weights."""
    config = {
        "bert": lambda: transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=LABELS,
            pad_token_id=0,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            num_labels=LABELS,
            pad_token_id=0,
        ),
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_labels=LABELS,
            pad_token_id=0,
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            num_labels=LABELS,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        ),
        "deberta-v2": lambda: transformers.DebertaV2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=LABELS,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
        ),
    }[shape]()
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def head(shape: str = "bert") -> list[str]:
    return {"gpt2": ["score"], "llama": ["score"], "t5": ["classification_head"]}.get(shape, ["classifier"])


def adapted(rank: int = 4, shape: str = "bert") -> PeftModel:
    """A model that PEFT alone has adapted, with a B that is not 0 any more."""
    torch.manual_seed(1)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["query", "value", "dense"])
    made = get_peft_model(model(shape), config)
    for site in sites(made):
        torch.nn.init.normal_(site.B, std=0.1)
    return made.eval()


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


class Half(nn.Module):
    """Two linear layers of which the second has no part in the output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def recompute(model: nn.Module, options: dict[str, bool] | None = None) -> None:
    """Turn gradient checkpointing on, by the name that this version of transformers has for it."""
    model = getattr(model, "get_base_model", lambda: model)()
    name = "activation_checkpointing_enable"
    enable: Any = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable(options)
