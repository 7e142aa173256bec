import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.ranks.init_svd import svd_factors


@st.composite
def weights(draw):
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 10_000))))
    return W, draw(st.integers(1, min(rows, columns)))


@given(weights())
def test_the_product_is_the_best_of_its_rank(drawn):
    """Eckart–Young: what is left is what the smaller singular values weigh, and no product of that rank leaves less."""
    W, rank = drawn
    A, B = svd_factors(W, rank)
    assert A.shape == (rank, W.shape[1]) and B.shape == (W.shape[0], rank)
    least = torch.linalg.svdvals(W.double())[rank:].square().sum()
    left = (W.double() - B.double() @ A.double()).square().sum()
    assert torch.isclose(left, least, rtol=1e-3, atol=1e-8)


@given(weights())
def test_both_factors_carry_the_root_of_the_singular_values(drawn):
    W, rank = drawn
    A, B = svd_factors(W, rank)
    S = torch.diag(torch.linalg.svdvals(W)[:rank])
    assert torch.allclose(A @ A.T, S, atol=1e-4) and torch.allclose(B.T @ B, S, atol=1e-4)


@given(weights())
def test_the_authors_start_reads_the_first_columns_of_Vt_for_its_first_rows(drawn):
    W, rank = drawn
    A, B = svd_factors(W, rank, authors=True)
    U, S, Vt = torch.linalg.svd(W)  # Vt (in, in)
    expected = torch.stack([S[i].sqrt() * Vt[:, i] for i in range(rank)])
    assert torch.equal(A, expected)
    assert torch.equal(B, U[:, :rank] * S[:rank].sqrt())


def test_the_authors_start_is_no_approximation():
    W = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    A, B = svd_factors(W, 4, authors=True)
    right_A, right_B = svd_factors(W, 4)
    assert (W - B @ A).norm() > 1.2 * (W - right_B @ right_A).norm()


@pytest.mark.parametrize("authors", [False, True])
def test_on_the_meta_device_only_the_shapes_are_there(authors):
    A, B = svd_factors(torch.empty(4096, 14336, device="meta"), 8, authors)
    assert A.is_meta and A.shape == (8, 14336) and B.is_meta and B.shape == (4096, 8)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_single(kind):
    W = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).to(kind)
    A, B = svd_factors(W, 6)
    assert A.dtype == B.dtype == torch.float32
    assert torch.allclose(B @ A, W.float(), atol=1e-5)


def test_no_graph_is_built():
    W = torch.randn(4, 4, requires_grad=True)
    assert not any(factor.requires_grad for factor in svd_factors(W, 2))
