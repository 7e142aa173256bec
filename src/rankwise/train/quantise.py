"""Frozen weights as codes of 8 or 4 bits, by bitsandbytes.

`4bit` is that of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): NF4, a scale for every 64 weights, and the scales are
quantised too. `8bit` is LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rankwise.errors import InputError, need
from rankwise.ranks.layers import holds_codes


def quantisation(kind: str, dtype: torch.dtype, model: PreTrainedModel, head: Sequence[str]) -> BitsAndBytesConfig:
    """How transformers quantises the linear layers of `model`, except those of its head and its output layer.

    Args:
        kind: `8bit` or `4bit`.
        dtype: what the layers compute in.
        model: on the meta device.
    Raises:
        InputError: bitsandbytes is not installed.
    """
    need("bitsandbytes", "quantised")
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    output = model.get_output_embeddings()
    outputs = [name for name, module in model.named_modules() if module is output]
    pooler = f"{model.base_model_prefix}.pooler"  # part of the head if the checkpoint has no weights for it
    return BitsAndBytesConfig(
        load_in_4bit=kind == "4bit",
        load_in_8bit=kind == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*head, *outputs, pooler],
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message is not that which each 8-bit layer gives at every call: that it rounds its inputs to fp16."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def quantise_skeleton(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Quantise a model on the meta device as `from_pretrained` quantises one with weights."""
    from transformers.quantizers.auto import AutoHfQuantizer

    AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(model, device_map=None)
    with torch.device("cpu"):
        # The first call makes a table that bitsandbytes keeps for all models, on the device of the tensor.
        need("bitsandbytes.functional", "quantised").quantize_blockwise(torch.zeros(1))
        for module in model.modules():
            weight: Any = getattr(module, "weight", None)
            if holds_codes(weight):
                module.weight = weight._quantize("meta")


def check_biases(model: nn.Module, computing: str) -> None:
    """Raise InputError if biases of quantised layers train that bitsandbytes would round to `computing`, in place."""
    for name, module in model.named_modules() if computing != "none" else ():
        bias, weight = (module._parameters.get(name) for name in ("bias", "weight"))
        if bias is not None and bias.requires_grad and holds_codes(weight):
            raise InputError(
                f"quantise: bitsandbytes would round {name}.bias, which trains, to {computing}: use dtype = fp32 "
                "without autocast, or another method"
            )
