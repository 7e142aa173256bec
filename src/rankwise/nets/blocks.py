"""The blocks of a transformer, and the layers of a block that write to its residual stream.

They are recognised by their structure, not by a table of architectures. A block of any other structure is refused.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from rankwise.errors import InputError
from rankwise.ranks.layers import features, weight_layer

_ROUTED = ("expert", "router", "moe")  # in the names of parts of a mixture of experts
_READS = re.compile(r"(q|k|v|query|key|value|gate)(_\w+)?")  # names of layers that read the stream, wherever they are


class Outputs(NamedTuple):
    """The linear layers of one block whose outputs are added to the residual stream, all of the same width."""

    attention: list[nn.Module]  # one, or two where a decoder also attends to an encoder
    feed_forward: nn.Module


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The stacks of blocks of a transformer in model order: one, or encoder and decoder.

    A stack is a list of modules of one class, each with an attention, that is not inside another such list.

    Raises:
        InputError: the model has no such list.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1:
            nested = any(name.startswith(f"{outer}.") for outer in lists)
            if not nested and all(any(_attentions(block)) for block in module):
                lists[name] = module
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of blocks with attention: this method needs a transformer"
        )
    return list(lists.values())


def outputs(model: nn.Module) -> list[Outputs]:
    """The output projections of every block, in model order.

    The feed-forward part of a block is its linear layers outside the attentions: one or two (with a gate) that read the
    stream, then one that maps back to its width. The output projection of an attention is its last layer of that output
    width that is not called a query, key, value or gate.

    Raises:
        InputError: a block of any other form, such as a mixture of experts, several feed-forward parts, or an attention
            without linear layers. A guess could silently adapt the wrong layer.
    """
    return [_outputs(block) for stack in stacks(model) for block in stack]


def _outputs(block: nn.Module) -> Outputs:
    kind = type(block).__name__
    if any(word in f"{name}.{type(part).__name__}".lower() for name, part in block.named_modules() for word in _ROUTED):
        raise InputError(f"{kind} is a mixture of experts: it has no single output projection to put an adapter after")
    attentions = list(_attentions(block))
    inside = {part for attention in attentions for part in attention.modules()}
    linear = [(name, part) for name, part in _linear(block) if part not in inside]
    widths = [(_width(part, "in"), _width(part, "out")) for _, part in linear]
    if len(linear) not in (2, 3) or _reads(linear[-1][0]) or any(wide != widths[-1][1] for wide, _ in widths[:-1]):
        raise InputError(
            f"{kind} is an unknown block: it needs one feed-forward part of two linear layers, or of three with a gate"
        )
    projections = []
    for attention in attentions:
        # torch's own attention uses its output projection's weight without calling the module: no hook would run.
        if any(isinstance(part, nn.MultiheadAttention) for part in attention.modules()):
            raise InputError(f"{kind} uses torch's fused MultiheadAttention, which bypasses its output projection")
        to_width = [p for name, p in _linear(attention) if _width(p, "out") == widths[-1][1] and not _reads(name)]
        if not to_width:
            raise InputError(f"{type(attention).__name__} of {kind} has no linear layer as output projection")
        projections.append(to_width[-1])
    return Outputs(projections, linear[-1][1])


def _attentions(block: nn.Module) -> Iterator[nn.Module]:
    """The outermost attention modules of a block: BERT's contains another attention and the projection."""
    for part in block.children():
        if "attention" in type(part).__name__.lower():
            yield part
        else:
            yield from _attentions(part)


def _linear(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in module.named_modules() if (layer := weight_layer(part)) and layer.linear]


def _reads(name: str) -> bool:
    return _READS.fullmatch(name.rpartition(".")[2]) is not None


def _width(part: nn.Module, side: str) -> int:
    """Features on the `in` or `out` side."""
    return features(part)[side == "out"]
