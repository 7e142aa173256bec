"""What `rankwise ranks` shows of an adapter on disk: its ranks, how strong it is at each layer, and next to another."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from rankwise.adapters.layers import StoredAdapter
from rankwise.adapters.overlap import Shared, shared, svd
from rankwise.adapters.stored import stored
from rankwise.commands.resize import percent, save_ranks
from rankwise.errors import InputError, need
from rankwise.results.formats import plain


@dataclass(frozen=True)
class SiteView:
    """One layer of an adapter.

    Attributes:
        rank, cost, parameters: of A and B; cost is for one unit of rank.
        norm: ‖ΔW‖ in the Frobenius norm. top: the largest singular value of ΔW.
        energy: its share of Σ‖ΔW‖² over the layers.
        half, most: how many units of rank, the best ones, have half and 99 % of ‖ΔW‖².
        other_rank: in the other adapter; None without one, 0 where it does not adapt the layer.
        shared: what both do; None without another one, or where one of them adds nothing.
    """

    site: str
    rank: int
    cost: int
    parameters: int
    norm: float
    top: float
    energy: float
    half: int
    most: int
    other_rank: int | None = None
    shared: Shared | None = None


@dataclass(frozen=True)
class AdapterView:
    """The layers of an adapter on disk.

    Attributes:
        fixed: layers that are not among `sites`, as what they do is not B A: in attentions, convolutions with groups.
        rank_correlation, norm_correlation: Spearman's, with the other adapter's ranks and ‖ΔW‖, over all layers
            that one of them adapts; None without another one, or where one of the two has the same at every layer.
    """

    adapter: Path
    sites: list[SiteView]
    fixed: list[str]
    other: Path | None = None
    rank_correlation: float | None = None
    norm_correlation: float | None = None

    def as_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)

    def text(self) -> str:
        """A table with a line for each layer, and the total."""
        header = ["layer", "rank", "parameters", "norm of ΔW", "largest σ", "energy", "half in", "99 % in"]
        if self.other:
            header += ["other rank", "cosine", "outputs", "inputs"]
        rows = [self._row(site) for site in self.sites]
        return "\n".join([plain(header, rows), "", *self._total()])

    def _row(self, site: SiteView) -> list[str]:
        row = [
            site.site,
            str(site.rank),
            f"{site.parameters:,}",
            f"{site.norm:.4g}",
            f"{site.top:.4g}",
            percent(site.energy),
            str(site.half),
            str(site.most),
        ]
        if self.other:
            both = site.shared
            row += [
                str(site.other_rank),
                *(f"{each:.3f}" if both else "" for each in (vars(both).values() if both else "   ")),
            ]
        return row

    def _total(self) -> Iterator[str]:
        adapted = [site for site in self.sites if site.rank]
        yield f"{len(adapted)} layers, {sum(site.parameters for site in adapted):,} parameters"
        if self.fixed:
            yield f"not shown: {', '.join(self.fixed)}"
        if self.other:
            both = [site.shared for site in self.sites if site.shared]
            yield f"{len(both)} layers in common with {self.other}"
            for name in ("cosine", "outputs", "inputs") if both else ():
                yield f"mean {name}: {fmean(getattr(each, name) for each in both):.3f}"
            for what, value in (("ranks", self.rank_correlation), ("norms", self.norm_correlation)):
                said = "none, as one adapter has the same value at every layer" if value is None else f"{value:.3f}"
                yield f"rank correlation (Spearman) of the {what}: {said}"

    def save_picture(self, file: str | PathLike[str]) -> Path:
        """Draw the ranks, projections down and layers across, as an SVG file."""
        ranks = {site.site: site.rank for site in self.sites if site.rank or not self.other}
        return save_ranks(ranks, f"Ranks of {self.adapter.name}", Path(file))


def adapter_ranks(adapter: str | PathLike[str], compare: str | PathLike[str] | None = None) -> AdapterView:
    """The ranks of an adapter on disk and what it does to each layer, and what another one has in common with it.

    Args:
        adapter, compare: the folder of a PEFT adapter or of a run, or a safetensors file of kohya's, diffusers' or
            ComfyUI's.
    Raises:
        InputError: one of them is none of these, has numbers that are not finite, or they have no layer in common.
    """
    one = stored(adapter)
    sites = _sites(one)
    if compare is None:
        return AdapterView(one.path, sites, _fixed(one))
    other = stored(compare)
    if not {*one.names} & {*other.names}:
        raise InputError(f"{one.path} and {other.path} have no layer in common: {one.names[0]}, {other.names[0]}")
    names = list(dict.fromkeys([*one.names, *other.names]))
    others, known = {site.site: site for site in _sites(other)}, {site.site: site for site in sites}
    absent = SiteView("", 0, 0, 0, 0.0, 0.0, 0.0, 0, 0)
    rows = []
    for name in names:
        mine = known.get(name, absent)
        both = shared(one.factors(name), other.factors(name)) if _comparable(one, other, name) else None
        rows.append(
            SiteView(**{**vars(mine), "site": name, "other_rank": others.get(name, absent).rank, "shared": both})
        )
    pairs = [(known.get(name, absent), others.get(name, absent)) for name in names]
    return AdapterView(
        one.path,
        rows,
        _fixed(one),
        other.path,
        _spearman([(mine.rank, its.rank) for mine, its in pairs]),
        _spearman([(mine.norm, its.norm) for mine, its in pairs]),
    )


def _fixed(adapter: StoredAdapter) -> list[str]:
    return [name for name, layer in adapter.layers.items() if layer.fixed]


def _comparable(one: StoredAdapter, other: StoredAdapter, name: str) -> bool:
    if name not in one.layers or name not in other.layers:
        return False
    sizes = [(each.layers[name].size, each.layers[name].kernel) for each in (one, other)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{name} is {sizes[0][0]} in {one.path} but {sizes[1][0]} in {other.path}: not the same model")
    return True


def _sites(adapter: StoredAdapter) -> list[SiteView]:
    values = {name: _values(adapter, name) for name in adapter.names}
    total = sum(float((each**2).sum()) for each in values.values()) or 1.0
    return [
        SiteView(
            site=name,
            rank=adapter.rank(name),
            cost=adapter.cost(name),
            parameters=adapter.rank(name) * adapter.cost(name),
            norm=float((each**2).sum()) ** 0.5,
            top=float(each[0]) if len(each) else 0.0,
            energy=float((each**2).sum()) / total,
            half=_units(each, 0.5),
            most=_units(each, 0.99),
        )
        for name, each in values.items()
    ]


def _values(adapter: StoredAdapter, name: str) -> np.ndarray:
    factors = adapter.factors(name)
    if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
        raise InputError(f"{adapter.path}: {name} has numbers that are NaN or infinite: its training has diverged")
    return svd(factors)[1].numpy()


def _units(values: np.ndarray, share: float) -> int:
    """How many of the largest values have a share of the sum of squares."""
    sums = np.cumsum(values**2)
    return int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1 if len(sums) else 0


def _spearman(pairs: list[tuple[float, float]]) -> float | None:
    columns = list(zip(*pairs, strict=True))
    if any(len(set(column)) < 2 for column in columns):
        return None
    return float(need("scipy.stats", "bench").spearmanr(*columns).statistic)
