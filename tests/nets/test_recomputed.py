"""Pointwise results are computed again in the backward pass: gradients are the same to the bit, with less kept."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from methods import attached, every_method, every_shape
from rankwise.nets import recomputed
from rankwise.nets.lora_linear import set_fast
from rankwise.nets.recomputed import put_on, take_off
from rankwise.train.memory_need import Alive


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors count too."""
    monkeypatch.setattr(recomputed, "SMALL", 0)


def step(model: nn.Module, call: Callable[[Any], Tensor]) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients, and the bytes that are kept between the forward and the backward pass."""
    model.zero_grad()
    torch.manual_seed(0)
    with Alive(model) as alive:
        loss = call(model)
        gc.collect()
        kept = alive.now
        loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().clone(), **grads}, kept


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in other if not torch.equal(one[name], other[name])]


def agrees(model: nn.Module, call: Callable[[Any], Tensor]) -> float:
    """Assert that gradients are the same to the bit with recomputation; returns the share of memory that is kept."""
    plain, kept = step(model, call)
    put_on(model)
    lean, kept_lean = step(model, call)
    take_off(model)
    assert_same(lean, plain)
    return kept_lean / kept


def loss_of(**inputs: Any) -> Callable[[Any], Tensor]:
    return lambda model: model(**inputs).loss


@every_shape
@every_method
def test_gradients_of_every_method_are_the_same_with_less_kept(name: str, shape: str) -> None:
    model = attached(name, shape).train()
    call = loss_of(**models.batch())
    most = 1.0 if name == "head" else 0.95
    assert agrees(model, call) <= most and agrees(model, torch.autocast("cpu", torch.bfloat16)(call)) <= most
    if set_fast(model):
        assert agrees(model, call) <= most and agrees(model, torch.autocast("cpu", torch.bfloat16)(call)) <= most
