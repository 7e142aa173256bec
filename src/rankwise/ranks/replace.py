"""`replace` is the only code in rankwise that swaps a Parameter or touches an optimizer's state."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.ranks.layers import shaped
from rankwise.ranks.peft_records import alpha
from rankwise.ranks.sites import Site, peft_model, sites

Carry = Callable[[Tensor, bool], Tensor]  # (moment, is it the second one) -> the moment of the new parameter

# What optimizers keep in the shape of a parameter: the name, and whether it is of second order.
_MOMENTS = {"exp_avg": False, "momentum_buffer": False, "exp_avg_sq": True, "max_exp_avg_sq": True}

_optimizers: weakref.WeakKeyDictionary[nn.Module, "weakref.WeakSet[Optimizer]"] = weakref.WeakKeyDictionary()


def follow(model: nn.Module, optimizer: Optimizer) -> None:
    """From now on `optimizer` goes along with every rank change of `model`. The optimizer is held weakly."""
    _optimizers.setdefault(peft_model(model), weakref.WeakSet()).add(optimizer)


def followers(model: nn.Module) -> list[Optimizer]:
    """The optimizers that go along with `model`."""
    return list(_optimizers.get(peft_model(model), ()))


def replace(
    model: nn.Module,
    owner: nn.Module,
    name: str,
    new: Tensor | None,
    scale: bool = False,
    carry: Carry | None = None,
    trains: bool = True,
) -> None:
    """Put `new` in the place of the Parameter `owner.name`, in the model and in every optimizer that follows it.

    Args:
        new: the new values, or None to take the Parameter away. A factor of a convolution may come as a matrix.
        scale: whether it is one (ω, gates): without predecessor it then joins the parameter group that is marked so.
            All else, and where there is no such group, joins the one that holds the factors of other sites.
        carry: maps each moment of the old Parameter to the new one, both as matrices; without it the state starts from
            nothing, and so it does in an optimizer that keeps more than moments of Adam or SGD.
        trains: whether a Parameter without predecessor does; others go on as they were.
    """
    old = owner._parameters.get(name)
    trains = trains if old is None else old.requires_grad
    if new is not None and old is not None:
        new = shaped(new, old)
    fresh = None if new is None else nn.Parameter(new.detach().contiguous(), requires_grad=trains)
    owner.register_parameter(name, fresh)
    for optimizer in followers(model):
        state = optimizer.state.pop(old, None) if old is not None else None
        for entry in optimizer.param_groups:
            entry["params"] = [fresh if p is old else p for p in entry["params"] if p is not old or fresh is not None]
        if old is None and fresh is not None and trains and (home := _home(optimizer, model, scale)) is not None:
            home["params"].append(fresh)
        if state and state.keys() <= {"step", *_MOMENTS} and carry is not None and fresh is not None:
            optimizer.state[fresh] = {
                k: shaped(carry(v.flatten(1), _MOMENTS[k]), v) if k in _MOMENTS and v is not None else v
                for k, v in state.items()
            }


def _home(optimizer: Optimizer, model: nn.Module, scale: bool) -> dict[str, Any] | None:
    """The group that a Parameter without predecessor joins."""
    for entry in optimizer.param_groups if scale else ():
        if entry.get("scale"):
            return entry
    factors = {id(p) for site in sites(model) if site.present for p in (site.A, site.B)}
    return next((g for g in optimizer.param_groups if any(id(p) in factors for p in g["params"])), None)


def sort_groups(model: nn.Module) -> None:
    """Put the optimizers' groups in model order: checkpoints know parameters by position, new ones come at the end."""
    peft = peft_model(model)
    order = {id(p): i for i, p in enumerate(peft.parameters())}
    for optimizer in followers(peft):
        for entry in optimizer.param_groups:
            entry["params"].sort(key=lambda p: order.get(id(p), len(order)))


def set_rank(site: Site, rank: int) -> None:
    """Write the rank that the factors of a site have into its layers, and the alpha that keeps its scale."""
    site.base.set_rank(site.layer.lora_A[site.adapter], site.layer.lora_B[site.adapter], rank)
    site.layer.r[site.adapter] = rank
    site.layer.lora_alpha[site.adapter] = alpha(site, rank)


def take_factors(model: nn.Module, site: Site) -> None:
    """Take the factors of a site away."""
    layer, adapter = site.layer, site.adapter
    scaling = site.scaling
    replace(model, *site.A_owner, None)
    replace(model, *site.B_owner, None)
    for part in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.r, layer.lora_alpha, layer.scaling):
        del part[adapter]
    layer.__dict__.setdefault("lora_empty", {})[adapter] = scaling  # what a return needs to know
