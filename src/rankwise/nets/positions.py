"""How many positions a model has, and which tokens it skips when counting them, measured by running it on one row."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

ASKED = 7
"""How many tokens are in the row that a model is run on."""


def positions(model: PreTrainedModel, decoder: bool = False) -> int | None:
    """Tokens that `model` can read in one row; None if it sets no limit.

    With a table of positions, this is the number of its rows from the first one in use: RoBERTa starts after its
    padding index. For a model without such a table, whose positions are relative or rotary, it is the length that its
    configuration gives.

    Args:
        model: its weights may be on the meta device. Of an encoder-decoder, the encoder is measured.
        decoder: measure the decoder of an encoder-decoder instead.
    """
    config = model.config.get_text_config(decoder=True) if decoder else model.config.get_text_config()
    return table(model, decoder) or _made_for(config)


def table(model: PreTrainedModel, decoder: bool = False) -> int | None:
    """Tokens that fit the model's table of positions; None if it has no such table. Arguments as for `positions`."""
    found = _lookups(model, decoder)
    return min((rows - row[0] for rows, row in found if rows is not None and _counts(row)), default=None)


def skipped(model: PreTrainedModel) -> set[int]:
    """The tokens that `model` skips when it counts positions; empty if a token's position is its index in the row.

    RoBERTa skips the token that was the padding token in its configuration when the model was built. Of an
    encoder-decoder, the encoder is measured.
    """
    plain = [row for _, row in _lookups(model)]
    found = set()
    for number in _paddings(reading(model)):
        rows = [row for _, row in _lookups(model, among=number)]
        if any(_counts(row) and row != other for row, other in zip(plain, rows, strict=False)):
            found.add(number)
    return found


def reading(model: PreTrainedModel) -> Any:
    """The part of a model that reads the input: its transformer without the head, or the encoder."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def token_table(model: PreTrainedModel) -> nn.Embedding | None:
    """The model's table of token embeddings, one row per token; None if it has no such table."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # how transformers says that there is none: CANINE hashes characters
        return None
    return table if isinstance(table, nn.Embedding) else None


def _made_for(config: Any) -> int | None:
    length = getattr(config, "max_position_embeddings", None)
    return length if length is not None and length > 0 else None  # XLNet's says -1


def _counts(row: list[int]) -> bool:
    """Whether the rows looked up are consecutive, as positions are."""
    return bool(row) and row[:ASKED] == list(range(row[0], row[0] + ASKED))


def _paddings(part: nn.Module) -> set[int]:
    """The padding tokens that the modules of a model name."""
    named = [getattr(module, "padding_idx", None) for module in part.modules()]
    return {number for number in named if isinstance(number, int)}


def _lookups(
    model: PreTrainedModel, decoder: bool = False, among: int | None = None
) -> list[tuple[int | None, list[int]]]:
    """The lookups of a model in its tables for a row of one repeated token: rows of the table, and the rows looked up.

    Args:
        among: another token to put in the middle of the row.
    """
    part = model.get_decoder() if decoder else reading(model)
    device = next(part.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    pads = {getattr(model.config.get_text_config(), "pad_token_id", None), *_paddings(part)}
    ids = torch.full((1, ASKED), next(each for each in range(len(pads) + 1) if each not in pads), device=device)
    if among is not None:
        ids[:, ASKED // 2] = among
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if decoder:
        width = model.config.get_text_config(decoder=True).hidden_size
        asked |= {"encoder_hidden_states": torch.zeros(1, ASKED, width, device=device)}
    training, lookups = part.training, _Lookups()
    part.eval()
    # what follows the lookups may fail in any way: weights have no values, and the shapes are stand-ins
    with _buffers(model, part), torch.device(device), torch.no_grad(), lookups, suppress(Exception):
        part(**asked)
    part.train(training)
    return lookups.found


class _Lookups(TorchFunctionMode):
    """Records lookups in tables, and returns zeros for them and for linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int | None, list[int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.embedding:
            index, weight = (kwargs.get(name, each) for name, each in zip(("input", "weight"), args, strict=False))
            # a lookup of every row, whatever the input, is of tokens that the model adds by itself
            if index.device.type != "meta" and index.numel() != len(weight):
                self.found.append((len(weight), index.flatten().tolist()))
            return torch.zeros(*index.shape, weight.shape[1], device=index.device)
        if func is Tensor.index_select and args[2].numel() >= ASKED and args[2].device.type != "meta":
            self.found.append((None, args[2].tolist()))  # M2M100 computes its positions, and adds rows as needed
        if func is functional.linear:
            return torch.zeros(*args[0].shape[:-1], len(args[1]), device=args[0].device)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = "cpu"  # positions that are created on the weights' device
        return func(*args, **kwargs)


@contextmanager
def _buffers(model: PreTrainedModel, part: nn.Module) -> Iterator[None]:
    """Fill the integer buffers that are on the meta device, as `from_pretrained` does."""
    kept: list[tuple[nn.Module, str, Tensor]] = []
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type == "meta" and not buffer.is_floating_point():
                kept.append((module, name, buffer))
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    for module in dict.fromkeys(module for module, _, _ in kept):
        with torch.device("cpu"), torch.no_grad():
            model._init_weights(module)
    try:
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
