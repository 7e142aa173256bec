"""Ranks and alphas in PEFT's configuration, so that stock PEFT builds the same adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isclose, sqrt
from typing import TYPE_CHECKING, Any

from rankwise.ranks.sites import Site

if TYPE_CHECKING:
    from peft import PeftModel


def record(model: PeftModel, all_sites: Iterable[Site]) -> None:
    """Write the ranks of `all_sites`, those of `model`, into PEFT's own configuration."""
    records = {s.name: (s.rank, alpha(s, s.rank)) for s in all_sites}
    write_ranks(model.peft_config[model.active_adapter], records, model, [*records])


def alpha(site: Site, rank: int) -> float:
    """The alpha with which the site, at this rank, keeps its scale s in PEFT."""
    rslora = site.present and getattr(site.layer, "use_rslora", {}).get(site.adapter, False)
    return site.scaling * (sqrt(rank) if rslora else rank)


def write_ranks(
    config: Any, records: Mapping[str, tuple[int, float]], model: PeftModel, site_names: Sequence[str]
) -> None:
    """Write the (rank, alpha) of each site of `model` into a PEFT configuration, so that PEFT builds the same adapter.

    Of a fused projection, whose parts are sites (`site_names` has all), `records` may have the whole instead.

    The rest of the configuration stays as far as it is still true: other entries about these sites, and all about
    layers that are no sites. If it would put an adapter on a site of rank 0, or none on a site with rank, the adapted
    layers are listed by name, and none is excluded: in a weighted sum PEFT excludes from all adapters what the first
    excludes.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import check_target_module_exists

    layers, adapter = dict(model.get_base_model().named_modules()), model.active_adapter
    adapted = [
        _peft_name(n, layer) for n, layer in layers.items() if isinstance(layer, LoraLayer) and adapter in layer.r
    ]
    known = {*records, *site_names}
    others = [name for name in adapted if name not in known]
    present = {name: values for name, values in records.items() if values[0]}
    ranks, alphas = ({name: values[part] for name, values in present.items()} for part in (0, 1))
    parts = {f"^{re.escape(name)}" for name in site_names if name not in records}  # the whole projection is saved
    patterns = [
        {key: value for key, value in (pattern or {}).items() if key not in parts}
        for pattern in (config.rank_pattern, config.alpha_pattern)
    ]
    config.rank_pattern = _pattern(patterns[0], config.r, ranks, records, others)
    config.alpha_pattern = _pattern(patterns[1], config.lora_alpha, alphas, records, others)
    if all(bool(check_target_module_exists(config, name)) == (name in present) for name in records):
        return
    names = [*present, *(name for name in others if check_target_module_exists(config, name))]
    also = any(other.endswith(f".{name}") for name in names for other in layers.keys() - {*names})
    # PEFT compares the names in a list with the ends of layers' names, and a pattern with the whole name.
    config.target_modules = "|".join(map(re.escape, names)) if also else names
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _peft_name(name: str, layer: Any) -> str:
    """The name of an adapted layer, or of the adapted parameter in it, in PEFT's configuration."""
    from peft.tuners.lora.layer import ParamWrapper

    name = name.replace(".base_layer", "")
    return f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def _pattern(
    pattern: Mapping[str, float],
    default: float,
    values: Mapping[str, float],
    site_names: Collection[str],
    others: Sequence[str],
) -> dict[str, Any]:
    """`pattern`, changed so that PEFT reads the `values` of sites from it, and for other layers what it read before.

    PEFT takes the first key that matches, and writes keys in alphabetical order. Our keys are anchored; PEFT compares
    others with the ends of names. An existing key is removed if it applies only to sites and is wrong for all of them,
    or if it would come before ours.

    Args:
        values: by name of each site with rank. site_names: all sites.
        others: names of adapted layers that are no sites.
    """
    from peft.utils.other import get_pattern_key

    def key(name: str) -> str:
        return get_pattern_key(sorted(kept), name)

    def right(name: str) -> bool:
        return isclose(kept.get(key(name), default), true[name])

    own = {name: f"^{re.escape(name)}" for name in (*site_names, *others)}
    of_sites = {own[name] for name in site_names}
    kept = {key: value for key, value in pattern.items() if key not in of_sites}
    true = {name: pattern.get(get_pattern_key([*pattern], name), default) for name in others} | dict(values)
    while True:  # removing a key may make another one apply
        needed = {key(name) for name in true if right(name)}
        idle = {key(name) for name in site_names} & kept.keys() - needed - {key(name) for name in others}
        idle |= {key(name) for name in true if not right(name) and key(name) in kept and key(name) < own[name]}
        if not idle:
            break
        kept = {key: value for key, value in kept.items() if key not in idle}
    kept |= {own[name]: value for name, value in true.items() if not right(name)}
    return dict(sorted(kept.items()))
