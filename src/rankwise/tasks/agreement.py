"""Checks, before training, that tokenizer, configuration, weights and settings fit together.

`train.model` calls `agree` for runs, with and without weights, and `Task.collate` for code with its own model and
tokenizer.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.errors import InputError
from rankwise.nets.positions import positions, skipped, token_table
from rankwise.nets.undisturbed import undisturbed
from rankwise.nets.virtual_tokens import VirtualTokens
from rankwise.processes import together
from rankwise.ranks.layers import holds_codes
from rankwise.ranks.sites import base_of

if TYPE_CHECKING:
    from rankwise.tasks.base import Task

STRANGE = "\U000e0001 \u0378\u0ff5 \U0001fffd"
"""Characters that are in no vocabulary."""
PADDING = "<|padding|>"
"""The padding token added to a tokenizer without a special token for it."""
TEXTS = tuple(" ".join(["one", "two", "three"] * times) for times in (1, 2, 3))
"""Texts of different length to test a model with, truncated to MOST tokens."""
MOST = 24


def agree(task: "Task", model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
    """Set the padding token, and refuse a model, tokenizer and task that do not fit together.

    `tokenizer.pad_token` and `config.pad_token_id` are set to one token, which must not occur in texts if the model
    uses it to find the end of a row. A classifier with weights is tested with three texts: their logits must be the
    same alone and in a batch, and `tokenizer.padding_side` is changed if only that makes them so. It uses no random
    numbers.

    Args:
        model: a transformers model, with or without a PeftModel around it; any other module is not checked. Its weights
            may be on the meta device.
        max_length: compared with the model's positions, if given.
    Raises:
        InputError: more tokens than rows of the embedding, no usable padding or end token, positions that skip a token
            that may occur in texts, a wrong number of outputs, too few positions, or logits that depend on the other
            rows of a batch.
    """
    inner = base_of(model)
    if not isinstance(inner, PreTrainedModel):
        return
    _check_words(inner, tokenizer)
    _set_padding(inner, tokenizer)
    _check_skipped(task, inner, tokenizer)
    if task.family == "generation" and not isinstance(tokenizer.eos_token_id, int):
        raise InputError("model: its tokenizer has no end token (eos_token) to end a text with: use another model")
    if max_length is not None:
        special = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2)
        if max_length <= special:
            raise InputError(
                f"max_length = {max_length} leaves no room for text next to {special} special tokens: raise it"
            )
        check_room(task, inner, max_length, tokenizer.model_max_length)
    if task.family == "classification":
        _check_outputs(task, inner)
        if not any(p.is_meta for p in inner.parameters()):
            _check_padding(task, model, tokenizer)


def check_room(task: Any, model: nn.Module, max_length: int, most: int | None = None) -> None:
    """InputError if rows as long as the settings allow are longer than what the model reads or writes.

    Virtual tokens of the model count too. `most` is the tokenizer's own limit.
    """
    inner = base_of(model)
    encodes, writes, name = bool(inner.config.is_encoder_decoder), task.family == "generation", type(inner).__name__
    read = {"max_length": max_length}
    if (tokens := _virtual(model)) is not None:
        read |= {"prefix": tokens.prefix, "infix": tokens.infix}
    if encodes and task.decoder_only:
        raise InputError(f"model: {name} is an encoder-decoder, but {task.name} needs a decoder (Llama, Qwen, …)")
    if not encodes:
        read |= task.written()
    _compare(read, [most, context(model)], f"that {name} reads")
    if encodes:
        written = {"target_length": task.target_length} if writes else {"max_length": max_length}
        _compare(written, [context(model, decoder=True)], f"that {name} writes")


def context(model: nn.Module, decoder: bool = False) -> int | None:
    """Tokens that `model`, with or without a method, reads in one row, including virtual ones; None for no limit.

    For an encoder-decoder, those that its encoder reads, or its `decoder`.
    """
    tokens = _virtual(model)
    if tokens is not None and not decoder:
        return tokens.context
    inner = base_of(model)
    return positions(inner, decoder) if isinstance(inner, PreTrainedModel) else None


def _virtual(model: nn.Module) -> VirtualTokens | None:
    return next((module for module in model.modules() if isinstance(module, VirtualTokens)), None)


def _compare(parts: dict[str, int], limits: Sequence[int | None], what: str) -> None:
    total, parts = sum(parts.values()), {name: number for name, number in parts.items() if number}
    most = min((limit for limit in limits if limit is not None), default=total)
    if total > most:
        added = " + ".join(f"{name} {number}" for name, number in parts.items())
        settings = " or ".join(name for name in parts if name != "end token")
        equals = f" = {total}" if len(parts) > 1 else ""
        raise InputError(f"{added}{equals}: more than the {most} tokens {what}; lower {settings}")


def check_rows(
    task: "Task", model: nn.Module, rows: Iterable[Sequence[int]], tokenizer: Any, name: str = "a batch"
) -> None:
    """InputError for a token id for which the model has no row, or an end token inside a text.

    Args:
        rows: token ids of a split or a batch.
        name: the name of that in messages.
    """
    inner = base_of(model)
    if not isinstance(inner, PreTrainedModel):
        return
    table = token_table(inner)
    ends = task.family == "classification" and inner.config.is_encoder_decoder and inner.config.eos_token_id
    for index, row in enumerate(rows):
        if table is not None and max(row) >= table.num_embeddings:
            token, what = max(row), f"but {type(inner).__name__} has only {table.num_embeddings} tokens"
        elif isinstance(ends, int) and row.count(ends) > 1:
            token, what = ends, f"by which {type(inner).__name__} finds the end of a text"
        else:
            continue
        word = tokenizer.convert_ids_to_tokens(token)
        raise InputError(f"row {index} of {name} holds {word!r}, token {token}, {what}: remove it from the text")


def _check_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """InputError for tokens beyond the embedding, except special ones that the tokenizer does not add by itself."""
    table = token_table(model)
    if table is None:
        return
    rows, added = table.num_embeddings, {tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id}
    added |= set(tokenizer("")["input_ids"])
    special = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special} - added
    beyond = {token: word for word, token in tokenizer.get_vocab().items() if token >= rows and token not in special}
    if beyond:
        raise InputError(
            f"model: its tokenizer has {len(beyond)} tokens, the first {beyond[min(beyond)]!r}, beyond the {rows} of "
            f"{type(model).__name__}: use the tokenizer that came with it, or save the model again after "
            "resize_token_embeddings(len(tokenizer))"
        )


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Use one padding token: the tokenizer's own, else another special token, else an unused row of the embedding."""
    config = model.config.get_text_config()
    special, own = tokenizer.all_special_ids, tokenizer.pad_token_id
    preferred = [t for t in (getattr(config, "pad_token_id", None), tokenizer.eos_token_id) if t in special]
    # last the tokens that every row has: padding with its last token would hide that
    others = sorted(dict.fromkeys([*preferred, *special]), key=tokenizer("")["input_ids"].count)
    candidates = [*([] if own is None else [own]), *others]
    chosen = next(iter(candidates), None)
    if chosen is None or (_in_texts(tokenizer, chosen) and _searches(model)):
        chosen = next((token for token in candidates if not _in_texts(tokenizer, token)), None)
    table = token_table(model)
    if chosen is None and table is not None and max(tokenizer.get_vocab().values()) + 1 < table.num_embeddings:
        tokenizer.add_special_tokens({"pad_token": PADDING})
        chosen = tokenizer.pad_token_id
    if chosen is None:
        raise InputError(
            f"model: {type(model).__name__} needs a padding token that cannot occur in texts, but its tokenizer has "
            "none: give the tokenizer a pad_token, and the model a row for it (resize_token_embeddings)"
        )
    if chosen != own:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    config.pad_token_id = model.config.pad_token_id = chosen


def _check_skipped(task: "Task", model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """InputError if the model skips a token other than the padding when it counts positions."""
    for token in sorted(skipped(model) - {tokenizer.pad_token_id}):
        known = token in tokenizer.get_vocab().values()
        occurs = known and (token in tokenizer("")["input_ids"] or _in_texts(tokenizer, token))
        if occurs or task.family == "generation":  # which pads on the left, so that padding must be skipped
            word = f" ({tokenizer.convert_ids_to_tokens(token)!r})" if known else ""
            raise InputError(
                f"model: {type(model).__name__} skips token {token}{word} as padding when it counts positions, but "
                f"its tokenizer pads with {tokenizer.pad_token!r}: use the tokenizer that came with it, or the "
                "pad_token_id that it was trained with"
            )


def _in_texts(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether token id `token` can come from a text: for unknown characters, or for its own spelling."""
    text = f"{STRANGE} {tokenizer.convert_ids_to_tokens(token)}"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return token not in tokenizer.all_special_ids or token in ids


def _searches(model: PreTrainedModel) -> bool:
    """Whether the model looks for padding in its token ids: then it refuses two rows if it has no padding token."""
    config, device = model.config.get_text_config(), next(model.parameters()).device
    original = config.pad_token_id
    config.pad_token_id = None
    try:
        _forward(model, {"input_ids": torch.ones(2, 8, dtype=torch.long, device=device)})
    except ValueError:
        return True
    except Exception:  # on the meta device, for example; checked again with weights
        return False
    finally:
        config.pad_token_id = original
    return False


def _check_outputs(task: "Task", model: PreTrainedModel) -> None:
    config = model.config
    labels, problem = max(1, len(task.labels)), "single_label_classification" if task.labels else "regression"
    if config.num_labels != labels:
        raise InputError(
            f"model: {type(model).__name__} has {config.num_labels} outputs but {task.name} needs {labels}: load it "
            f"with num_labels={labels}"
        )
    if config.problem_type not in (None, problem):
        raise InputError(f"model: it is set to {config.problem_type}, but {task.name} needs problem_type={problem!r}")


def _check_padding(task: "Task", model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose the side to pad on; InputError if on both sides the logits of a row depend on its padding."""
    pairs = [[text] * len(task.text) for text in TEXTS]
    most, tokens = context(model), _virtual(model)
    longest = MOST if most is None else min(MOST, most - (0 if tokens is None else len(tokens)))
    encoded = [dict(tokenizer(*texts, truncation=True, max_length=longest)) for texts in pairs]
    original, reason = tokenizer.padding_side, ""
    for side in (original, "left" if original == "right" else "right"):
        tokenizer.padding_side = side
        try:
            alone = torch.cat([_logits(model, tokenizer, [row]) for row in encoded])
            padded = _logits(model, tokenizer, encoded)
        except Exception as error:
            if together.out_of_memory(error):  # training reports that, and takes fewer rows at once
                tokenizer.padding_side = original
                return
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        first = next(model.parameters())
        exact = first.dtype == torch.float32 and not torch.is_autocast_enabled(first.device.type)
        exact = exact and not any(map(holds_codes, model.parameters()))  # 8-bit layers round a batch together
        if (alone - padded).abs().max() <= (1e-3 if exact else 0.1) * alone.abs().max():
            return
        reason = ""
    tokenizer.padding_side = original
    name = type(base_of(model)).__name__
    if reason:
        raise InputError(
            f"model: {name} cannot read what its tokenizer returns for a text ({reason}): use the tokenizer that came "
            "with it"
        )
    raise InputError(
        f"model: the output of {name} for a text depends on its padding, and so on the other texts in the batch: use "
        "another model"
    )


def _logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Tensor:
    device = next(model.parameters()).device
    batch = {name: values.to(device) for name, values in tokenizer.pad(rows, return_tensors="pt").items()}
    return _forward(model, batch).logits.float()


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """A forward pass in evaluation mode, without side effects."""
    with undisturbed(model):
        model.eval()
        return model(**batch)
