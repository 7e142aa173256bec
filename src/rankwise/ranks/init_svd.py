"""Factors that start from the singular value decomposition of W (a course project on LoRA-FA; PiSSA is similar).

    W = U diag(S) Vᵀ,    B = U_r √S_r,    A = √S_r V_rᵀ

so that BA is the best approximation of W at rank r (Eckart–Young).
"""

import torch
from torch import Tensor


@torch.no_grad()
def svd_factors(W: Tensor, rank: int, authors: bool = False) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) from the `rank` largest singular values of W (out, in).

    Args:
        authors: as in the project's notebooks, which take the first columns of Vᵀ instead of its first rows, so that BA
            does not approximate W; to reproduce their figures.
    """
    exact = W.float()
    if W.is_meta:
        return exact.new_empty(rank, W.shape[1]), exact.new_empty(W.shape[0], rank)
    U, S, Vh = torch.linalg.svd(exact, full_matrices=authors)
    rows = Vh[:, :rank].T if authors else Vh[:rank]
    root = S[:rank].sqrt()
    return root[:, None] * rows, U[:, :rank] * root
