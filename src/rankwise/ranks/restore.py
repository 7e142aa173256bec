"""Loading a state dict first gives the model its ranks, scales, merged products and starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rankwise.ranks.fold import fold
from rankwise.ranks.kept import MergedProduct, restore_products, restore_start
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.resize import resize
from rankwise.ranks.scales import KINDS
from rankwise.ranks.sites import Site, peft_model, sites

if TYPE_CHECKING:
    from peft import PeftModel


def follow_state_dict(model: PeftModel) -> None:
    """Make `model.load_state_dict` change the model's ranks first.

    The Trainer's resume and best model, PEFT's `load_adapter` and bare loops all call it, so one hook is enough. If a
    state has factors of the active adapter, sites that it does not have are emptied. A state without any (a head, the
    base weights, another adapter) changes no rank.
    """
    model.register_load_state_dict_pre_hook(_match)


def _match(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give `model` the ranks, scales, starts and merged products of `state`; loading then sets the values."""
    peft = peft_model(model)
    adapter = peft.active_adapter
    # PEFT writes keys without the adapter's name, and on loading adds it only for keys that the model has already.
    names = "|".join(map(re.escape, peft.peft_config))
    nameless = re.compile(rf"\.lora_(?:A|B|omega|merged|start)(?=\.|$)(?!\.(?:{names})(?:\.|$))")
    for old in [key for key in state if nameless.search(key)]:
        state[nameless.sub(lambda match: f"{match[0]}.{adapter}", old)] = state.pop(old)

    def key(site: Site, part: str) -> str:
        return f"{prefix}base_model.model.{site.name}.{part}"

    factors = {site.name: state.get(key(site, f"lora_B.{adapter}.weight")) for site in sites(peft)}
    wanted = {name: 0 if B is None else B.shape[1] for name, B in factors.items()}
    if not any(wanted.values()):
        return  # not this adapter: only a head, or the base weights
    kind = next((kind for kind in KINDS if kind.is_in(state, prefix, peft)), None)
    current = Structure.of(peft)
    if current.scaled and not (kind and (current.ranks == wanted or not kind.sets_rank)):
        fold(peft)
    resize(peft, RankPlan(wanted, change="reinit"))
    if kind and not Structure.of(peft).scaled:
        kind.put_on(peft)
    for site in sites(peft):
        A0, B0 = (state.get(key(site, f"lora_start.{adapter}.{part}")) for part in "AB")
        restore_start(site, A0, B0)
        products: list[MergedProduct] = []
        while (A := state.get(key(site, f"lora_merged.{adapter}.{len(products)}.A"))) is not None:
            B = state[key(site, f"lora_merged.{adapter}.{len(products)}.B")]
            products.append(MergedProduct(A.clone(), B.clone()))
        restore_products(site, products)


@dataclass(frozen=True)
class Structure:
    """What a checkpoint's optimizer state depends on: the ranks by site, and whether there were scales."""

    ranks: dict[str, int]
    scaled: bool

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        all_sites = sites(model)
        return cls({site.name: site.rank for site in all_sites}, any(site.scale is not None for site in all_sites))
