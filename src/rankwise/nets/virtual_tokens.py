"""Virtual tokens: trainable rows inserted among the tokens of every input, invisible to the caller of the model.

The part of a model that reads the input (the *reader*: its transformer without the head, or the encoder of an
encoder-decoder) gets a longer input than the caller gave, and its hidden states are cut back to the caller's columns.
Heads, losses, labels, `generate` and the search for the last token or [EOS] see only the caller's columns and need no
change. No token is added to the vocabulary; embedding table and output head stay as they are.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import InputError
from rankwise.nets.blocks import stacks
from rankwise.nets.hooks import let_compile_see_hooks
from rankwise.nets.positions import positions, reading, table, token_table

NAME = "virtual_tokens"  # of the module in the model
_LAYOUT = "_rankwise_layout"


@dataclass(frozen=True)
class Layout:
    """The columns of l virtual tokens in rows of T tokens, counted from 0.

    Attributes:
        copies: (rows, T + l), for each column the caller's column whose mask, type and position offset it takes: its
            own, or for a virtual token the first token of the row (prefix) or the token before it (infix).
        virtual: (rows, l), the columns of the virtual tokens, prefix first.
        read: (rows, T), the column whose output the caller gets: its own, or in a causal model the last one before the
            caller's next column, since an infix predicts the token after it.
    """

    copies: Tensor
    virtual: Tensor
    read: Tensor

    @classmethod
    def of(
        cls,
        real: Tensor,
        prefix: int,
        infix: int,
        *,
        causal: bool = False,
        after_first: bool = False,
        prompt: Tensor | None = None,
    ) -> "Layout":
        """The layout for rows whose real tokens are True in `real` (rows, T), padded on either side.

        The prefix comes before the first real token, or right after it with `after_first`. The infix comes after the
        last real token; where `prompt` (rows,) is below T, it comes before that column.
        """
        rows, width = real.shape
        columns = torch.arange(width, device=real.device).expand(rows, -1)
        first = real.int().argmax(1, keepdim=True)  # argmax takes the first of equals
        end = width - real.flip(1).int().argmax(1, keepdim=True)
        if prompt is not None:
            end = torch.where(prompt[:, None] < width, prompt[:, None], end)
        start = first + int(after_first)
        end = torch.maximum(end, start)
        moved = columns + prefix * (columns >= start) + infix * (columns >= end)
        of_prefix, of_infix = (torch.arange(count, device=real.device) for count in (prefix, infix))
        virtual = torch.cat([start + of_prefix, end + prefix + of_infix], 1)
        neighbours = torch.cat([first.expand(-1, prefix), (end - 1).maximum(first).expand(-1, infix)], 1)
        copies = columns.new_zeros(rows, width + prefix + infix)
        copies = copies.scatter(1, moved, columns).scatter(1, virtual, neighbours)
        if causal:
            last = torch.full_like(first, width + prefix + infix)
            moved = torch.cat([moved[:, 1:], last], 1) - 1
        return cls(copies, virtual, moved)

    def insert(self, values: Tensor) -> Tensor:
        """Values of the caller's tokens (rows or 1, T) with copies at virtual tokens: (rows, T + l)."""
        return values.expand(len(self.copies), -1).gather(1, self.copies)

    def positions(self, positions: Tensor) -> Tensor:
        """The caller's positions (rows or 1, T), counting virtual tokens too: (rows, T + l)."""
        offsets = positions - torch.arange(positions.shape[1], device=positions.device)
        return self.insert(offsets) + torch.arange(self.copies.shape[1], device=positions.device)

    def put(self, hidden: Tensor, learnt: Tensor) -> Tensor:
        """`hidden` (rows, T + l, d) with `learnt` (l, d) at the virtual tokens."""
        columns = self.virtual[..., None].expand(-1, -1, hidden.shape[2])
        return hidden.scatter(1, columns, learnt.to(hidden).expand(len(hidden), -1, -1))

    def cut(self, value: Any) -> Any:
        """The caller's columns of hidden states (rows, T + l, d), alone or in tuples; anything else as it is."""
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == self.copies.shape:
            return value.gather(1, self.read[..., None].expand(-1, -1, value.shape[2]))
        if type(value) is tuple:
            return tuple(self.cut(part) for part in value)
        return value


class VirtualTokens(nn.Module):
    """The trainable values of a model's virtual tokens, and the hooks that insert them.

    Attributes:
        embeddings: (l, e), in place of token embeddings; they start as those of random tokens of the vocabulary.
        layers: (L - 1, l, d), in place of the inputs of the blocks after the first, or None; they start normal with the
            standard deviation of the embedding table.
    """

    def __init__(self, model: PreTrainedModel, prefix: int, infix: int, layers: bool):
        super().__init__()
        self.prefix, self.infix = prefix, infix
        encoder_decoder = model.config.is_encoder_decoder
        reader = reading(model)
        self.causal = not encoder_decoder and any(getattr(m, "is_causal", False) for m in reader.modules())
        # Encoders with a [CLS] token expect it at position 0.
        self.after_first = not encoder_decoder and not self.causal
        self.positions, self.reserved = table(model), _reserved(reader)
        embed = token_table(reader)
        if embed is None:
            raise InputError(
                f"virtual tokens replace rows of token embeddings, but {type(model).__name__} has no table of them: "
                "use another model or method"
            )
        rows = embed.weight.detach()
        self.context = positions(model)
        if self.context is not None and len(self) >= self.context:
            raise InputError(
                f"prefix + infix = {len(self)} virtual tokens leave no room in the {self.context} positions of "
                f"{type(model).__name__}; use fewer"
            )
        dtype = torch.promote_types(rows.dtype, torch.float32)
        tokens = torch.randint(len(rows), (len(self),)).to(rows.device)
        self.embeddings = nn.Parameter(embed(tokens).detach().to(dtype))  # embed: some models scale the rows
        self.layers: nn.Parameter | None = None
        blocks = stacks(reader)[0]
        if layers and len(blocks) > 1:
            shape = len(blocks) - 1, len(self), model.config.hidden_size
            normal = torch.randn(shape, dtype=dtype, device=rows.device)
            self.layers = nn.Parameter(normal * rows.std().to(dtype))
            for layer, block in enumerate(blocks[1:]):
                block.register_forward_pre_hook(partial(self.replace, layer), with_kwargs=True)
        # Bound methods: a deep copy of the model has hooks bound to the copy of this module.
        self.reader_parameters = _parameters(reader)
        reader.register_forward_pre_hook(self.insert, with_kwargs=True)
        if encoder_decoder:
            self.decoder_parameters = _parameters(model.get_decoder())
            model.get_decoder().register_forward_pre_hook(self.widen, with_kwargs=True)
        else:
            reader.register_forward_hook(self.cut)
        self.generates = self.causal and model is not reader and model.get_output_embeddings() is not None
        if self.generates:
            self.model_parameters = _parameters(model)
            model.register_forward_pre_hook(self.note_prompt, with_kwargs=True)
        self.labels: Tensor | None = None
        """Labels of the next forward, for callers that do not pass them to the model."""
        # Of the current or last forward; never saved.
        self.layout: Layout | None = None
        self.prompt: Tensor | None = None

    def __len__(self) -> int:
        return self.prefix + self.infix

    def note_prompt(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a causal language model: the prompt of each row ends where its labels begin."""
        inputs = _named(self.model_parameters, args, kwargs)
        labels = self.labels if inputs.get("labels") is None else inputs["labels"]
        self.prompt = self.labels = None
        if labels is not None:
            counts = labels != -100
            self.prompt = torch.where(counts.any(1), counts.int().argmax(1), labels.shape[1])
        elif self.infix and model.training and torch.is_grad_enabled():
            raise InputError(
                "training with an infix needs labels, which show where the prompt ends: pass labels to the model (with "
                "label_smoothing_factor only RankTrainer does), or use infix=0"
            )
        elif self.infix and inputs.get("use_cache") is False:
            raise InputError(
                "without a cache, generation does not show where the prompt ends and the infix goes: generate with "
                "use_cache=True, leave use_cache out of a single forward, or use infix=0"
            )

    def insert(
        self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Before the reader: rows of embeddings with virtual tokens in place of the caller's token ids."""
        inputs = _named(self.reader_parameters, args, kwargs)
        prompt, self.prompt, self.layout = self.prompt, None, None
        ids, mask, cache = (inputs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if ids is None or inputs.get("inputs_embeds") is not None:
            raise InputError("virtual tokens are inserted among token ids: pass input_ids and not inputs_embeds")
        if getattr(cache, "is_compileable", False):
            raise InputError("a static cache has no room for virtual tokens: use the default cache")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise InputError("virtual tokens need an attention_mask with one row of 0 and 1 per row of tokens")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:  # the virtual tokens are in the cache already
            self._count(inputs, past)
        else:
            if mask is not None and mask.shape != ids.shape:
                raise InputError(
                    f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}: without a filled "
                    "cache their shapes must be equal"
                )
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            self.layout = layout = Layout.of(
                real, self.prefix, self.infix, causal=self.causal, after_first=self.after_first, prompt=prompt
            )
            for name in ("attention_mask", "token_type_ids"):
                if inputs.get(name) is not None:
                    inputs[name] = layout.insert(inputs[name])
            ids = layout.insert(ids)
            if inputs.get("position_ids") is not None:
                inputs["position_ids"] = layout.positions(inputs["position_ids"])
            elif self.reserved and "position_ids" in self.reader_parameters:  # RoBERTa counts ids that are not padding
                real = ids != self.reserved - 1
                inputs["position_ids"] = real.cumsum(1) * real + self.reserved - 1
            if inputs.get("cache_position") is not None:  # in the first versions of transformers 5
                inputs["cache_position"] = torch.arange(ids.shape[1], device=ids.device)
            hidden = reader.get_input_embeddings()(ids)  # type: ignore[operator]
            inputs["input_ids"], inputs["inputs_embeds"] = None, layout.put(hidden, self.embeddings)
        self._check_length(inputs, past + ids.shape[1])
        return (), inputs

    def cut(self, reader: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the reader: hidden states at the caller's tokens. Attention maps and caches keep virtual tokens."""
        if self.layout is None:
            return output
        if isinstance(output, tuple):
            return self.layout.cut(output)
        for name, value in output.items():
            output[name] = self.layout.cut(value)
        return output

    def widen(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Before the decoder of an encoder-decoder: the mask of the encoder's input, with virtual tokens."""
        inputs = _named(self.decoder_parameters, args, kwargs)
        mask, states = inputs.get("encoder_attention_mask"), inputs.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[1] + len(self) == states.shape[1]:
            inputs["encoder_attention_mask"] = Layout.of(mask.bool(), self.prefix, self.infix).insert(mask)
        return (), inputs

    def replace(
        self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before block `layer` + 1: the learnt inputs at the virtual tokens, in place of the last block's outputs."""
        hidden = args[0] if args else kwargs["hidden_states"]
        layout = self._layout_of(hidden)
        if layout is None or self.layers is None:
            return None
        hidden = layout.put(hidden, self.layers[layer])
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _layout_of(self, hidden: Tensor) -> Layout | None:
        """The layout of the forward that `hidden` belongs to.

        Gradient checkpointing runs a block's hooks again in the backward pass, possibly after another forward, so the
        layout is attached to the tensor that the checkpoint keeps.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.layout
        if torch._C._current_graph_task_id() < 0:  # not in a backward pass
            setattr(hidden, _LAYOUT, self.layout)
            return self.layout
        if not hasattr(hidden, _LAYOUT):
            raise InputError("virtual tokens in every layer need gradient checkpointing with use_reentrant=False")
        return getattr(hidden, _LAYOUT)

    def _count(self, inputs: dict[str, Any], past: int) -> None:
        """After a cache of `past` columns: make mask and positions count the virtual tokens in it.

        Virtual and real tokens of a row are one run of ones in the mask, so their order within it does not matter.
        """
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        counted = None if positions is None else int(positions.max()) + 1
        if mask is not None:
            counted = mask.shape[1]
            inputs["attention_mask"] = Layout.of(mask.bool(), len(self), 0).insert(mask)
        for name in ("position_ids", "cache_position"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name] + len(self)
        expected = past + inputs["input_ids"].shape[1] - len(self)
        if counted is not None and counted != expected:
            raise InputError(
                f"the cache and the new tokens hold {expected} tokens that are not virtual, but attention_mask or "
                f"position_ids count {counted}: count only tokens that are not virtual, and do not pass generate a "
                "cache that it returned"
            )

    def _check_length(self, inputs: dict[str, Any], width: int) -> None:
        most = self.positions
        if most is None or width <= most:
            return
        if inputs.get("position_ids") is not None:  # padding makes rows wide, but needs no positions
            width = int(inputs["position_ids"].max()) + 1 - self.reserved
        if width > most:
            raise InputError(
                f"a row of {width - len(self)} tokens and {len(self)} virtual tokens is longer than the model's {most} "
                f"positions: truncate rows to {most - len(self)} tokens, or use fewer virtual tokens"
            )


def add_virtual_tokens(model: nn.Module, prefix: int, infix: int, layers: bool = False) -> VirtualTokens:
    """Insert `prefix` + `infix` virtual tokens into every input of `model`, in place; what is added trains.

    The prefix starts the row, or follows the first token in an encoder, whose [CLS] is there. The infix follows the
    prompt: in a causal language model it precedes the first label, otherwise it follows the last real token. Padding
    may be on either side. `generate` works with its default cache, on prompts whose attention mask has no gap between
    real tokens and that are read at once (no `prefill_chunk_size`): later steps do not show where the infix is.

    Args:
        model: a transformers model, which may be on the meta device.
        layers: learn the inputs of all blocks, not only of the first.

    Raises:
        InputError: `model` is not a transformers model, has virtual tokens already, or has too few positions. Later, in
            the forward: embeddings in place of token ids, a row that is too long, or a cache that does not fit.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"virtual tokens need a transformers model, not a {type(model).__name__}")
    if hasattr(model, NAME):
        raise InputError("this model already has virtual tokens: use the base model")
    tokens = VirtualTokens(model, prefix, infix, layers)
    let_compile_see_hooks()
    model.add_module(NAME, tokens)
    return tokens


def _reserved(reader: nn.Module) -> int:
    """Positions before the first token's, in a reader that counts tokens that are not padding (RoBERTa); else 0."""
    for name, module in reader.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _named(names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
