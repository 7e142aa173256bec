"""Each kind of layer is a matrix, with factors whose product is a weight of its own layout."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.ranks.layers import KINDS, features, weight_layer

LAYERS = {
    "linear": (nn.Linear(6, 4), (2, 6)),
    "gpt2": (Conv1D(4, 6), (2, 6)),
    "convolution": (nn.Conv2d(3, 4, (2, 3)), (2, 3, 7, 8)),
    "groups": (nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding=1, padding_mode="circular"), (2, 4, 9)),
}


def test_every_kind_of_layer_is_looked_at_here():
    kinds = {type(weight_layer(layer)) for layer, _ in LAYERS.values()}
    assert kinds == set(KINDS)
    assert weight_layer(nn.Embedding(3, 3)) is None and weight_layer(nn.ConvTranspose2d(3, 3, 3)) is None


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_is_a_matrix_out_times_in_and_goes_back_into_its_layout(name):
    layer, _ = LAYERS[name]
    kind = weight_layer(layer)
    matrix = kind.matrix(layer.weight)
    assert (matrix.shape[1] * getattr(layer, "groups", 1), len(matrix)) == kind.features == features(layer)
    assert torch.equal(kind.own_layout(matrix), layer.weight)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_adding_the_product_of_factors_is_adding_what_they_compute(name):
    layer, shape = LAYERS[name]
    x, before = torch.randn(shape), layer.weight.clone()
    kind = weight_layer(layer)
    A, B = kind.factors(2, exact=True)
    expected = layer(x) + B(A(x))
    kind.add(kind.product(A.weight.flatten(1), B.weight.flatten(1)))
    assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.weight.copy_(before)


@pytest.mark.parametrize("name", LAYERS)
def test_the_rank_is_written_into_both_factors(name):
    kind = weight_layer(LAYERS[name][0])
    A, B = kind.factors(2)
    kind.set_rank(A, B, 1)
    (_, out), (into, _) = features(A), features(B)
    assert out == into == 1
