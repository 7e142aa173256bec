"""Changing ranks. `replace` is the only code in rankwise that swaps a Parameter or touches an optimizer's state.

The change of rank minimises ‖B_old A_old − B_new A_new‖_F (SimplexLoRA; Eckart–Young): QR of B and of Aᵀ, SVD of the
r×r core in fp64. The out×in product is never formed. PEFT 0.21 is driven through its public dictionaries.
"""

import re
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose, sqrt
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from rankwise.errors import InputError
from rankwise.ranks.sites import (
    OMEGA,
    Gates,
    Omega,
    Scale,
    Site,
    adapted,
    check_own,
    is_convolution,
    omega,
    peculiar,
    sites,
)

Carry = Callable[[Tensor, bool], Tensor]  # (moment, is it the second one) -> the moment of the new parameter

# What optimizers keep in the shape of a parameter: the name, and whether it is of second order.
_MOMENTS = {"exp_avg": False, "momentum_buffer": False, "exp_avg_sq": True, "max_exp_avg_sq": True}

RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How PEFT's names of starts begin that take something out of W. Loading does so again, at the rank of the file."""

_optimizers: weakref.WeakKeyDictionary[nn.Module, "weakref.WeakSet[Optimizer]"] = weakref.WeakKeyDictionary()


class RankPlan(dict[str, int]):
    """New ranks by site name, and how to get there.

    Args:
        ranks: site name -> new rank; sites that are not named keep theirs.
        change: `svd` keeps as much of BA as the new rank can hold; `reinit` draws A afresh and sets B = 0.
        empty: what becomes of BA at rank 0: `drop` it, or `merge` it into W.
        moments: Adam's moments of a changed site are `reset`, or `keep`: carried along with the factors.
        restart: draw fresh factors for every site, also where the rank stays.
        moved: how far the weights have moved that the ranks follow, in the method's own measure.
    """

    def __init__(
        self,
        ranks: Mapping[str, int] | Iterable[tuple[str, int]],
        change: str = "svd",
        empty: str = "drop",
        moments: str = "reset",
        restart: bool = False,
        moved: float | None = None,
    ):
        super().__init__(ranks)
        self.change, self.empty, self.moments, self.restart = change, empty, moments, restart
        self.moved = moved


def follow(model: nn.Module, optimizer: Optimizer) -> None:
    """From now on `optimizer` goes along with every rank change of `model`. The optimizer is held weakly."""
    _optimizers.setdefault(adapted(model), weakref.WeakSet()).add(optimizer)


def replace(
    model: nn.Module,
    owner: nn.Module,
    name: str,
    new: Tensor | None,
    group: str = "",
    carry: Carry | None = None,
    trains: bool = True,
) -> None:
    """Put `new` in the place of the Parameter `owner.name`, in the model and in every optimizer that follows it.

    Args:
        new: the new values, or None to take the Parameter away. A factor of a convolution may come as a matrix.
        group: the parameter group (by its `name`) that a Parameter without predecessor joins; in an optimizer without
            such a group, the one that holds the other sites.
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
    for optimizer in _optimizers.get(adapted(model), ()):
        state = optimizer.state.pop(old, None) if old is not None else None
        for entry in optimizer.param_groups:
            entry["params"] = [fresh if p is old else p for p in entry["params"] if p is not old or fresh is not None]
        if old is None and fresh is not None and trains and (home := _home(optimizer, model, group)) is not None:
            home["params"].append(fresh)
        if state and state.keys() <= {"step", *_MOMENTS} and carry is not None and fresh is not None:
            optimizer.state[fresh] = {
                k: shaped(carry(v.flatten(1), _MOMENTS[k]), v) if k in _MOMENTS and v is not None else v
                for k, v in state.items()
            }


def shaped(matrix: Tensor, like: Tensor) -> Tensor:
    """`matrix` with the kernel of `like`, a factor of a convolution; of a linear map, as it is."""
    return matrix.reshape(len(matrix), -1, *like.shape[2:]) if like.dim() > 2 else matrix


def _home(optimizer: Optimizer, model: nn.Module, group: str) -> dict[str, Any] | None:
    """The group that a Parameter without predecessor joins."""
    for entry in optimizer.param_groups:
        if entry.get("name") == group:
            return entry
    factors = {id(p) for site in sites(model) if site.present for p in (site.A, site.B)}
    return next((g for g in optimizer.param_groups if any(id(p) in factors for p in g["params"])), None)


def sort_groups(model: nn.Module) -> None:
    """Put the optimizers' groups in model order: checkpoints know parameters by position, new ones come at the end."""
    peft = adapted(model)
    order = {id(p): i for i, p in enumerate(peft.parameters())}
    for optimizer in _optimizers.get(peft, ()):
        for entry in optimizer.param_groups:
            entry["params"].sort(key=lambda p: order.get(id(p), len(order)))


@torch.no_grad()
def truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best factors of rank `rank` ≤ r for the product BA.

    The split is A' = Vᵀ Q_Aᵀ, B' = Q_B U S: with the balanced √S split both factors would vanish where BA = 0, and with
    them every gradient.

    Args:
        A: (r, in). B: (out, r).
    Returns:
        A' (rank, in), B' (out, rank), and the maps L (rank, r), R (r, rank) with A' = L A and B' = B R.
    """
    QB, RB = torch.linalg.qr(B.double())
    QA, RA = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(RB @ RA.T)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    L, R = Vh @ torch.linalg.pinv(RA).T, torch.linalg.pinv(RB) @ (U * S)
    return (Vh @ QA.T).to(A.dtype), ((QB @ U) * S).to(B.dtype), L.to(A.dtype), R.to(B.dtype)


@torch.no_grad()
def extend(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of rank `rank` ≥ r with the same product, bit for bit: A gains unit rows orthogonal to its own, B zeros.

    Args:
        A: (r, in). B: (out, r).
    """
    more = rank - A.shape[0]
    basis = torch.linalg.qr(A.double().T)[0]  # (in, r)
    draw = torch.randn(A.shape[1], more, dtype=torch.float64).to(A.device)  # from the CPU's stream: checkpoints keep it
    for _ in range(2):  # the second pass removes what rounding left of A's row space
        draw = torch.linalg.qr(draw - basis @ (basis.T @ draw))[0]
    return torch.cat([A, draw.T.to(A.dtype)]), torch.cat([B, B.new_zeros(B.shape[0], more)], dim=1)


def fresh_A(rank: int, like: Tensor, in_features: int) -> Tensor:
    """A as LoRA starts it (Kaiming uniform with a = √5, PEFT's default), shape (rank, in)."""
    A = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=sqrt(5))
    return A.to(device=like.device, dtype=like.dtype)


def resize(model: nn.Module, plan: Mapping[str, int], optimizer: Optimizer | None = None) -> dict[str, int]:
    """Give the sites of `plan` their new ranks, in the model, in PEFT's records and in the optimizers.

    The scale s = alpha / r0 of a site stays, so its alpha becomes s·r. Sites whose rank does not change are not
    touched, nor are their moments.

    Args:
        model: a model with LoRA adapters, from rankwise or from PEFT alone.
        plan: a RankPlan, or a plain dict of site name -> rank.
        optimizer: an optimizer that is not known yet; SimplexAdam makes itself known.
    Returns:
        The ranks that changed.
    Raises:
        InputError: an unknown site, a rank below 0 or above min(in, out), a plan that empties every site, a site that
            is merged into its base weight at the moment (`merge_adapter`), one with gates or a residual start of
            PEFT's, a layer that is no plain LoRA, or one that cannot be emptied as the plan says. The model is then as
            it was.
    """
    peft = adapted(model)
    if optimizer is not None:
        follow(peft, optimizer)
    plan = plan if isinstance(plan, RankPlan) else RankPlan(plan)
    here = {site.name: site for site in sites(peft)}
    _check(peft, here, plan)
    changed = {name: r for name, r in plan.items() if r != here[name].rank or (plan.restart and r > 0)}
    for name, rank in sorted(changed.items(), key=lambda change: change[1] == 0):  # a returning site looks at others
        site = here[name]
        if rank == 0:
            empty(peft, site, plan.empty)
        elif not site.present:
            _refill(peft, site, rank)
        else:
            _change(peft, site, rank, plan)
    if changed:
        sort_groups(peft)
        record(peft)
    return changed


def _check(model: PeftModel, here: dict[str, Site], plan: RankPlan) -> None:
    begun = peft_residual_start(model, model.active_adapter)
    for name, rank in plan.items():
        if name not in here:
            if why := peculiar(model, name):
                raise InputError(f"{name} {why}, so its rank cannot change: leave it out of the plan")
            raise InputError(f"the plan names {name!r}, which is no site of this model")
        site = here[name]
        limit = max(site.limit, site.rank)  # an adapter from elsewhere may be larger than it need be
        if not 0 <= rank <= limit:
            raise InputError(f"rank {rank} does not fit {name}: it must be 0 to {limit}")
        if rank != site.rank or plan.restart:
            if begun:
                raise InputError(
                    f"{name} started as PEFT's {begun}, taken out of W at rank {site.rank}, which must stay: turn the "
                    "adapter into plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
                )
            if site.gates is not None:
                raise InputError(f"{name} has gates, which say its rank: fold the model first (method.fold(model))")
            if site.adapter in site.layer.merged_adapters:
                raise InputError(f"{name} is merged into its base weight: call unmerge_adapter() before a rank change")
            if rank == 0 and site.present:
                _check_emptying(model, site, plan.empty)
    if here and not any(plan.get(name, site.rank) for name, site in here.items()):
        raise InputError("the plan leaves no site with any rank; PEFT can neither train nor save such an adapter")


def _check_emptying(model: PeftModel, site: Site, how: str) -> None:
    if site.adapter in site.layer.lora_variant or site.layer.lora_B[site.adapter].bias is not None:
        raise InputError(f"{site.name} has more than A and B (lora_bias, DoRA or another variant): it cannot go")
    begun = start(site)
    if begun is not None and begun.A is not None:
        raise InputError(f"{site.name} has a residual start, so W lacks what the site began with: it cannot go")
    if how == "merge":
        check_own(model.get_base_model(), f"{site.name}.base_layer")


def _change(model: PeftModel, site: Site, rank: int, plan: RankPlan) -> None:
    A, B = site.A.detach().flatten(1), site.B.detach().flatten(1)
    r = site.rank
    carry_A: Carry | None = None
    carry_B: Carry | None = None
    if plan.restart or plan.change == "reinit":
        new_A, new_B = fresh_A(rank, A, site.in_features), B.new_zeros(site.out_features, rank)
    elif rank > r:
        new_A, new_B = extend(A, B, rank)
        carry_A = lambda m, _: torch.cat([m, m.new_zeros(rank - r, m.shape[1])])  # noqa: E731
        carry_B = lambda m, _: torch.cat([m, m.new_zeros(m.shape[0], rank - r)], dim=1)  # noqa: E731
    else:
        new_A, new_B, L, R = truncate(A, B, rank)
        # ∂L/∂A' = Rᵀ ∂L/∂A and ∂L/∂B' = ∂L/∂B Lᵀ; the second moments follow with squared entries, as if independent.
        carry_A = lambda m, second: (R.square() if second else R).T @ m  # noqa: E731
        carry_B = lambda m, second: m @ (L.square() if second else L).T  # noqa: E731
    if plan.moments == "reset":
        carry_A = carry_B = None
    replace(model, *site.A_owner, new_A, carry=carry_A)
    replace(model, *site.B_owner, new_B, carry=carry_B)
    set_sizes(site, rank)


def set_sizes(site: Site, rank: int) -> None:
    """Write the rank that the factors of a site have into its layers, and the alpha that keeps its scale."""
    A, B = site.layer.lora_A[site.adapter], site.layer.lora_B[site.adapter]
    if is_convolution(A):
        A.out_channels = B.in_channels = rank
    else:
        A.out_features = B.in_features = rank
    site.layer.r[site.adapter] = rank
    site.layer.lora_alpha[site.adapter] = alpha(site, rank)


def empty(model: PeftModel, site: Site, how: str) -> None:
    """Take the factors of a site away; `merge` adds their product to W first, `drop` does not."""
    if how == "merge":
        A, B = site.layer.lora_A[site.adapter].weight, site.B
        merge(site, Merged(A.detach().flatten(1).clone(), B.detach().flatten(1).clone()))
    layer, adapter = site.layer, site.adapter
    scaling = site.scaling
    replace(model, *site.A_owner, None)
    replace(model, *site.B_owner, None)
    for part in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.r, layer.lora_alpha, layer.scaling):
        del part[adapter]
    layer.__dict__.setdefault("lora_empty", {})[adapter] = scaling  # what a return needs to know


def _refill(model: PeftModel, site: Site, rank: int) -> None:
    layer, adapter = site.layer, site.adapter
    config: Any = model.peft_config[adapter]
    scaling = layer.lora_empty.pop(adapter)
    weight = layer.get_base_layer().weight
    # As the other sites are, in their dtype (PEFT keeps adapters in fp32) and frozen where they are.
    other = next(s for s in sites(model) if s.present)
    like = torch.empty(0, device=weight.device, dtype=other.B.dtype)
    A, B = _factors(site, rank)
    shape_A, shape_B = A.weight.shape, B.weight.shape
    A._parameters["weight"] = B._parameters["weight"] = None
    layer.lora_A[adapter], layer.lora_B[adapter] = A, B
    dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
    layer.lora_dropout[adapter] = dropout.train(layer.training)
    layer.scaling[adapter] = scaling
    fresh = fresh_A(rank, like, site.in_features).reshape(shape_A)
    replace(model, A, "weight", fresh, group="adapter", trains=other.A.requires_grad)
    replace(model, B, "weight", torch.zeros(shape_B).to(like), group="adapter", trains=other.B.requires_grad)
    set_sizes(site, rank)
    if omega(model) is not None:
        index = [s.name for s in sites(model)].index(site.name)
        put_scale(site, omega_of(model, site, index))


def _factors(site: Site, rank: int) -> tuple[Any, Any]:
    """The layers that PEFT puts on a site for A and B."""
    base: Any = site.layer.get_base_layer()
    if not is_convolution(base):
        return nn.Linear(site.in_features, rank, bias=False), nn.Linear(rank, site.out_features, bias=False)
    kind = type(base)
    A = kind(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
    return A, kind(rank, base.out_channels, 1, bias=False)


class Merged(nn.Module):
    """The factors of a site that was emptied into W: A (r, in) with its scale, B (out, r). A checkpoint keeps them."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)


@torch.no_grad()
def merge(site: Site, factors: Merged) -> None:
    """Add s·BA to W, and remember the factors under the layer, since no adapter file holds W."""
    _add_product(site, factors.A, factors.B, 1)
    if not hasattr(site.layer, "lora_merged"):
        site.layer.lora_merged = nn.ModuleDict()
    if site.adapter not in site.layer.lora_merged:
        site.layer.lora_merged[site.adapter] = nn.ModuleList()
    site.layer.lora_merged[site.adapter].append(factors)


def _add_product(site: Site, A: Tensor, B: Tensor, sign: int) -> None:
    weight = site.layer.get_base_layer().weight
    delta = sign * site.scaling * (B @ A)
    weight += (delta.T if isinstance(site.layer.get_base_layer(), Conv1D) else delta.reshape(weight.shape)).to(weight)


def merged_into(site: Site) -> list[Any]:
    """The factors that were merged into the site's weight, the first ones first."""
    kept = getattr(site.layer, "lora_merged", {})
    return list(kept[site.adapter]) if site.adapter in kept else []


@torch.no_grad()
def match_merged(site: Site, wanted: list[Merged]) -> None:
    """Take out of W what was merged since (up to rounding), and merge what is missing."""
    have = merged_into(site)
    same = 0
    for a, b in zip(have, wanted, strict=False):
        if not (torch.equal(a.A, b.A.to(a.A.device)) and torch.equal(a.B, b.B.to(a.B.device))):
            break
        same += 1
    for factors in reversed(have[same:]):
        _add_product(site, factors.A, factors.B, -1)
    if have:
        site.layer.lora_merged[site.adapter] = nn.ModuleList(have[:same])
    for factors in wanted[same:]:
        merge(site, factors.to(site.layer.get_base_layer().weight.device))


def merged(model: nn.Module) -> list[str]:
    """Names of the sites whose product was merged into the base weight."""
    return [s.name for s in sites(model) if merged_into(s)]


def record(model: PeftModel) -> None:
    """Write the ranks into PEFT's own configuration."""
    found = {s.name: (s.rank, alpha(s, s.rank)) for s in sites(model)}
    write_ranks(model.peft_config[model.active_adapter], found, model)


def alpha(site: Site, rank: int) -> float:
    """What PEFT has to be told as alpha so that the site, at this rank, keeps its scale s."""
    rslora = site.present and getattr(site.layer, "use_rslora", {}).get(site.adapter, False)
    return site.scaling * (sqrt(rank) if rslora else rank)


def write_ranks(config: Any, found: Mapping[str, tuple[int, float]], model: PeftModel) -> None:
    """Write (rank, alpha) by site of `model` into a PEFT configuration, so that stock PEFT builds the same adapter.

    What the configuration says otherwise stays as far as it is still true: what others have written of these sites, and
    all that is about layers which are no sites. Where it would put an adapter on a site of rank 0, or none on one that
    has rank, the layers with one are named one by one, and nothing is excluded: in a weighted sum of adapters PEFT
    excludes from all of them what the first one excludes.
    """
    layers, adapter = dict(model.get_base_model().named_modules()), model.active_adapter
    others = [
        _called(name, layer) for name, layer in layers.items() if isinstance(layer, LoraLayer) and adapter in layer.r
    ]
    others = [name for name in others if name not in {*found, *(site.name for site in sites(model))}]
    here = {name: values for name, values in found.items() if values[0]}
    ranks, alphas = ({name: values[part] for name, values in here.items()} for part in (0, 1))
    parts = {
        f"^{re.escape(site.name)}" for site in sites(model) if site.name not in found
    }  # what is saved is the whole
    patterns = [
        {key: value for key, value in (pattern or {}).items() if key not in parts}
        for pattern in (config.rank_pattern, config.alpha_pattern)
    ]
    config.rank_pattern = _pattern(patterns[0], config.r, ranks, found, others)
    config.alpha_pattern = _pattern(patterns[1], config.lora_alpha, alphas, found, others)
    if all(bool(check_target_module_exists(config, name)) == (name in here) for name in found):
        return
    names = [*here, *(name for name in others if check_target_module_exists(config, name))]
    also = any(other.endswith(f".{name}") for name in names for other in layers.keys() - {*names})
    # PEFT looks for a name of a list at the ends of names, and for a pattern in the whole of one.
    config.target_modules = "|".join(map(re.escape, names)) if also else names
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _called(name: str, layer: Any) -> str:
    """What PEFT's configuration calls an adapted layer, or the parameter of one."""
    name = name.replace(".base_layer", "")
    return f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def _pattern(
    pattern: Mapping[str, float],
    default: float,
    values: Mapping[str, float],
    found: Collection[str],
    others: Sequence[str],
) -> dict[str, Any]:
    """`pattern`, changed so that PEFT reads the `values` of sites in it, and of all else what it has read before.

    Of several keys that match PEFT takes the first, and it writes them in the order of their letters. Our keys are
    anchored, since PEFT looks for others at the ends of names. A key of others goes where it decides for sites alone
    and wrongly for each, or would come before ours.

    Args:
        values: by site with rank. found: all sites.
        others: names of adapted layers that are no sites.
    """

    def key(name: str) -> str:
        return get_pattern_key(sorted(kept), name)

    def right(name: str) -> bool:
        return isclose(kept.get(key(name), default), true[name])

    own = {name: f"^{re.escape(name)}" for name in (*found, *others)}
    kept = {key: value for key, value in pattern.items() if key not in [own[name] for name in found]}
    true = {name: pattern.get(get_pattern_key([*pattern], name), default) for name in others} | dict(values)
    while True:  # without a key another one may decide
        needed = {key(name) for name in true if right(name)}
        idle = {key(name) for name in found} & kept.keys() - needed - {key(name) for name in others}
        idle |= {key(name) for name in true if not right(name) and key(name) in kept and key(name) < own[name]}
        if not idle:
            break
        kept = {key: value for key, value in kept.items() if key not in idle}
    kept |= {own[name]: value for name, value in true.items() if not right(name)}
    return dict(sorted(kept.items()))


# --- starts that W or the loss must remember -------------------------------------------------------------------------


class Start(nn.Module):
    """B0 (out, r) of a site, and A0 (r, in) where s B0 A0 was taken out of W: a residual start. Checkpoints keep it.

    `by_peft` says that PEFT took it out, and does so again when it loads what it has written.
    """

    A: Tensor | None
    B: Tensor

    def __init__(self, A: Tensor | None, B: Tensor, by_peft: bool = False):
        super().__init__()
        self.by_peft = by_peft
        self.register_buffer("A", A)
        self.register_buffer("B", B)


def start(site: Site) -> Start | None:
    """How the site started, if that is remembered."""
    return dict(getattr(site.layer, "lora_start", {})).get(site.adapter)


def subtracted(model: PeftModel) -> list[str]:
    """The adapters, active or not, whose start was taken out of W."""
    found: dict[str, None] = {}
    for module in model.modules():
        for adapter, begun in getattr(module, "lora_start", {}).items():
            if begun.A is not None:
                found[adapter] = None
    return list(found)


def peft_residual_start(model: PeftModel, adapter: str) -> str:
    """PEFT's own start of `adapter`, where it took something out of W that the model does not remember; else empty."""
    begun = str(getattr(model.peft_config[adapter], "init_lora_weights", ""))
    return begun if begun.lower().startswith(RESIDUAL) and adapter not in subtracted(model) else ""


@torch.no_grad()
def set_start(model: nn.Module, site: Site, A: Tensor | None, B: Tensor, subtracted: bool = False) -> None:
    """Remember B as B0, and, where A is given, take s·BA out of W.

    Args:
        A: (r, in). B: (out, r).
        subtracted: somebody, such as PEFT's PiSSA, has taken it out of W already.
    """
    if A is not None and not subtracted:
        _add_product(site, A, B, -1)
    if not hasattr(site.layer, "lora_start"):
        site.layer.lora_start = nn.ModuleDict()
    site.layer.lora_start[site.adapter] = Start(
        None if A is None else A.detach().clone(), B.detach().clone(), subtracted
    )


@torch.no_grad()
def match_start(model: PeftModel, site: Site, A: Tensor | None, B: Tensor | None) -> None:
    """Give the site the start (A, B), or none, and W what follows (up to rounding, unless it is the same start)."""
    have = start(site)
    if have is not None and B is not None and _equal(have.A, A) and _equal(have.B, B):
        return
    if have is not None:
        if have.A is not None:
            _add_product(site, have.A, have.B, 1)
        del site.layer.lora_start[site.adapter]
    if B is not None:
        device = site.layer.get_base_layer().weight.device
        set_start(model, site, None if A is None else A.to(device), B.to(device))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b.to(a))


# --- scales: on for a search, folded away after it -------------------------------------------------------------------


def put_scale(site: Site, scale: Scale) -> None:
    """Parametrize A. The stored A stays the Parameter it was."""
    linear: Any = site.layer.lora_A[site.adapter]
    A = linear.weight
    parametrize.register_parametrization(linear, "weight", scale, unsafe=True)
    # torch copied A into a Parameter of its own; the optimizers know the first one.
    linear.parametrizations.weight.register_parameter("original", A)


def omega_of(model: PeftModel, site: Site, index: int) -> Omega:
    """The scale of `site`, the entry `index` of ω."""
    return Omega(getattr(model.base_model, OMEGA), site.adapter, index)


@torch.no_grad()
def copy_scale(site: Site, adapter: str) -> None:
    """Give another adapter on the layer of `site` the scale that it has, as it is now; it does not train."""
    scale = site.scale
    if isinstance(scale, Gates):
        made: Scale = Gates(scale.gates.detach().clone())
    elif isinstance(scale, Omega):
        omegas, own, index = scale.source
        if adapter not in omegas:
            omegas[adapter] = omegas[own].detach().clone()
        made = Omega(omegas, adapter, index)
        omegas[adapter].requires_grad_(False)
    else:
        return
    put_scale(Site(site.name, site.layer, adapter), made.requires_grad_(False))


@torch.no_grad()
def add_gates(model: nn.Module, draw: Callable[[int], Tensor]) -> None:
    """Give every site gates; `draw` makes those of a site, shape (r,), from its rank."""
    for site in sites(adapted(model)):
        if site.present:
            put_scale(site, Gates(draw(site.rank).to(site.B)))


def add_omega(model: nn.Module) -> nn.Parameter:
    """Give every site a scale ω_i = 1, entries of one (n,) fp32 parameter that the model owns."""
    peft = adapted(model)
    here = sites(peft)
    if not hasattr(peft.base_model, OMEGA):
        setattr(peft.base_model, OMEGA, nn.ParameterDict())
    omegas = getattr(peft.base_model, OMEGA)
    device = next(s.B.device for s in here if s.present)
    replace(peft, omegas, peft.active_adapter, torch.ones(len(here), device=device), group="omega")
    omegas._keys[peft.active_adapter] = None
    for index, site in enumerate(here):
        if site.present:
            put_scale(site, omega_of(peft, site, index))
    return omegas[peft.active_adapter]


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Move every scale into its B and take it away: plain LoRA with the same outputs. Nothing happens without scales.

    Units of rank whose gate is 0 are cut, and a site without any other is emptied. Where no site has a live unit, the
    first one keeps a unit whose product is 0, since PEFT knows no adapter without sites.
    """
    peft = adapted(model)
    here = [site for site in sites(peft) if site.scale is not None]
    kept = dict(zip([site.name for site in here], kept_units(here), strict=True))
    for site in here:
        _fold_one(peft, site, kept[site.name])
    if omega(peft) is not None:
        omegas = getattr(peft.base_model, OMEGA)
        replace(peft, omegas, peft.active_adapter, None)
        del omegas[peft.active_adapter]
    if here:
        sort_groups(peft)
        record(peft)


def kept_units(here: Sequence[Site]) -> list[Tensor]:
    """For each site the indices of the units that a fold keeps: those whose gate is not 0, all without gates."""
    kept = [
        torch.arange(s.rank, device=s.B.device) if s.gates is None else s.gates.flatten().nonzero().flatten()
        for s in here
    ]
    if kept and not any(len(units) for units in kept):
        kept[0] = torch.zeros(1, dtype=torch.long, device=kept[0].device)
    return kept


def _fold_one(model: PeftModel, site: Site, units: Tensor) -> None:
    """B' = B diag(g) or ωB, so ∂L/∂B' is ∂L/∂B / g: B's moments follow it; those of A, whose gradient stays, stay."""
    scale, linear, A = site.scale, site.layer.lora_A[site.adapter], site.A
    assert scale is not None
    values = scale.value.detach().to(site.B.dtype).expand(site.rank, 1).T[:, units]  # (1, units)

    def carry(moment: Tensor, second: bool) -> Tensor:
        return moment[:, units] / (values.square() if second else values)

    if isinstance(scale, Gates):
        replace(model, scale, "gates", None)
    _bare(linear, A)
    if not len(units):
        empty(model, site, "drop")
        return
    B = site.B.detach().flatten(1)[:, units] * values
    replace(model, *site.B_owner, B, carry=carry if values.abs().min() > 1e-6 else None)
    if len(units) < site.rank:
        replace(model, *site.A_owner, A.detach().flatten(1)[units], carry=lambda moment, _: moment[units])
        set_sizes(site, len(units))


def _bare(linear: nn.Module, A: nn.Parameter) -> None:
    """Take the parametrization off, leaving the Parameter that the optimizers know.

    torch's own way also takes `weight` off the class that it has made for `linear`, which deep copies share.
    """
    linear.__class__ = type(linear).__bases__[0]
    del linear.parametrizations
    linear.register_parameter("weight", A)


# --- a state dict brings its own structure ---------------------------------------------------------------------------


def follow_state_dict(model: PeftModel) -> None:
    """Make `model.load_state_dict` re-rank the model first, whoever calls it.

    Trainer's resume, Trainer's best model, PEFT's `load_adapter` and a bare loop all end there, so one hook serves all.
    A state that holds factors of the active adapter is taken as the whole of it: sites that it leaves out are emptied.
    One without any (a head, the base weights, another adapter) changes no rank.
    """
    model.register_load_state_dict_pre_hook(_match)


def _match(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give `model` the ranks, the ω and the merged products that `state` was saved with. Values follow from loading."""
    peft = adapted(model)
    adapter = peft.active_adapter
    # PEFT writes keys without the adapter's name, and on loading names those it finds in the model as it is now.
    names = "|".join(map(re.escape, peft.peft_config))
    nameless = re.compile(rf"\.lora_(?:A|B|omega|merged|start)(?=\.|$)(?!\.(?:{names})(?:\.|$))")
    for old in [key for key in state if nameless.search(key)]:
        state[nameless.sub(lambda found: f"{found[0]}.{adapter}", old)] = state.pop(old)

    def key(site: Site, part: str) -> str:
        return f"{prefix}base_model.model.{site.name}.{part}"

    stored = {site.name: state.get(key(site, f"lora_B.{adapter}.weight")) for site in sites(peft)}
    wanted = {name: 0 if B is None else B.shape[1] for name, B in stored.items()}
    if not any(wanted.values()):
        return  # not about this adapter: a head alone, or the base weights
    gates = f"lora_A.{adapter}.parametrizations.weight.0.gates"
    gated = any(key(site, gates) in state for site in sites(peft))
    scaled = f"{prefix}base_model.{OMEGA}.{adapter}" in state
    if Structure.of(peft).scaled and not scaled and not (gated and Structure.of(peft).ranks == wanted):
        fold(peft)
    resize(peft, RankPlan(wanted, change="reinit"))
    if scaled and omega(peft) is None:
        add_omega(peft)
    if gated and not Structure.of(peft).scaled:
        add_gates(peft, torch.ones)
    for site in sites(peft):
        A0, B0 = (state.get(key(site, f"lora_start.{adapter}.{part}")) for part in "AB")
        match_start(peft, site, A0, B0)
        products: list[Merged] = []
        while (A := state.get(key(site, f"lora_merged.{adapter}.{len(products)}.A"))) is not None:
            B = state[key(site, f"lora_merged.{adapter}.{len(products)}.B")]
            products.append(Merged(A.clone(), B.clone()))
        match_merged(site, products)


@dataclass(frozen=True)
class Structure:
    """What a checkpoint's optimizer state refers to: the ranks by site, and whether scales were on."""

    ranks: dict[str, int]
    scaled: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Structure":
        here = sites(model)
        scaled = any(s.gates is not None for s in here) or (bool(here) and omega(model) is not None)
        return cls({s.name: s.rank for s in here}, scaled)
