"""Less memory between forward and backward pass: `recomputed` for any model, `chunked_loss` for one that writes."""

from torch import nn

from rankwise.errors import require
from rankwise.nets import chunked_loss, recomputed
from rankwise.ranks.sites import base_of


def lean(model: nn.Module, on: bool = True) -> None:
    """Keep less of a forward pass of `model` for the backward pass; or as much as before, again.

    Outputs of norms, activations and casts are computed again in the backward pass, with the same gradients to
    the bit. The loss of a language model is computed for 256 tokens at a time, with the same gradients except for the
    order of sums. Passes without gradients do not change.

    Args:
        model: any model, also one with an adapter by PEFT. It is changed in place.
        on: False turns it off.

    Raises:
        InputError: it or a part of it is compiled, its loss cannot be computed in chunks, or torch is older than 2.8.
    """
    compiled = any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in model.modules())
    require(not compiled, f"{type(model).__name__} is compiled, and decides itself what it keeps: do not call lean")
    writes = getattr(base_of(model), "get_output_embeddings", lambda: None)() is not None
    put_on(model, writes) if on else take_off(model, writes)


def put_on(model: nn.Module, writes: bool) -> None:
    """The same for a model of which it is known whether it writes text."""
    recomputed.check()
    if writes:
        chunked_loss.put_on(model)
    recomputed.put_on(model)


def take_off(model: nn.Module, writes: bool) -> None:
    recomputed.take_off(model)
    if writes:
        chunked_loss.take_off(model)
