"""A fused projection in parts: the same layer for everybody outside, three layers with live weights inside."""

import copy
import io

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import models
import rankwise as rw
from rankwise.nets.fused import PARTS, Fused, Part, join, parts, split


def model(width: int = 6, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.ModuleDict({"c_attn": Conv1D(3 * width, width), "c_proj": Conv1D(width, width)}).requires_grad_(False)
    nn.init.normal_(made["c_attn"].bias)
    return made


def cut(width: int = 6, seed: int = 0) -> nn.Module:
    made = model(width, seed)
    split(made, ["c_attn.q"])
    return made


@settings(deadline=None)
@given(
    width=st.integers(1, 40),
    rows=st.integers(1, 20),
    kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_outputs_and_gradients_are_those_of_the_whole_layer_bit_for_bit(width, rows, kind):
    whole, split_up = model(width).to(kind), cut(width).to(kind)
    x = torch.randn(2, rows, width, dtype=kind, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = whole["c_attn"](x), split_up["c_attn"](y)
    assert torch.equal(a, b)
    weights = torch.randn_like(a)
    a.backward(weights)
    b.backward(weights)
    assert torch.equal(x.grad, y.grad)


def test_a_split_model_has_the_tensors_and_names_of_an_unsplit_one():
    made = model()
    before = dict(made.named_parameters())
    split(made, ["c_attn.v", "c_proj", "c_attn.q"])
    assert isinstance(made["c_attn"], Fused) and all(isinstance(made["c_attn"].get_submodule(p), Part) for p in PARTS)
    after = dict(made.named_parameters())
    assert before.keys() == after.keys() == made.state_dict().keys()
    assert all(before[name] is after[name] for name in before)
    assert not list(made.named_buffers())


def test_split_and_join_undo_each_other_and_may_be_said_twice():
    made = model()
    layer, tensors = made["c_attn"], list(made.parameters())
    for _ in range(2):
        split(made, ["c_attn.q"])
        split(made, ["c_attn.k"])
        assert made["c_attn"] is layer and parts(made) == {f"c_attn.{part}": "c_attn" for part in PARTS}
    for _ in range(2):
        assert join(made) is made
        assert type(layer) is Conv1D and not list(layer.children()) and "q" not in repr(layer)
    assert all(a is b for a, b in zip(tensors, made.parameters(), strict=True))
    assert torch.equal(made["c_attn"](torch.ones(2, 6)), model()["c_attn"](torch.ones(2, 6)))


def test_names_that_are_no_parts_split_nothing():
    made = model()
    split(made, ["c_attn", "c_proj", "c_proj.q", "c_attn.x", "q"])
    assert type(made["c_attn"]) is Conv1D


def test_parts_show_the_columns_of_the_whole_and_are_as_wide_as_their_inputs():
    layer = cut()["c_attn"]
    for part, weight, bias in zip(PARTS, layer.weight.split(6, dim=1), layer.bias.split(6), strict=True):
        child = layer.get_submodule(part)
        assert torch.equal(child.weight, weight) and torch.equal(child.bias, bias)
        assert (child.nx, child.nf) == (6, 6)
    assert all(f"({part}): Conv1D(nf=6, nx=6)" in repr(layer) for part in PARTS)


@settings(deadline=None)
@given(place=st.integers(0, 2), how=st.sampled_from(["in place", "data in place", "data"]), name=st.sampled_from("wb"))
def test_what_is_written_to_a_part_stands_in_its_columns_of_the_whole_and_nowhere_else(place, how, name):
    layer = cut()["c_attn"]
    part, attribute = layer.get_submodule(PARTS[place]), {"w": "weight", "b": "bias"}[name]
    wanted = getattr(layer, attribute).detach().clone()
    wanted[..., 6 * place : 6 * place + 6] += 1
    old = getattr(part, attribute)
    if how == "in place":
        old += 1
    elif how == "data in place":
        getattr(part, attribute).data += 1
    else:
        old.data = old.data.clone() + 1
    assert torch.equal(getattr(layer, attribute), wanted)
    assert torch.equal(getattr(part, attribute), wanted[..., 6 * place : 6 * place + 6])


def test_another_tensor_cannot_take_the_place_of_a_part_without_a_word():
    part = cut()["c_attn"].q
    with pytest.raises((AttributeError, KeyError)):
        part.weight = nn.Parameter(torch.zeros(6, 6))
    with pytest.raises(RuntimeError):
        part.weight.data = torch.zeros(5, 5)


def test_views_are_plain_in_what_is_computed_from_them():
    weight = cut()["c_attn"].q.weight
    for made in (weight.T, weight + 1, weight.data, weight.detach().clone(), weight @ weight):
        assert type(made) is torch.Tensor and not made.requires_grad


def saved_and_read(made: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_read])
def test_a_copy_has_parts_of_its_own(copied):
    made = cut()
    twin = copied(made)
    assert torch.equal(twin["c_attn"](torch.ones(2, 6)), made["c_attn"](torch.ones(2, 6)))
    before = made["c_attn"].weight.clone()
    twin["c_attn"].v.weight.zero_()
    assert not twin["c_attn"].weight[:, 12:].any() and torch.equal(made["c_attn"].weight, before)


def test_parts_follow_the_whole_to_another_type_or_device_and_through_loading():
    made = cut()
    made.load_state_dict(model(seed=1).state_dict())
    assert torch.equal(made["c_attn"].k.weight, model(seed=1)["c_attn"].weight[:, 6:12])
    made.load_state_dict(model(seed=2).state_dict(), assign=True)
    assert torch.equal(made["c_attn"].k.weight, model(seed=2)["c_attn"].weight[:, 6:12])
    made.to(torch.float64)
    assert made["c_attn"].k.weight.dtype == torch.float64
    made.to("meta")
    assert made["c_attn"].k.weight.is_meta and made["c_attn"](torch.ones(2, 6, device="meta")).shape == (2, 18)


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 2), rank=st.integers(1, 4), width=st.integers(1, 8))
def test_a_widened_factor_adds_to_its_own_outputs_only(place, rank, width):
    part = cut(width)["c_attn"].get_submodule(PARTS[place])
    A, B = torch.randn(rank, width), torch.randn(width, rank)
    wide = (part.widened(B) @ A).split(width)
    assert torch.allclose(wide[place], B @ A, atol=1e-6)  # the order of sums depends on the shape on some processors
    assert not any(other.any() for i, other in enumerate(wide) if i != place)


def test_what_only_looks_like_a_fused_projection_is_not_one():
    assert list(parts(models.model("gpt2"))) == [
        f"transformer.h.{i}.attn.c_attn.{part}" for i in range(2) for part in PARTS
    ]
    for shape in set(models.SHAPES) - {"gpt2"}:
        assert not parts(models.model(shape))
    # Keys and values for attending to an encoder: two in one.
    config = transformers.GPT2Config(
        vocab_size=models.VOCABULARY, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    assert set(parts(transformers.GPT2LMHeadModel(config)).values()) == {"transformer.h.0.attn.c_attn"}
    # Query, key and value of the first head, then of the second.
    config = transformers.GPTBigCodeConfig(
        vocab_size=models.VOCABULARY, n_embd=16, n_layer=1, n_head=2, multi_query=False, bos_token_id=1, eos_token_id=1
    )
    interleaved = transformers.GPTBigCodeForCausalLM(config)
    assert interleaved.transformer.h[0].attn.c_attn.weight.shape == (48, 16) and not parts(interleaved)


def test_a_layer_that_is_called_past_its_class_is_refused():
    made = model()
    made["c_attn"].forward = made["c_attn"].forward  # as accelerate's hooks do
    with pytest.raises(rw.InputError, match="c_attn as a whole") as caught:
        split(made, ["c_attn.q"])
    assert type(made["c_attn"]) is Conv1D and "\n" not in str(caught.value)
