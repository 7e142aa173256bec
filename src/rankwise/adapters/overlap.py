"""What an adapter on disk does to each layer, and how much two of them do the same."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.adapters.layers import Factors
from rankwise.ranks.spectrum import NOTHING


@dataclass(frozen=True)
class Shared:
    """What two adapters share in one layer.

    Attributes:
        cosine: ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖); 1 for the same change, -1 for the opposite, 0 for unrelated ones.
        outputs, inputs: mean cos² of the principal angles between the spaces that their outputs lie in (columns of B)
            and that they read (rows of A): 1 where the smaller one is inside the larger one, about r / n for random
            ones of which the larger has rank r, in n dimensions.
    """

    cosine: float
    outputs: float
    inputs: float


@torch.no_grad()
def svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), σ (k,) and V (in, k) of ΔW = U diag(σ) Vᵀ, without what is rounding noise."""
    QB, RB = torch.linalg.qr(factors.scale * factors.B.double())
    QA, RA = torch.linalg.qr(factors.A.double().T)
    U, S, Vh = torch.linalg.svd(RB @ RA.T)
    k = int((NOTHING * RB.norm() * RA.norm() < S).sum())
    return QB @ U[:, :k], S[:k], QA @ Vh[:k].T


@torch.no_grad()
def shared(one: Factors, other: Factors) -> Shared | None:
    """What two adapters share in one layer; None where one of them adds nothing to it."""
    (U, S, V), (U2, S2, V2) = svd(one), svd(other)
    if not len(S) or not len(S2):
        return None
    outputs, inputs = U.T @ U2, V.T @ V2
    product = float(((S[:, None] * outputs * S2) * inputs).sum())
    smaller = min(len(S), len(S2))
    return Shared(
        product / float(S.norm() * S2.norm()),
        float(outputs.square().sum()) / smaller,
        float(inputs.square().sum()) / smaller,
    )
