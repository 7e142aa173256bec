"""What units of rank are worth: the squared singular values of B A, without the product itself.

With B = Q_B R_B and Aᵀ = Q_A R_A they are those of R_B R_Aᵀ, which is as small as the rank.
"""

import numpy as np
import torch
from torch import Tensor

from rankwise.ranks.sites import Site

NOTHING = 1e-14
"""Share of ‖R_B‖ ‖L‖ up to which a singular value of R_B L is rounding noise in double precision."""


@torch.no_grad()
def triangles(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """R_B (·, r) and R_Aᵀ (r, ·) of A (r, in) and B (out, r), in double precision."""
    return torch.linalg.qr(B.double(), mode="r")[1], torch.linalg.qr(A.double().T, mode="r")[1].T


@torch.no_grad()
def squares(R: Tensor, L: Tensor) -> np.ndarray:
    """σ² of R L, falling; 0 for rounding noise."""
    values = torch.linalg.svdvals(R @ L)
    return torch.where(values > NOTHING * R.norm() * L.norm(), values, 0.0).square().cpu().numpy()


def gains(site: Site) -> np.ndarray:
    """σ² of s ω B A, falling, one for each unit of rank that a site has; none for an empty one."""
    if not site.present:
        return np.zeros(0)
    A, B = site.layer.lora_A[site.adapter].weight, site.B  # A with its scale
    return (site.scaling**2 * squares(*triangles(A.flatten(1), B.flatten(1))))[: site.rank]
