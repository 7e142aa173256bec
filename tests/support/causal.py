"""A small causal language model that is loaded from a folder, as users load theirs."""

from pathlib import Path

import torch
import transformers
from torch import nn

IDS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def write(folder: Path) -> Path:
    """Save one with random weights in `folder`."""
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


def base(folder: Path) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(folder, use_cache=False).eval()


@torch.no_grad()
def logits(model: nn.Module, **more: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=IDS, **more).logits


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """The model with noise on all that trains."""
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p += 0.1 * torch.randn(p.shape, generator=draw)
    return model
