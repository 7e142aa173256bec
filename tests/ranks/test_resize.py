import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import models
import rankwise as rw
from rankwise.ranks import RankPlan, ranks, sites
from rankwise.ranks.resize import extend, truncate

sizes = st.tuples(st.integers(2, 24), st.integers(2, 24), st.integers(1, 8), st.integers(0, 2**31))


def factors(inputs, outputs, r, seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(r, inputs, generator=draw, dtype=dtype)
    return A, torch.randn(outputs, r, generator=draw, dtype=dtype)


@settings(deadline=None)
@given(sizes, st.data())
def test_shrinking_error_is_eckart_youngs(size, data):
    inputs, outputs, r, seed = size
    r = min(r, inputs, outputs)
    rank = data.draw(st.integers(1, r))
    A, B = factors(inputs, outputs, r, seed)
    A2, B2, L, R = truncate(A, B, rank)
    best = torch.linalg.svdvals(B @ A)[rank:].square().sum().sqrt()
    assert (B @ A - B2 @ A2).norm() <= best + 1e-8 * (B @ A).norm()
    assert torch.allclose(L @ A, A2, atol=1e-6) and torch.allclose(B @ R, B2, atol=1e-6)


@settings(deadline=None)
@given(sizes, st.integers(0, 6))
def test_growing_keeps_the_product_bit_for_bit_and_adds_orthonormal_rows(size, more):
    inputs, outputs, r, seed = size
    r = min(r, inputs)
    rank = min(r + more, inputs)
    A, B = factors(inputs, outputs, r, seed, torch.float32)
    A2, B2 = extend(A, B, rank)
    assert torch.equal(A2[:r], A) and torch.equal(B2[:, :r], B) and not B2[:, r:].any()
    new = A2[r:].double()
    assert torch.allclose(new @ new.T, torch.eye(rank - r, dtype=torch.float64), atol=1e-5)
    assert (new @ A.double().T).abs().max() <= 1e-4 * A.norm() if rank > r else True


def test_a_shrunk_site_with_b_at_zero_can_still_learn():
    A, B = factors(16, 16, 4, 0)
    A2, B2, _, _ = truncate(A, torch.zeros_like(B), 2)
    assert not B2.any() and torch.linalg.matrix_rank(A2) == 2


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_plan_leaves_a_working_model_with_the_ranks_it_asked_for(data):
    model = models.adapted()
    wanted = {s.name: data.draw(st.integers(0, 7)) for s in sites(model)}
    if not any(wanted.values()):
        wanted[sites(model)[0].name] = 1
    scales = {s.name: s.scaling for s in sites(model)}
    rw.resize(model, wanted)
    assert ranks(model) == wanted
    assert {s.name: s.scaling for s in sites(model)} == scales
    assert torch.isfinite(models.logits(model)).all()
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(names) == 2 * sum(r > 0 for r in wanted.values())


def test_growing_and_the_same_rank_leave_the_logits_as_they_were():
    model = models.adapted()
    before = models.logits(model)
    parameters = list(model.parameters())
    assert rw.resize(model, ranks(model)) == {}
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(models.logits(model), before)
    rw.resize(model, dict.fromkeys(ranks(model), 7))
    assert torch.allclose(models.logits(model), before, atol=1e-6)


def test_an_emptied_site_costs_nothing_and_can_come_back():
    model = models.adapted()
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.requires_grad], "name": "adapter"}])
    first, *rest = sites(model)
    rw.resize(model, {first.name: 0}, optimizer)
    assert first.rank == 0 and first.parameters == 0
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(s.parameters for s in rest)
    without = models.logits(model)
    rw.resize(model, {first.name: 3})
    assert first.rank == 3 and not first.B.any()
    assert torch.equal(models.logits(model), without)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in trained]


def test_merging_an_emptied_site_keeps_the_outputs():
    model = models.adapted()
    before = models.logits(model)
    name = sites(model)[2].name
    rw.resize(model, RankPlan({name: 0}, empty="merge"))
    assert torch.allclose(models.logits(model), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already unmerged")  # PEFT, of layers that hold no adapter
def test_resized_pruned_and_merged_models_agree():
    model = models.adapted()
    rw.resize(model, {name: i % 5 for i, name in enumerate(ranks(model))})
    before = models.logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(models.logits(merged), before, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(models.logits(model), before, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(models.logits(model), before, atol=1e-5)


def test_carried_moments_are_the_gradient_of_the_new_factors():
    """With one step of plain averaging the first moment is the gradient, so it must be carried to the new gradient."""
    A, B = factors(12, 10, 4, 3)
    G = torch.randn(10, 12, dtype=torch.float64)  # ∂L/∂(BA)
    A2, B2, L, R = truncate(A, B, 2)
    assert torch.allclose(R.T @ (B.T @ G), B2.T @ G, atol=1e-9)
    assert torch.allclose((G @ A.T) @ L.T, G @ A2.T, atol=1e-9)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda s: {"nowhere": 2}, "no adapted layer of this model"),
        (lambda s: {s[0].name: -1}, "does not fit"),
        (lambda s: {s[0].name: s[0].limit + 1}, "does not fit"),
        (lambda s: {x.name: 0 for x in s}, "gives every site rank 0"),
    ],
)
def test_plans_that_cannot_be_are_refused_and_change_nothing(plan, message):
    model = models.adapted()
    before = ranks(model)
    with pytest.raises(rw.InputError, match=message):
        rw.resize(model, plan(sites(model)))
    assert ranks(model) == before


def test_a_merged_adapter_is_not_resized():
    """PEFT's unmerge would subtract the new product from weights that hold the old one."""
    model = models.adapted()
    model.merge_adapter()
    with pytest.raises(rw.InputError, match="unmerge_adapter"):
        rw.resize(model, dict.fromkeys(ranks(model), 1))


def test_a_site_that_returns_in_evaluation_has_no_dropout():
    torch.manual_seed(1)
    model = get_peft_model(models.model(), LoraConfig(r=2, target_modules=["query"], lora_dropout=0.5)).eval()
    name = sites(model)[0].name
    rw.resize(model, {name: 0})
    rw.resize(model, {name: 2})
    torch.nn.init.normal_(sites(model)[0].B)
    assert torch.equal(models.logits(model), models.logits(model))
    assert not sites(model)[0].layer.lora_dropout["default"].training


def test_an_adapter_larger_than_its_layer_may_stay_and_shrink():
    model = models.adapted(rank=20)
    assert rw.resize(model, ranks(model)) == {}
    before = models.logits(model)
    rw.resize(model, dict.fromkeys(ranks(model), 16))
    assert torch.allclose(models.logits(model), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_cannot_be_emptied_is_refused_before_anything_changes():
    torch.manual_seed(1)
    with_bias = get_peft_model(models.model(), LoraConfig(r=2, target_modules=["query"], lora_bias=True))
    first, second = ranks(with_bias)
    with pytest.raises(rw.InputError, match="more than A and B"):
        rw.resize(with_bias, {first: 1, second: 0})
    assert set(ranks(with_bias).values()) == {2}
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    language = transformers.AutoModelForCausalLM.from_config(config)
    tied = get_peft_model(language, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(rw.InputError, match="shares its weight"):
        rw.resize(tied, RankPlan({"model.layers.0.self_attn.q_proj": 1, "lm_head": 0}, empty="merge"))
    assert set(ranks(tied).values()) == {2}
