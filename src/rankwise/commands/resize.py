"""Adapters on disk made smaller, and what is said about it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.adapters.card import CARD
from rankwise.adapters.cut import Cut, Limit, cut
from rankwise.adapters.layers import StoredAdapter
from rankwise.adapters.mix import Mixed
from rankwise.adapters.stored import check_free, stored
from rankwise.errors import InputError
from rankwise.files import write_whole
from rankwise.pictures.heat import rank_picture
from rankwise.pictures.style import svg
from rankwise.results.formats import plain

if TYPE_CHECKING:
    from rankwise.sweep.check import Source


@dataclass(frozen=True)
class Resized(Cut):
    """An adapter before and after, in words."""

    on_data: bool = False

    def as_json(self) -> dict[str, Any]:
        """All numbers, with totals; the shares of energy lost are on data if there were any."""
        return {**asdict(self), "before": self.before, "parameters": self.parameters}

    def text(self) -> str:
        """A table with a line for each layer, and what it comes to."""
        header = ["layer", "rank before", "rank", "parameters", "norm of ΔW", "error"]
        if self.on_data:
            header.append("energy lost on data")
        rows = [
            [
                site.site,
                str(site.before),
                str(site.rank),
                f"{site.parameters:,}",
                f"{site.norm:.4g}",
                percent(site.error / site.norm if site.norm else 0.0),
                *([percent(site.loss)] if self.on_data else []),
            ]
            for site in self.sites
        ]
        return "\n".join([plain(header, rows), "", *self._total()])

    def _total(self) -> Iterator[str]:
        share = f" ({100 * self.parameters / self.before:.1f} %)" if self.parameters < self.before else ""
        if not share:
            yield f"{self.before:,} parameters are within the limit already, so every rank stays as it is"
        else:
            yield f"{self.before:,} parameters before, {self.parameters:,} after{share}"
        if self.fixed:
            yield f"{self.fixed:,} of them are in layers whose rank cannot change"
        kept = percent(1 - self.loss)
        yield f"error {percent(self.error)} of ‖ΔW‖; {kept} of the energy{' on data' if self.on_data else ''} is kept"
        if self.uniform and share:
            rank, loss = self.uniform
            yield f"rank {rank} in every layer, the most that as many parameters allow, would keep {percent(1 - loss)}"
        if empty := sum(not site.rank for site in self.sites):
            yield f"{empty} of {len(self.sites)} layers have no rank left and are no longer adapted"

    def save_picture(self, file: str | PathLike[str]) -> Path:
        """Draw the ranks after the cut, projections down and layers across, as an SVG file."""
        title = f"Ranks at {self.parameters:,} of {self.before:,} parameters"
        return save_ranks({site.site: site.rank for site in self.sites}, title, Path(file))


def save_ranks(ranks: Mapping[str, int], title: str, file: Path) -> Path:
    """Draw ranks by module name. In kohya's names, which have `_` for each dot, those around numbers become dots."""
    dotted = {re.sub(r"_(\d+)_", r".\1.", name) if "." not in name else name: rank for name, rank in ranks.items()}
    write_whole(file, svg(rank_picture(dotted, title)))
    return file


def percent(share: float) -> str:
    """A share in percent; small ones keep their digits."""
    value = 100 * share
    return f"{value:.2f} %" if value >= 0.01 or value < 1e-9 else f"{value:.1e} %"


def resize_adapter(
    adapter: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    budget: int | None = None,
    rank: int | None = None,
    keep_energy: float | None = None,
    bytes: int | None = None,
    data: Source | None = None,
    settings: Sequence[str] = (),
    force: bool = False,
) -> Resized:
    """The closest smaller adapter within a limit, without its base model: no other ranks have a smaller ‖ΔW - ΔW'‖.

    Args:
        adapter: the folder of a PEFT adapter, whoever trained it, or of a run; or a safetensors file of kohya's,
            diffusers' or ComfyUI's.
        out: where to write it, in the same format; nothing is written without it.
        budget: the most parameters of A and B. rank: the largest rank of a layer. keep_energy: the share of Σ‖ΔW‖² to
            keep, at the fewest parameters. bytes: the most bytes of the weights file. Exactly one of them is given.
        data, settings: of a run. The base model is then loaded, and the cut changes what the layers output on its
            training rows as little as possible, E‖(ΔW - ΔW')x‖²; `keep_energy` is a share of E‖ΔW x‖².
        force: replace an adapter that is there already.
    Raises:
        InputError: the limit leaves no rank, or the adapter cannot be cut: it is more than LoRA, damaged, or has
            numbers that are not finite.
    """
    limit = Limit(budget, rank, keep_energy, bytes)
    limit.check()
    found = stored(adapter)
    if out is not None:
        _check_out(Path(out), [found], force)
    moments = None
    if data is not None:
        from rankwise.commands.moments import roots

        moments = roots(found, data, settings)
    done = cut(found, found, limit, Path(out) if out is not None else None, moments, force)
    return Resized(**vars(done), on_data=data is not None)


def _check_out(out: Path, sources: Sequence[StoredAdapter], force: bool) -> None:
    """Raise InputError unless `out` can be written, and is not what is read meanwhile."""
    check_free(out, sources[0], force)
    if out.exists() and any(out.samefile(source.path) for source in sources):
        raise InputError(f"{out}: is read while the new one is written: give another name")


def weights(given: Sequence[str]) -> dict[str | PathLike[str], float]:
    """Adapters with their weights, written as a:0.7. InputError where one is not, or is there twice."""
    found: dict[str | PathLike[str], float] = {}
    for each in given:
        path, _, weight = each.rpartition(":")
        try:
            value = float(weight)
        except ValueError:
            path = ""
        if not path or path in found:
            raise InputError(f"{each}: give each adapter once, with its weight after a colon, as in a:0.7 b:0.3")
        found[path] = value
    return found


def mix(
    adapters: Mapping[str | PathLike[str], float],
    out: str | PathLike[str],
    *,
    budget: int | None = None,
    rank: int | None = None,
    keep_energy: float | None = None,
    force: bool = False,
) -> Resized:
    """The sum Σ w ΔW of adapters as one, without their base model: exact, or the closest within a limit.

    Args:
        adapters: each with its weight w; the sum is written in the format of the first.
        out, budget, rank, keep_energy, force: as for `resize_adapter`.
    Raises:
        InputError: as for `resize_adapter`; or they differ in base model, format, shapes or heads.
    """
    weights = {Path(path): weight for path, weight in adapters.items()}
    if not all(isfinite(weight) and weight for weight in weights.values()) or not weights:
        raise InputError("give each adapter with a weight that is not 0, as in A:0.7 B:0.3")
    mixed = Mixed([(stored(path), weight) for path, weight in weights.items()])
    mixed.check()
    _check_out(Path(out), [adapter for adapter, _ in mixed.parts], force)
    given = any(each is not None for each in (budget, rank, keep_energy))
    limit = Limit(budget, rank, keep_energy) if given else Limit(rank=sys.maxsize)
    done = cut(mixed, mixed.parts[0][0], limit, Path(out), force=force)
    if len(mixed.parts) > 1 and Path(out).is_dir():
        (Path(out) / CARD).unlink(missing_ok=True)  # it tells how the first one was trained and what it scores
    return Resized(**vars(done))
