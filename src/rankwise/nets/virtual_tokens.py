"""Virtual tokens: trainable rows that stand among the tokens of every input, unseen by whoever calls the model.

The part of a model that reads the input (the *reader*: its transformer without the head, or the encoder of an
encoder-decoder) gets a longer input than the caller gave, and its hidden states are cut back to the caller's columns.
Heads, losses, labels, `generate` and the search for the last token or [EOS] therefore work on the caller's rows and
need no change; no token is added to the vocabulary, and embedding table and output head stay as they are.
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

NAME = "virtual_tokens"  # of the module on the model
_LAYOUT = "_rankwise_layout"


@dataclass(frozen=True)
class Layout:
    """Where l virtual tokens stand in rows of T tokens; columns count from 0.

    Attributes:
        copies: (rows, T + l), the caller's column from which a column has its mask, type and offset of position: its
            own, or for a virtual token the first token of the row (prefix) or the one before it (infix).
        virtual: (rows, l), the columns of the virtual tokens, prefix first.
        read: (rows, T), the column whose output stands for the caller's column: its own, or in a causal model the last
            one before the caller's next column, since an infix is what predicts the token after it.
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
        place = columns + prefix * (columns >= start) + infix * (columns >= end)
        ahead, behind = (torch.arange(count, device=real.device) for count in (prefix, infix))
        virtual = torch.cat([start + ahead, end + prefix + behind], 1)
        beside = torch.cat([first.expand(-1, prefix), (end - 1).maximum(first).expand(-1, infix)], 1)
        copies = columns.new_zeros(rows, width + prefix + infix)
        copies = copies.scatter(1, place, columns).scatter(1, virtual, beside)
        if causal:
            last = torch.full_like(first, width + prefix + infix)
            place = torch.cat([place[:, 1:], last], 1) - 1
        return cls(copies, virtual, place)

    def insert(self, values: Tensor) -> Tensor:
        """Values of the caller's tokens (rows or 1, T), and of their neighbours at virtual tokens: (rows, T + l)."""
        return values.expand(len(self.copies), -1).gather(1, self.copies)

    def positions(self, positions: Tensor) -> Tensor:
        """Positions (rows or 1, T) counted on with the virtual tokens in between: (rows, T + l)."""
        before = torch.arange(positions.shape[1], device=positions.device)
        return self.insert(positions - before) + torch.arange(self.copies.shape[1], device=positions.device)

    def put(self, hidden: Tensor, learnt: Tensor) -> Tensor:
        """`hidden` (rows, T + l, d) with `learnt` (l, d) at the virtual tokens."""
        where = self.virtual[..., None].expand(-1, -1, hidden.shape[2])
        return hidden.scatter(1, where, learnt.to(hidden).expand(len(hidden), -1, -1))

    def cut(self, value: Any) -> Any:
        """The caller's columns of hidden states (rows, T + l, d), alone or in tuples; anything else as it is."""
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == self.copies.shape:
            return value.gather(1, self.read[..., None].expand(-1, -1, value.shape[2]))
        if type(value) is tuple:
            return tuple(self.cut(part) for part in value)
        return value


class VirtualTokens(nn.Module):
    """What the virtual tokens of one model have learnt, and the hooks that put it there.

    Attributes:
        embeddings: (l, e), in place of word embeddings; drawn from the model's own words.
        layers: (L - 1, l, d), in place of the inputs of the blocks after the first, or None; normal with the standard
            deviation of the embedding table.
    """

    def __init__(self, model: PreTrainedModel, prefix: int, infix: int, layers: bool):
        super().__init__()
        self.prefix, self.infix = prefix, infix
        two = model.config.is_encoder_decoder
        reader = reading(model)
        self.causal = not two and any(getattr(module, "is_causal", False) for module in reader.modules())
        # Encoders with a [CLS] read it at position 0, where it has to stay.
        self.after_first = not two and not self.causal
        self.positions, self.taken = table(model), _taken(reader)
        embed = token_table(reader)
        if embed is None:
            raise InputError(
                f"virtual tokens are rows of token embeddings, of which {type(model).__name__} has no table"
            )
        words = embed.weight.detach()
        self.context = positions(model)
        if self.context is not None and len(self) >= self.context:
            raise InputError(
                f"prefix + infix = {len(self)} virtual tokens leave no room in the {self.context} positions of "
                f"{type(model).__name__}; use fewer"
            )
        precise = torch.promote_types(words.dtype, torch.float32)
        drawn = torch.randint(len(words), (len(self),)).to(words.device)
        self.embeddings = nn.Parameter(embed(drawn).detach().to(precise))  # as the model sees them: some scale them
        self.layers: nn.Parameter | None = None
        blocks = stacks(reader)[0]
        if layers and len(blocks) > 1:
            shape = len(blocks) - 1, len(self), model.config.hidden_size
            normal = torch.randn(shape, dtype=precise, device=words.device)
            self.layers = nn.Parameter(normal * words.std().to(precise))
            for layer, block in enumerate(blocks[1:]):
                block.register_forward_pre_hook(partial(self.replace, layer), with_kwargs=True)
        # Bound methods: a deep copy of the model has hooks bound to the copy of this module.
        self.reader_takes = _parameters(reader)
        reader.register_forward_pre_hook(self.insert, with_kwargs=True)
        if two:
            self.decoder_takes = _parameters(model.get_decoder())
            model.get_decoder().register_forward_pre_hook(self.widen, with_kwargs=True)
        else:
            reader.register_forward_hook(self.cut)
        self.speaks = self.causal and model is not reader and model.get_output_embeddings() is not None
        if self.speaks:
            self.model_takes = _parameters(model)
            model.register_forward_pre_hook(self.note, with_kwargs=True)
        self.told: Tensor | None = None
        """Labels of the next forward, for whoever does not give them to the model."""
        # Of the forward that runs, or ran last; never saved.
        self.layout: Layout | None = None
        self.prompt: Tensor | None = None

    def __len__(self) -> int:
        return self.prefix + self.infix

    def note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a causal language model: the prompt of each row ends where its labels begin."""
        given = _named(self.model_takes, args, kwargs)
        labels = self.told if given.get("labels") is None else given["labels"]
        self.prompt = self.told = None
        if labels is not None:
            told = labels != -100
            self.prompt = torch.where(told.any(1), told.int().argmax(1), labels.shape[1])
        elif self.infix and model.training and torch.is_grad_enabled():
            raise InputError(
                "the infix stands where the prompt ends, which only labels tell in training, and none came: give the "
                "model labels (label_smoothing_factor takes them away, but not from RankTrainer), or use infix=0"
            )
        elif self.infix and given.get("use_cache") is False:
            raise InputError(
                "the infix stands where the prompt ends, which generation without a cache does not tell: generate with "
                "use_cache=True, leave use_cache out of a single forward, or use infix=0"
            )

    def insert(
        self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Before the reader: rows of embeddings with virtual tokens in place of the caller's token ids."""
        given = _named(self.reader_takes, args, kwargs)
        prompt, self.prompt, self.layout = self.prompt, None, None
        ids, mask, cache = (given.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if ids is None or given.get("inputs_embeds") is not None:
            raise InputError("virtual tokens stand among token ids: give input_ids and no inputs_embeds")
        if getattr(cache, "is_compileable", False):
            raise InputError("virtual tokens do not fit a static cache, which has room for the caller's tokens alone")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise InputError("virtual tokens need an attention_mask with one row of 0 and 1 per row of tokens")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:  # the virtual tokens are in the cache already
            self._count(given, past)
        else:
            if mask is not None and mask.shape != ids.shape:
                raise InputError(
                    f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: without a filled "
                    "cache they must be alike"
                )
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            self.layout = layout = Layout.of(
                real, self.prefix, self.infix, causal=self.causal, after_first=self.after_first, prompt=prompt
            )
            for name in ("attention_mask", "token_type_ids"):
                if given.get(name) is not None:
                    given[name] = layout.insert(given[name])
            ids = layout.insert(ids)
            if given.get("position_ids") is not None:
                given["position_ids"] = layout.positions(given["position_ids"])
            elif self.taken and "position_ids" in self.reader_takes:  # RoBERTa counts the ids that are not padding
                real = ids != self.taken - 1
                given["position_ids"] = real.cumsum(1) * real + self.taken - 1
            if given.get("cache_position") is not None:  # of the first versions of transformers 5
                given["cache_position"] = torch.arange(ids.shape[1], device=ids.device)
            words = reader.get_input_embeddings()(ids)  # type: ignore[operator]
            given["input_ids"], given["inputs_embeds"] = None, layout.put(words, self.embeddings)
        self._check_length(given, past + ids.shape[1])
        return (), given

    def cut(self, reader: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the reader: its hidden states at the caller's tokens alone. Attention maps and caches stay long."""
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
        """Before the decoder of an encoder-decoder: the mask of what the encoder read, virtual tokens included."""
        given = _named(self.decoder_takes, args, kwargs)
        mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[1] + len(self) == states.shape[1]:
            given["encoder_attention_mask"] = Layout.of(mask.bool(), self.prefix, self.infix).insert(mask)
        return (), given

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

        Gradient checkpointing may run a block's hooks again in the backward, when another forward may have followed;
        the layout therefore rides along on the tensor that the checkpoint keeps.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.layout
        if torch._C._current_graph_task_id() < 0:  # not in a backward
            setattr(hidden, _LAYOUT, self.layout)
            return self.layout
        if not hasattr(hidden, _LAYOUT):
            raise InputError("virtual tokens in every layer need gradient checkpointing with use_reentrant=False")
        return getattr(hidden, _LAYOUT)

    def _count(self, given: dict[str, Any], past: int) -> None:
        """At a step that goes on from a cache of `past` columns: let mask and positions count the virtual tokens too.

        A row's virtual tokens and its real ones make up one run of ones, so that their order within it is no matter.
        """
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        counted = None if positions is None else int(positions.max()) + 1
        if mask is not None:
            counted = mask.shape[1]
            given["attention_mask"] = Layout.of(mask.bool(), len(self), 0).insert(mask)
        for name in ("position_ids", "cache_position"):
            if given.get(name) is not None:
                given[name] = given[name] + len(self)
        whole = past + given["input_ids"].shape[1]
        if counted is not None and counted + len(self) != whole:
            raise InputError(
                f"the cache and the new tokens make {whole} columns, {len(self)} of them virtual, but attention_mask "
                f"or position_ids count {counted} instead of {whole - len(self)}: count the tokens that are not "
                "virtual, and give generate no cache that it returned"
            )

    def _check_length(self, given: dict[str, Any], width: int) -> None:
        most = self.positions
        if most is None or width <= most:
            return
        if given.get("position_ids") is not None:  # padding may make rows wide and not long
            width = int(given["position_ids"].max()) + 1 - self.taken
        if width > most:
            raise InputError(
                f"a row of {width - len(self)} tokens and {len(self)} virtual tokens is longer than the model's {most} "
                f"positions: cut rows to {most - len(self)} tokens, or use fewer virtual tokens"
            )


def add_virtual_tokens(model: nn.Module, prefix: int, infix: int, layers: bool = False) -> VirtualTokens:
    """Put `prefix` + `infix` virtual tokens into every input of `model`, in place; all that is new trains.

    The prefix opens the row, after the first token where an encoder has its [CLS] there; the infix follows the prompt:
    it stands before the first label of a causal language model, else after the last real token. Padding may be on
    either side. `generate` works with its default cache, on prompts whose attention mask has no gap between real tokens
    and that are read whole (no `prefill_chunk_size`): of later steps nothing tells where the infix stands.

    Args:
        model: a transformers model, which may be on the meta device.
        layers: learn the inputs of the later blocks too, and not of the first alone.

    Raises:
        InputError: no transformers model, one that has virtual tokens already, or one with too few positions. Later, in
            the forward: embeddings in place of token ids, a row that grows too long, or a cache that does not fit.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"virtual tokens need a transformers model, and {type(model).__name__} is none")
    if hasattr(model, NAME):
        raise InputError("this model has virtual tokens already: take the base model instead")
    tokens = VirtualTokens(model, prefix, infix, layers)
    let_compile_see_hooks()
    model.add_module(NAME, tokens)
    return tokens


def _taken(reader: nn.Module) -> int:
    """Positions that a reader leaves free because it counts tokens that are not padding, as RoBERTa does; else 0."""
    for name, module in reader.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _named(names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
