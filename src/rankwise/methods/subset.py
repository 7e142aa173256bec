"""Methods that train existing parts of the model: the head, nothing, all weights, the last blocks, the biases.

FT and FT-Top2 are baselines of Hu et al. 2021 (arXiv 2106.09685, section 5.1 and table 3). BitFit is Ben Zaken et al.
2022 (arXiv 2106.10199). Its released code also trains the classifier and the pooler's bias; here `head` names them.

PEFT has `bias="all"` only together with an adapter, and its BeftConfig adds a second bias to layers that have one.
Nothing has to be added or merged: `requires_grad` marks what trains, and `rankwise.save` writes that.
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
    """Only the head, on the frozen model: the lower bound in every comparison."""

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        if not head:
            raise InputError('the method head trains only the head: name its modules, as in head=["classifier"]')
        freeze(model, head)
        return model


@dataclass(frozen=True)
class Untrained(Method, name="none"):
    """Nothing trains: a run only scores the model as it comes, the lower bound for a model without a head."""

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        require(not head, f"the method none trains nothing, and {', '.join(head)} must: use the method head")
        freeze(model, head)
        return model


@dataclass(frozen=True)
class Full(Method, name="full"):
    """Full fine-tuning: every weight trains, and the whole model is saved."""

    whole = True

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        freeze(model, head)
        _train(model.parameters())
        return model


@dataclass(frozen=True)
class FullTop(Method, name="full-top"):
    """Full fine-tuning of only the last blocks, without the norm after them.

    Attributes:
        blocks: the number of blocks that train, from the end of the last stack (in an encoder-decoder, the decoder's).
    """

    blocks: Annotated[int, Field(ge=1)] = 2

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        last = list(stacks(model)[-1])
        most = len(last)
        require(self.blocks <= most, f"blocks {self.blocks} is more than the last stack has: use at most {most}")
        freeze(model, head)
        _train(chain.from_iterable(block.parameters() for block in last[-self.blocks :]))
        return model


@dataclass(frozen=True)
class BitFit(Method, name="bitfit"):
    """Only biases train, including those of norms.

    If the blocks have no biases at all (Llama, T5), each of their linear layers gets one that starts at 0, as in
    published uses of BitFit on such models; all models in the paper have biases.
    """

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        freeze(model, head)
        try:
            blocks = [block for stack in stacks(model) for block in stack]
        except InputError:  # not a transformer: its existing biases train
            blocks = []
        if blocks and not any(biases(block) for block in blocks):
            for linear in (part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)):
                dtype = torch.float32 if holds_codes(linear.weight) else linear.weight.dtype
                zero = torch.zeros(linear.out_features, device=linear.weight.device, dtype=dtype)
                linear.register_parameter("bias", nn.Parameter(zero))
        trained = biases(model)
        require(bool(trained), f"{type(model).__name__} has neither biases nor transformer blocks: use another method")
        _train(trained)
        return model


def biases(module: nn.Module) -> list[nn.Parameter]:
    """All biases in `module`, recognised by their names: `bias`, `q_bias`, `bias_hh_l0` and the like."""
    ends = [(name.rpartition(".")[2], p) for name, p in module.named_parameters()]
    return [p for end, p in ends if end == "bias" or end.endswith("_bias") or end.startswith("bias_")]


def freeze(model: nn.Module, head: Sequence[str]) -> None:
    """Freeze all of `model` except the modules named in `head`.

    Raises:
        InputError: a name that matches no module, or a model with a PEFT adapter, whose parameters are not its own.
    """
    check_bare(model)
    names = head_names(model, head)
    model.requires_grad_(False)
    for name in names:
        _train(model.get_submodule(name).parameters())


def _train(parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        require(not holds_codes(p), "quantised weights cannot train: load the model without quantising it")
        p.requires_grad_(True)
