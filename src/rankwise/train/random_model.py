"""Small models with random weights, for trying things out without a pretrained model.

Their vocabulary is a byte-level BPE learnt from the task's training rows. Their scores show that everything works, not
how good a method is.
"""

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
)

from rankwise.tasks import Split, Task

WORDS = 4096
"""Largest size of the vocabulary."""
LENGTH = 512
"""Longest input in tokens."""
PAD, END, BEGIN = "<pad>", "</s>", "<s>"

_IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_SMALL: dict[str, Any] = {**_IDS, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_DEBERTA: dict[str, Any] = {  # the same layers as deberta-v3-base, by number and name
    **{**_IDS, "hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 256},
    **{"max_position_embeddings": LENGTH, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 32},
    **{"norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
    "position_biased_input": False,
}

_KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "random-bert": (BertConfig, {**_SMALL, "intermediate_size": 512, "max_position_embeddings": LENGTH}),
    "random-deberta": (DebertaV2Config, _DEBERTA),
    "random-gpt2": (GPT2Config, {**_IDS, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": LENGTH}),
    "random-llama": (
        LlamaConfig,
        {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 384, "max_position_embeddings": LENGTH},
    ),
    "random-t5": (T5Config, {**_IDS, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 4}),
}
CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    name: lambda words, kind=kind, options=options: kind(vocab_size=words, **options)  # type: ignore[misc]
    for name, (kind, options) in _KINDS.items()
}
"""Name of a model -> its configuration for a vocabulary of this size."""
ENCODERS = ("random-bert", "random-deberta")
"""Models that cannot write."""


def build(
    name: str, task: Task, train: Split | None, words: str | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """A tokenizer learnt from the rows of `train`, and for it the configuration of the model `name`, one of CONFIGS.

    All training rows of the task if None; `words` is the folder of a saved tokenizer, which is taken as it is.
    """
    if words is not None:
        saved = PreTrainedTokenizerFast.from_pretrained(words)
        return saved, _config(name, len(saved))
    tokenizer = _tokenizer(task, train or task.train())
    if name in (*ENCODERS, "random-t5"):  # each text ends with END, as with these models' own tokenizers
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
        )
    return tokenizer, _config(name, len(tokenizer))


def _config(name: str, words: int) -> PreTrainedConfig:
    config = CONFIGS[name](words)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = config.pad_token_id
    return config


def _tokenizer(task: Task, train: Split) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=[PAD, END, BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    columns = [*task.text, *([task.target] if task.family == "generation" else [])]
    tokenizer.train_from_iterator((row[column] for row in train.data for column in columns), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=BEGIN, model_max_length=LENGTH
    )
