"""A forward that leaves no trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from rankwise.nets.undisturbed import undisturbed


def test_a_forward_leaves_no_trace():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5).eval()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + 1  # in a new tensor
            return self.drop(self.norm(x)) * random.random() * np.random.rand() * torch.rand(())

    model = Model()
    state, buffer = {name: value.clone() for name, value in model.state_dict().items()}, model.seen

    def draw():
        return random.random(), np.random.rand(), torch.rand(())

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with undisturbed(model):
        model.eval().drop.train()
        assert not model(torch.ones(2, 3)).requires_grad
    with pytest.raises(RuntimeError), undisturbed(model):
        raise RuntimeError
    assert draw() == expected
    assert model.training and model.norm.training and not model.drop.training
    assert model.seen is buffer and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
