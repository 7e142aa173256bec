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

# Optimizer state in the shape of a parameter: its name, and whether it is a second moment.
_MOMENTS = {"exp_avg": False, "momentum_buffer": False, "exp_avg_sq": True, "max_exp_avg_sq": True}

_optimizers: weakref.WeakKeyDictionary[nn.Module, "weakref.WeakSet[Optimizer]"] = weakref.WeakKeyDictionary()
_places: weakref.WeakKeyDictionary[Optimizer, dict[int, tuple[list[nn.Parameter], int]]] = weakref.WeakKeyDictionary()
"""Where each Parameter was last seen, by its id."""


def follow(model: nn.Module, optimizer: Optimizer) -> None:
    """Keep `optimizer` up to date from now on when ranks of `model` change. Only a weak reference is kept."""
    _optimizers.setdefault(peft_model(model), weakref.WeakSet()).add(optimizer)


def followers(model: nn.Module) -> list[Optimizer]:
    """The optimizers that follow `model`."""
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
    """Replace the Parameter `owner.name` by `new`, in the model and in every optimizer that follows it.

    Args:
        new: the new values, or None to remove the Parameter. A factor of a convolution may be given as a matrix.
        scale: whether it is a scale (ω, gates): if it replaces none, it joins the parameter group marked as such. Any
            other joins the group with the factors of other sites.
        carry: maps each moment of the old Parameter to the new one, both as matrices. Without it the state is reset, as
            it also is in optimizers with more state than the moments of Adam or SGD.
        trains: whether a Parameter that replaces none trains; others are frozen or not as before.
    """
    old = owner._parameters.get(name)
    trains = trains if old is None else old.requires_grad
    if new is not None and old is not None:
        new = shaped(new, old)
    fresh = None if new is None else nn.Parameter(new.detach().contiguous(), requires_grad=trains)
    owner.register_parameter(name, fresh)
    for optimizer in followers(model):
        state = optimizer.state.pop(old, None) if old is not None else None
        if old is not None and (place := _place(optimizer, old)) is not None:
            params, index = place
            params[index : index + 1] = [] if fresh is None else [fresh]
            if fresh is not None:
                _places[optimizer][id(fresh)] = place
        if old is None and fresh is not None and trains and (group := _group(optimizer, model, scale)) is not None:
            group["params"].append(fresh)
        if state and state.keys() <= {"step", *_MOMENTS} and carry is not None and fresh is not None:
            optimizer.state[fresh] = {
                k: shaped(carry(v.flatten(1), _MOMENTS[k]), v) if k in _MOMENTS and v is not None else v
                for k, v in state.items()
            }


def _place(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[list[nn.Parameter], int] | None:
    """The list and the index at which a parameter is in the optimizer's groups; None if it is in none.

    They are kept from one parameter to the next, since to search for each takes time in proportion to all.
    """
    for again in (False, True):
        if again:
            _places[optimizer] = {
                id(p): (entry["params"], index)
                for entry in optimizer.param_groups
                for index, p in enumerate(entry["params"])
            }
        params, index = place = _places.setdefault(optimizer, {}).get(id(parameter), ([], 0))
        current = any(entry["params"] is params for entry in optimizer.param_groups)
        if current and index < len(params) and params[index] is parameter:
            return place
    return None


def _group(optimizer: Optimizer, model: nn.Module, scale: bool) -> dict[str, Any] | None:
    """The group that a new Parameter joins."""
    for entry in optimizer.param_groups if scale else ():
        if entry.get("scale"):
            return entry
    factors = {id(p) for site in sites(model) if site.present for p in (site.A, site.B)}
    return next((g for g in optimizer.param_groups if any(id(p) in factors for p in g["params"])), None)


def sort_groups(model: nn.Module) -> None:
    """Sort the optimizers' groups in model order, since checkpoints identify parameters by position."""
    peft = peft_model(model)
    order = {id(p): i for i, p in enumerate(peft.parameters())}
    for optimizer in followers(peft):
        for entry in optimizer.param_groups:
            entry["params"].sort(key=lambda p: order.get(id(p), len(order)))


def set_rank(site: Site, rank: int) -> None:
    """Set rank and alpha in the layers of a site whose factors have rank `rank`; its scale s stays."""
    site.base.set_rank(site.layer.lora_A[site.adapter], site.layer.lora_B[site.adapter], rank)
    site.layer.r[site.adapter] = rank
    site.layer.lora_alpha[site.adapter] = alpha(site, rank)


def remove_factors(model: nn.Module, site: Site) -> None:
    """Empty a site."""
    layer, adapter, scaling = site.layer, site.adapter, site.scaling
    replace(model, *site.A_owner, None)
    replace(model, *site.B_owner, None)
    for part in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.r, layer.lora_alpha, layer.scaling):
        del part[adapter]
    layer.__dict__.setdefault("lora_empty", {})[adapter] = scaling  # in case the site gets rank again
