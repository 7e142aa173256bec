"""How many positions a model has, and which tokens it does not count as positions, measured by running it on a row."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

ROW = 7
"""Tokens in the row that a model is run on."""


def positions(model: PreTrainedModel, decoder: bool = False) -> int | None:
    """Tokens that `model` can read in one row; None if it sets no limit.

    For a model with a table of positions this is the number of its rows, from the first one in use: RoBERTa starts
    after its padding index. For relative or rotary positions it is the length in the model's configuration.

    Args:
        model: its weights may be on the meta device. Of an encoder-decoder, the encoder is measured.
        decoder: measure the decoder of an encoder-decoder instead.
    """
    if rows := table(model, decoder):
        return rows
    config = model.config.get_text_config(decoder=True) if decoder else model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return length if length is not None and length > 0 else None  # XLNet has -1


def table(model: PreTrainedModel, decoder: bool = False) -> int | None:
    """Tokens that fit the model's table of positions; None if it has no such table. Arguments as for `positions`."""
    lookups = _lookups(model, decoder)
    return min((rows - row[0] for rows, row in lookups if rows is not None and _counts(row)), default=None)


def skipped(model: PreTrainedModel) -> set[int]:
    """The tokens that `model` skips when it counts positions; empty if a token's position is its index in the row.

    RoBERTa skips the token that was the padding token in its configuration when the model was built. Of an
    encoder-decoder, the encoder is measured.
    """
    plain = [row for _, row in _lookups(model)]
    skipped = set()
    for token in _paddings(reading(model)):
        rows = [row for _, row in _lookups(model, middle=token)]
        if any(_counts(row) and row != other for row, other in zip(plain, rows, strict=False)):
            skipped.add(token)
    return skipped


def reading(model: PreTrainedModel) -> Any:
    """The part of a model that reads the input: its transformer without the head, or the encoder."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def token_table(model: PreTrainedModel) -> nn.Embedding | None:
    """The model's table of token embeddings, one row per token; None if it has no such table."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # transformers' answer for a model without one: CANINE hashes characters
        return None
    return table if isinstance(table, nn.Embedding) else None


def _counts(row: list[int]) -> bool:
    """Whether the rows looked up are consecutive, as positions are."""
    return bool(row) and row[:ROW] == list(range(row[0], row[0] + ROW))


def _paddings(part: nn.Module) -> set[int]:
    """The `padding_idx` of every module that has one."""
    tokens = [getattr(module, "padding_idx", None) for module in part.modules()]
    return {token for token in tokens if isinstance(token, int)}


def _lookups(
    model: PreTrainedModel, decoder: bool = False, middle: int | None = None
) -> list[tuple[int | None, list[int]]]:
    """A model's table lookups for a row of one repeated token, with another one in the `middle` if given.

    Each is the number of rows of the table (None if it grows as needed) and the rows looked up.
    """
    part = model.get_decoder() if decoder else reading(model)
    device = next(part.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    pads = {getattr(model.config.get_text_config(), "pad_token_id", None), *_paddings(part)}
    ids = torch.full((1, ROW), next(token for token in range(len(pads) + 1) if token not in pads), device=device)
    if middle is not None:
        ids[:, ROW // 2] = middle
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if decoder:
        width = model.config.get_text_config(decoder=True).hidden_size
        inputs |= {"encoder_hidden_states": torch.zeros(1, ROW, width, device=device)}
    training, recorder = part.training, _Recorder()
    part.eval()
    # after the lookups the model may fail in any way: weights may have no values, and shapes are stand-ins
    with _filled_buffers(model, part), torch.device(device), torch.no_grad(), recorder, suppress(Exception):
        part(**inputs)
    part.train(training)
    return recorder.lookups


class _Recorder(TorchFunctionMode):
    """Records lookups in tables, and returns zeros for them and for linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lookups: list[tuple[int | None, list[int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.embedding:
            index, weight = (kwargs.get(name, arg) for name, arg in zip(("input", "weight"), args, strict=False))
            # a lookup of every row, whatever the input, is for tokens that the model itself adds
            if index.device.type != "meta" and index.numel() != len(weight):
                self.lookups.append((len(weight), index.flatten().tolist()))
            return torch.zeros(*index.shape, weight.shape[1], device=index.device)
        if func is Tensor.index_select and args[2].numel() >= ROW and args[2].device.type != "meta":
            self.lookups.append((None, args[2].tolist()))  # M2M100 computes its positions, and adds rows as needed
        if func is functional.linear:
            return torch.zeros(*args[0].shape[:-1], len(args[1]), device=args[0].device)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = "cpu"  # positions that are created on the weights' device
        return func(*args, **kwargs)


@contextmanager
def _filled_buffers(model: PreTrainedModel, part: nn.Module) -> Iterator[None]:
    """Fill the integer buffers that are on the meta device, as `from_pretrained` does."""
    empty: list[tuple[nn.Module, str, Tensor]] = []
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type == "meta" and not buffer.is_floating_point():
                empty.append((module, name, buffer))
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    for module in dict.fromkeys(module for module, _, _ in empty):
        with torch.device("cpu"), torch.no_grad():
            model._init_weights(module)
    try:
        yield
    finally:
        for module, name, buffer in empty:
            module._buffers[name] = buffer
