"""A state dict brings its own ranks, scales, merged products and starts: loading one gives them to the model first."""

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
    """Make `model.load_state_dict` re-rank the model first, whoever calls it.

    Trainer's resume, Trainer's best model, PEFT's `load_adapter` and a bare loop all end there, so one hook serves all.
    A state that holds factors of the active adapter is taken as the whole of it: sites that it leaves out are emptied.
    One without any (a head, the base weights, another adapter) changes no rank.
    """
    model.register_load_state_dict_pre_hook(_match)


def _match(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give `model` the ranks, the ω and the merged products that `state` was saved with. Values follow from loading."""
    peft = peft_model(model)
    adapter = peft.active_adapter
    # PEFT writes keys without the adapter's name, and on loading names those it finds in the model as it is now.
    names = "|".join(map(re.escape, peft.peft_config))
    nameless = re.compile(rf"\.lora_(?:A|B|omega|merged|start)(?=\.|$)(?!\.(?:{names})(?:\.|$))")
    for old in [key for key in state if nameless.search(key)]:
        state[nameless.sub(lambda match: f"{match[0]}.{adapter}", old)] = state.pop(old)

    def key(site: Site, part: str) -> str:
        return f"{prefix}base_model.model.{site.name}.{part}"

    factors = {site.name: state.get(key(site, f"lora_B.{adapter}.weight")) for site in sites(peft)}
    wanted = {name: 0 if B is None else B.shape[1] for name, B in factors.items()}
    if not any(wanted.values()):
        return  # not about this adapter: a head alone, or the base weights
    stored = next((kind for kind in KINDS if kind.stored(state, prefix, peft)), None)
    now = Structure.of(peft)
    if now.scaled and not (stored and (now.ranks == wanted or not stored.says_ranks)):
        fold(peft)
    resize(peft, RankPlan(wanted, change="reinit"))
    if stored and not Structure.of(peft).scaled:
        stored.put_on(peft)
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
    """What a checkpoint's optimizer state refers to: the ranks by site, and whether scales were on."""

    ranks: dict[str, int]
    scaled: bool

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        all_sites = sites(model)
        return cls({site.name: site.rank for site in all_sites}, any(site.scale is not None for site in all_sites))
