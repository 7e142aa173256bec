import copy

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, relu

import models
import rankwise as rw
from methods import goes_on_bit_identically
from rankwise.methods import build
from rankwise.methods.adapter import Bottleneck
from rankwise.nets.blocks import outputs

SHAPES = (*models.SHAPES, "roberta")
MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
LARGE = {"n_embd": 1280, "n_layer": 36, "n_head": 20}
GPT3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
both = pytest.mark.parametrize("name", ["adapter-h", "adapter-l"])


def base(shape="bert"):
    if shape != "roberta":
        return models.model(shape)
    config = transformers.RobertaConfig(
        vocab_size=models.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=models.LABELS, pad_token_id=0, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config).eval()


def method(name):
    return build({"name": name, "size": 4})


def attached(name, shape="bert"):
    torch.manual_seed(1)
    return method(name).attach(base(shape), head=models.head(shape))


def trained(name, shape="bert", steps=3):
    model = attached(name, shape)
    models.train(model, rw.SimplexAdam(method(name), model, lr=1e-2), steps)
    return model


def bottlenecks(model):
    return {n: part for n, part in model.named_modules() if isinstance(part, Bottleneck)}


def draw(model):
    """Adapters that change what the model says, as training would."""
    torch.manual_seed(2)
    with torch.no_grad():
        for part in bottlenecks(model).values():
            for p in part.parameters():
                p.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    ("name", "config", "size", "count"),
    [
        ("adapter-l", MEDIUM, 6, 368_784),
        ("adapter-l", MEDIUM, 224, 11_089_152),
        ("adapter-l", LARGE, 8, 875_808),
        ("adapter-l", LARGE, 248, 23_002_848),
        ("adapter-h", MEDIUM, 112, 11_064_576),
        ("adapter-h", GPT3, 1, 7_078_080),
        ("adapter-h", GPT3, 8, 40_109_568),
    ],
)
def test_counts_of_the_lora_paper_on_the_real_configurations(name, config, size, count):
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    model = build({"name": name, "size": size}).attach(model)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trains) == count
    assert all(p.is_meta for p in trains)


@given(
    width=st.integers(1, 24), size=st.integers(1, 9), activation=st.sampled_from(["gelu", "relu"]), norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_bottleneck_starts_as_the_identity_and_has_the_parameters_that_the_formula_says(
    width, size, activation, norm, dtype, seed
):
    part = Bottleneck(width, size, activation, norm)
    assert sum(p.numel() for p in part.parameters()) == 2 * width * size + size + width + 2 * width * norm
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = part(x)
    assert torch.equal(y, x) and y.dtype == dtype


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_the_outputs_are_the_base_models_bit_for_bit_at_the_start_and_not_later(name, shape):
    assert torch.equal(models.logits(attached(name, shape)), models.logits(base(shape)))
    assert not torch.equal(models.logits(draw(attached(name, shape))), models.logits(base(shape)))


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_one_adapter_stands_behind_each_projection_and_it_alone_trains_beside_the_head(name, shape):
    model, plain = attached(name, shape), base(shape)
    places = {part: n for n, part in plain.named_modules()}
    blocks = outputs(plain)
    expected = {places[block.feed_forward] for block in blocks}
    if name == "adapter-h":
        expected |= {places[part] for block in blocks for part in block.attention}
    assert {n.removesuffix(".adapter") for n in bottlenecks(model)} == expected
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    added = {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
    head = {n for n, _ in plain.named_parameters() if any(n.startswith(f"{part}.") for part in models.head(shape))}
    assert trains == added | head and added and head
    assert plain.state_dict().keys() <= model.state_dict().keys()  # the base keeps its names


def test_adapters_of_houlsby_stand_before_both_residual_additions():
    plain, model = base("gpt2").transformer.h[0], draw(attached("adapter-h", "gpt2")).transformer.h[0]
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

    def f(part, y):
        return y + linear(gelu(linear(y, part.down.weight, part.down.bias)), part.up.weight, part.up.bias)

    with torch.no_grad():
        middle = x + f(model.attn.c_proj.adapter, plain.attn(plain.ln_1(x))[0])
        end = middle + f(model.mlp.c_proj.adapter, plain.mlp(plain.ln_2(middle)))
        assert torch.allclose(model(x), end, atol=1e-6)


def test_adapters_of_lin_have_a_norm_and_stand_behind_the_feed_forward_part():
    plain, model = base("gpt2").transformer.h[0], draw(attached("adapter-l", "gpt2")).transformer.h[0]
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    part = model.mlp.c_proj.adapter
    with torch.no_grad():
        middle = x + plain.attn(plain.ln_1(x))[0]
        y = plain.mlp(plain.ln_2(middle))
        inner = layer_norm(y, (16,), part.norm.weight, part.norm.bias)
        inner = relu(linear(inner, part.down.weight, part.down.bias))
        assert torch.allclose(model(x), middle + y + linear(inner, part.up.weight, part.up.bias), atol=1e-6)


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_training_reaches_every_new_parameter_and_nothing_of_the_base(name, shape):
    model = attached(name, shape)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    models.train(model, rw.SimplexAdam(method(name), model, lr=1e-2), 3)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != p.requires_grad, n


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_and_loaded_again_gives_the_same_logits(name, shape, tmp_path):
    model = trained(name, shape)
    rw.save(model, tmp_path / "adapter", method(name), head=models.head(shape))
    again = rw.load(base(shape), tmp_path / "adapter")
    assert torch.equal(models.logits(again), models.logits(model))


@both
@pytest.mark.parametrize("shape", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("cut", [1, 3])
def test_cut_and_resumed_goes_on_bit_identically(name, shape, cut, tmp_path):
    def start():
        model = attached(name, shape)
        return model, rw.SimplexAdam(method(name), model, lr=1e-2)

    goes_on_bit_identically(start, cut, tmp_path / "checkpoint")


@both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(name, shape, reentrant):
    def gradients(checkpointing):
        model = draw(attached(name, shape)).train()
        if checkpointing:
            model.config.use_cache = False
            models.recompute(model, {"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(**models.batch()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    for n, grad in plain.items():
        assert grad.norm() > 0 and (checkpointed[n] - grad).norm() <= 1e-5 * grad.norm(), n


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_autocast_trains(name, shape):
    model = attached(name, shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = models.train(model, rw.SimplexAdam(method(name), model, lr=1e-2), 8)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert all(part.up.weight.dtype == torch.float32 and part.up.weight.any() for part in bottlenecks(model).values())


@both
def test_adapters_on_a_bf16_model_are_fp32_and_leave_its_type_alone(name):
    model = method(name).attach(base("llama").bfloat16(), head=["score"])
    assert {p.dtype for part in bottlenecks(model).values() for p in part.parameters()} == {torch.float32}
    assert torch.equal(models.logits(model), models.logits(base("llama").bfloat16()))
    assert models.logits(draw(model)).dtype == torch.bfloat16


@both
def test_a_deep_copy_has_adapters_of_its_own(name):
    model = draw(attached(name))
    twin, before = copy.deepcopy(model), models.logits(model)
    with torch.no_grad():
        for part in bottlenecks(model).values():
            part.up.bias.add_(1)
    assert torch.equal(models.logits(twin), before)
    assert not torch.equal(models.logits(model), before)


@pytest.mark.large
@both
@pytest.mark.parametrize("shape", ["bert", "llama"])
def test_a_compiled_model_runs_its_adapters(name, shape):
    model = draw(attached(name, shape))
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(models.logits(compiled), models.logits(model), atol=1e-5)
    assert not torch.allclose(models.logits(compiled), models.logits(base(shape)), atol=1e-3)


def language_model(shape):
    kind, config = {
        "gpt2": (transformers.GPT2LMHeadModel, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
        "llama": (
            transformers.LlamaForCausalLM,
            {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        ),
        "t5": (
            transformers.T5ForConditionalGeneration,
            {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        ),
    }[shape]
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return kind(kind.config_class(vocab_size=models.VOCABULARY, **ends, **config)).eval()


@both
@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5"])
def test_generating_with_a_cache_writes_what_it_writes_without(name, shape):
    inputs = {k: v for k, v in models.batch(4).items() if k != "labels"}
    plain = language_model(shape).generate(**inputs, max_new_tokens=6, do_sample=False)
    model = method(name).attach(language_model(shape))
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), plain)
    draw(model)
    cached, uncached = (model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, uncached) and not torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adapter-h", "size": 0}, "size must be at least 1"),
        ({"name": "adapter-l", "size": -4}, "size must be at least 1"),
        ({"name": "adapter-h", "activation": "tanh"}, "activation must be one of gelu, relu"),
        ({"name": "adapter-l", "sice": 4}, "sice"),
    ],
)
def test_bad_options_get_one_clear_line(options, message):
    with pytest.raises(rw.InputError, match=message) as caught:
        build(options)
    assert "\n" not in str(caught.value)


@both
def test_a_model_with_an_adapter_takes_no_second_one(name):
    lora = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["query"]))
    for model in (lora, lora.get_base_model(), attached("adapter-h"), attached("adapter-l")):
        with pytest.raises(rw.InputError, match="already has an adapter"):
            method(name).attach(model)


@both
def test_what_is_refused_is_left_as_it_was(name):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = transformers.MixtralConfig(**small, intermediate_size=32, vocab_size=64, num_local_experts=2)
    for model, head, message in (
        (transformers.MixtralModel(experts), [], "mixture of experts"),
        (base(), ["klassifier"], "classifier"),
        (nn.Sequential(nn.Linear(2, 2)), [], "no list of blocks"),
    ):
        names = set(model.state_dict())
        with pytest.raises(rw.InputError, match=message):
            method(name).attach(model, head=head)
        assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
