"""Methods that train a part of the model that is there already: the head, all weights, the last blocks, the biases.

FT and FT-Top2 are baselines of Hu et al. 2021 (arXiv 2106.09685, section 5.1 and table 3). BitFit is Ben Zaken et al.
2022 (arXiv 2106.10199). Its released code also trains the classifier and the pooler's bias; here the head says so.

PEFT's `bias="all"` comes only with an adapter and BeftConfig adds a second bias to layers that have one;
here nothing needs adding or merging, so `requires_grad` alone says all, and `rankwise.save` writes what it marks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from rankwise.errors import InputError, require
from rankwise.methods.base import Method
from rankwise.methods.targets import check_bare, head_names
from rankwise.nets.blocks import stacks
from rankwise.ranks.layers import holds_codes


@dataclass(frozen=True)
class Head(Method, name="head"):
    """The head alone on the frozen model: the floor under every comparison."""

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        if not head:
            raise InputError('the method head trains the head alone: name its modules, as in head=["classifier"]')
        freeze(model, head)
        return model


@dataclass(frozen=True)
class Full(Method, name="full"):
    """Full fine-tuning: every weight trains, and what is saved is the whole model."""

    whole = True

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        freeze(model, head)
        _train(model.parameters())
        return model


@dataclass(frozen=True)
class FullTop(Method, name="full-top"):
    """Full fine-tuning of the last blocks alone, without the norm that follows them.

    Attributes:
        blocks: how many blocks train, counted from the end of the last stack (the decoder's, where there are two).
    """

    blocks: Annotated[int, Field(ge=1)] = 2

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        last = list(stacks(model)[-1])
        require(self.blocks <= len(last), f"blocks {self.blocks} is more than the {len(last)} of the last stack")
        freeze(model, head)
        _train(chain.from_iterable(block.parameters() for block in last[-self.blocks :]))
        return model


@dataclass(frozen=True)
class BitFit(Method, name="bitfit"):
    """All biases train and nothing else, those of the norms among them.

    Where the blocks have no bias at all (Llama, T5), each of their linear layers gets one that starts at 0, as in
    published uses of BitFit on such models. The paper has no such case: all of its models have biases.
    """

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        freeze(model, head)
        try:
            blocks = [block for stack in stacks(model) for block in stack]
        except InputError:  # not a transformer: the biases that it has
            blocks = []
        if blocks and not any(biases(block) for block in blocks):
            for linear in (part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)):
                kind = torch.float32 if holds_codes(linear.weight) else linear.weight.dtype
                zero = torch.zeros(linear.out_features, device=linear.weight.device, dtype=kind)
                linear.register_parameter("bias", nn.Parameter(zero))
        found = biases(model)
        require(bool(found), f"{type(model).__name__} has no bias to train and no blocks to give one to")
        _train(found)
        return model


def biases(module: nn.Module) -> list[nn.Parameter]:
    """All biases in `module` by their names: `bias`, and `q_bias`, `bias_hh_l0` and the like."""
    ends = [(name.rpartition(".")[2], p) for name, p in module.named_parameters()]
    return [p for end, p in ends if end == "bias" or end.endswith("_bias") or end.startswith("bias_")]


def freeze(model: nn.Module, head: Sequence[str]) -> None:
    """Freeze all of `model` but the modules that `head` names.

    Raises:
        InputError: a name that matches no module, or a model that holds a PEFT adapter: its parameters would be taken
            for the model's own.
    """
    check_bare(model)
    names = head_names(model, head)
    model.requires_grad_(False)
    for name in names:
        _train(model.get_submodule(name).parameters())


def _train(parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        require(not holds_codes(p), "quantised weights cannot train: load the model in a floating-point type")
        p.requires_grad_(True)
