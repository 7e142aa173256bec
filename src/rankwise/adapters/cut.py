"""A smaller adapter without its base model: the ranks that lose least of ΔW = s B A, and the factors of those ranks.

With B = Q_B R_B and a root of E[(Ax)(Ax)ᵀ] = L Lᵀ, the error E‖ΔW x - ΔW' x‖² of the best factors of rank r is
s² Σ_{k > r} σ_k² over the singular values of R_B L = U Σ Vᵀ, and the factors are B' = Q_B U_r, A' = U_rᵀ R_B A. Without
data E[xxᵀ] is taken to be the identity: L is then R_Aᵀ of Aᵀ = Q_A R_A, the error is the Frobenius norm of ΔW - ΔW'
(Eckart–Young), and σ are the singular values of B A. The product itself, out × in, is never formed.

Layers are read one at a time, as a large adapter may not fit into memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rankwise.adapters.layers import Factors, StoredAdapter
from rankwise.adapters.stored import check_free, size, stored, write
from rankwise.errors import InputError
from rankwise.ranks.knapsack import cheapest, most_within
from rankwise.ranks.spectrum import squares, triangles

LARGEST = 1e50
"""Numbers from here on count as infinite: their products could not be squared."""


class Source(Protocol):
    """What has layers to cut: an adapter on disk, or a sum of several."""

    @property
    def names(self) -> list[str]: ...

    def factors(self, name: str) -> Factors: ...


@dataclass(frozen=True)
class Limit:
    """How small an adapter becomes; one of these is given.

    Attributes:
        budget: the most parameters in A and B of all layers.
        rank: the largest rank of a layer; no other choice is made.
        keep_energy: the share of Σ‖ΔW‖² to keep, at the fewest parameters.
        bytes: the most bytes of the file of weights, header and all.
    """

    budget: int | None = None
    rank: int | None = None
    keep_energy: float | None = None
    bytes: int | None = None

    def check(self) -> None:
        """Raise InputError unless it has one value, in its range."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise InputError("give exactly one of budget, rank, keep_energy and bytes, which says how small it becomes")
        [(name, value)] = given.items()
        if name == "keep_energy" and not 0 < value <= 1:
            raise InputError(f"keep_energy is a share above 0 and at most 1, not {value:g}")
        if name != "keep_energy" and value < 1:
            raise InputError(f"{name} is {value}: give a number above 0")


@dataclass(frozen=True)
class Spectrum:
    """What the units of rank of one layer are worth.

    Attributes:
        gains: squared singular values of s·B·A, or of its output on data, falling; 0 for rounding noise.
        rank: how many units the layer has. cost: parameters of one. bytes: of one in the file.
        norm: ‖ΔW‖ in the Frobenius norm.
    """

    gains: np.ndarray
    rank: int
    cost: int
    bytes: int
    norm: float


@dataclass(frozen=True)
class CutSite:
    """One layer before and after.

    Attributes:
        site: its name. before, rank: its ranks. cost: parameters per unit of rank. parameters: after the cut.
        norm: ‖ΔW‖ before, in the Frobenius norm. error: ‖ΔW - ΔW'‖, of the file if one was written, else expected.
        loss: the share of E‖ΔW x‖² on data that is lost, without data of ‖ΔW‖², before numbers are rounded.
    """

    site: str
    before: int
    rank: int
    cost: int
    parameters: int
    norm: float
    error: float
    loss: float


@dataclass(frozen=True)
class Cut:
    """An adapter before and after.

    Attributes:
        sites: its layers. fixed: parameters in layers whose rank cannot change.
        error: ‖ΔW - ΔW'‖ / ‖ΔW‖ over all layers, as in `CutSite`. loss: the share of energy lost, likewise.
        uniform: the largest rank with which every layer fits into the same parameters, and its `loss`; None if not one.
        folder: where it was written; None if it was not. bytes: of its weights there.
    """

    sites: list[CutSite]
    fixed: int
    error: float
    loss: float
    uniform: tuple[int, float] | None
    folder: Path | None = None
    bytes: int | None = None

    @property
    def before(self) -> int:
        """Parameters before the cut."""
        return self.fixed + sum(site.before * site.cost for site in self.sites)

    @property
    def parameters(self) -> int:
        """Parameters after it."""
        return self.fixed + sum(site.parameters for site in self.sites)


@torch.no_grad()
def spectrum(factors: Factors, root: Tensor | None = None) -> Spectrum:
    """The spectrum of a layer, with `root` L (r, k) of E[(Ax)(Ax)ᵀ] = L Lᵀ on data."""
    R, L = triangles(factors.A, factors.B)
    norm = factors.scale * float(torch.linalg.matrix_norm(R @ L))
    gains = factors.scale**2 * squares(R, L if root is None else root.double())
    width = factors.A.shape[1] * factors.A.itemsize + factors.B.shape[0] * factors.B.itemsize
    return Spectrum(gains, factors.rank, factors.cost, width, abs(norm))


@torch.no_grad()
def truncated(factors: Factors, rank: int, root: Tensor | None = None) -> Factors:
    """The best factors of a rank that is not above the number of units worth anything, in the same type of number.

    The rows of A' have length 1, as about those of LoRA's A have at its start. In fp16 and fp8, whose small numbers
    lose digits, A' and B' share the singular value instead.
    """
    A = factors.A.double()
    Q, R = torch.linalg.qr(factors.B.double())
    if root is None:
        root = triangles(factors.A, factors.B)[1]
    U = torch.linalg.svd(R @ root.double())[0][:, :rank]
    A = U.T @ R @ A
    length = A.norm(dim=1)
    if torch.finfo(factors.A.dtype).tiny > 1e-20:
        length = length.sqrt()
    A, B = A / length[:, None], (Q @ U) * length
    kind = factors.A.dtype, factors.B.dtype
    return Factors(A.to(kind[0]), B.to(kind[1]), factors.scale, factors.kernel, factors.embedding)


@torch.no_grad()
def distance(one: Factors, other: Factors | None) -> float:
    """‖ΔW - ΔW'‖ in the Frobenius norm; of None, the layer left out, ‖ΔW‖."""
    if other is None:
        A, B = one.A.double(), one.scale * one.B.double()
    else:
        A = torch.cat([one.A.double(), other.A.double()])
        B = torch.cat([one.scale * one.B.double(), -other.scale * other.B.double()], dim=1)
    R = torch.linalg.qr(B, mode="r")[1] @ torch.linalg.qr(A.T, mode="r")[1].T
    return float(torch.linalg.matrix_norm(R))


def cut(
    source: Source,
    like: StoredAdapter,
    limit: Limit,
    out: Path | None = None,
    roots: Mapping[str, Tensor] | None = None,
    force: bool = False,
) -> Cut:
    """Cut the layers of `source` to a limit, and write what is left as an adapter like another one.

    A layer whose rank does not change keeps its numbers.

    Args:
        out: where to write; nothing is written without it.
        roots: by layer L (r, k) of E[(Ax)(Ax)ᵀ] = L Lᵀ on data.
        force: replace an adapter that is there already.
    Raises:
        InputError: the limit leaves no layer any rank, all products are 0, numbers are not finite, the layers have
            more than A and B (DoRA), or `write` refuses to write.
    """
    limit.check()
    like.check_linear("a cut")
    if out is not None:
        check_free(out, like, force)
    roots = roots or {}
    spectra = {name: spectrum(_finite(source, like, name), roots.get(name)) for name in source.names}
    fixed = sum(layer.rank * sum(layer.size) for layer in like.layers.values() if layer.fixed)
    ranks = dict(zip(spectra, chosen(list(spectra.values()), limit, like, list(spectra), fixed), strict=True))
    if out is not None:
        write(out, like, ((n, _shrunk(source, n, ranks[n], roots.get(n))) for n in spectra), force=force)
    errors = _errors(source, spectra, ranks, out, roots)
    return _summary(spectra, ranks, errors, fixed, out)


def chosen(
    spectra: Sequence[Spectrum], limit: Limit, like: StoredAdapter, names: Sequence[str], fixed: int
) -> list[int]:
    """The rank of each layer: the best there are within the limit.

    Raises:
        InputError: nothing is worth anything, or no unit of rank fits.
    """
    gains, costs = [each.gains for each in spectra], [each.cost for each in spectra]
    if not any(each.any() for each in gains):
        raise InputError(f"{like.path}: adds nothing to its base model: every product B A is 0")
    if limit.rank is not None:
        return [min(limit.rank, int(np.count_nonzero(each))) for each in gains]
    if limit.keep_energy is not None:
        return cheapest(gains, costs, limit.keep_energy)
    if limit.budget is not None:
        if fixed + sum(each.rank * each.cost for each in spectra) <= limit.budget:
            return [each.rank for each in spectra]
        least = fixed + min(cost for cost, gain in zip(costs, gains, strict=True) if gain.any())
        ranks = most_within(gains, costs, max(0, limit.budget - fixed))
    else:
        assert limit.bytes is not None
        ranks, least = _within_bytes(spectra, limit.bytes, like, names)
    if not any(ranks):
        what = "parameters" if limit.budget is not None else "bytes"
        given = limit.budget if limit.budget is not None else limit.bytes
        raise InputError(f"{like.path}: {given:,} {what} are too few for any rank: allow at least {least:,}")
    return ranks


def _within_bytes(
    spectra: Sequence[Spectrum], most: int, like: StoredAdapter, names: Sequence[str]
) -> tuple[list[int], int]:
    """The best ranks whose file has at most so many bytes, and the bytes that the cheapest unit alone would take.

    The header of the file has the ranks in it, so that what is left for numbers is only known from them: the largest
    room for numbers is searched with which all of the file fits.
    """
    gains, costs = [each.gains for each in spectra], [each.bytes for each in spectra]
    file = lambda ranks: size(like, dict(zip(names, ranks, strict=True)))  # noqa: E731
    all_ranks = [each.rank for each in spectra]
    if file(all_ranks) <= most:
        return all_ranks, 0
    _, cheapest_site = min((cost, place) for place, cost in enumerate(costs) if gains[place].any())
    least = file([int(place == cheapest_site) for place in range(len(costs))])
    low, high = 0, most  # the numbers of the best file have `low` bytes at least, and less than `high`
    while high - low > 1:
        middle = (low + high) // 2
        if file(most_within(gains, costs, middle)) <= most:
            low = middle
        else:
            high = middle
    ranks = most_within(gains, costs, low)
    while True:  # the best ranks for more room may have needed more header, and one unit more still fit
        room = most - file(ranks)
        more = [i for i, rank in enumerate(ranks) if costs[i] <= room and rank < np.count_nonzero(gains[i])]
        for place in sorted(more, key=lambda place: -gains[place][ranks[place]]):
            ranks[place] += 1
            if file(ranks) <= most:
                break
            ranks[place] -= 1
        else:
            return ranks, least


def _finite(source: Source, like: StoredAdapter, name: str) -> Factors:
    factors = source.factors(name)
    if not all((each.double().abs() < LARGEST).all() for each in (factors.A, factors.B)):
        raise InputError(f"{like.path}: {name} has numbers that are NaN or infinite: its training has diverged")
    return factors


def _shrunk(source: Source, name: str, rank: int, root: Tensor | None) -> Factors:
    factors = source.factors(name)
    return factors if rank == factors.rank else truncated(factors, rank, root)


def _errors(
    source: Source,
    spectra: Mapping[str, Spectrum],
    ranks: Mapping[str, int],
    out: Path | None,
    roots: Mapping[str, Tensor],
) -> dict[str, float]:
    """‖ΔW - ΔW'‖ of each layer, of the file if one was written."""
    if out is None and not roots:
        return {name: float(np.sqrt(each.gains[ranks[name] :].sum())) for name, each in spectra.items()}
    new = None if out is None else stored(out)

    def after(name: str) -> Factors | None:
        if not ranks[name]:
            return None
        return _shrunk(source, name, ranks[name], roots.get(name)) if new is None else new.factors(name)

    return {name: distance(source.factors(name), after(name)) for name in spectra}


def _summary(
    spectra: Mapping[str, Spectrum],
    ranks: Mapping[str, int],
    errors: Mapping[str, float],
    fixed: int,
    out: Path | None,
) -> Cut:
    lost = lambda each, rank: float(each.gains[rank:].sum())  # noqa: E731
    sites = [
        CutSite(
            site=name,
            before=each.rank,
            rank=ranks[name],
            cost=each.cost,
            parameters=ranks[name] * each.cost,
            norm=each.norm,
            error=errors[name],
            loss=lost(each, ranks[name]) / (float(each.gains.sum()) or 1.0),
        )
        for name, each in spectra.items()
    ]
    energy = sum(float(each.gains.sum()) for each in spectra.values())
    norm = sum(each.norm**2 for each in spectra.values()) ** 0.5
    flat = sum(site.parameters for site in sites) // sum(site.cost for site in sites)
    uniform = (flat, sum(lost(each, flat) for each in spectra.values()) / energy) if flat else None
    return Cut(
        sites=sites,
        fixed=fixed,
        error=sum(error**2 for error in errors.values()) ** 0.5 / norm,
        loss=sum(lost(each, ranks[name]) for name, each in spectra.items()) / energy,
        uniform=uniform,
        folder=out,
        bytes=_weights(out) if out is not None else None,
    )


def _weights(out: Path) -> int:
    return sum(file.stat().st_size for file in stored(out).tensors.files)
