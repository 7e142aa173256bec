import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import models
import rankwise as rw
from methods import goes_on_bit_identically
from rankwise.methods import build
from rankwise.methods.subset import biases

SHAPES = (*models.SHAPES, "roberta")
MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
LARGE = {"n_embd": 1280, "n_layer": 36, "n_head": 20}
GPT3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
NAMES = ("head", "full", "full-top", "bitfit")
every_name = pytest.mark.parametrize("name", NAMES)
every_shape = pytest.mark.parametrize("shape", SHAPES)


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
    return build({"name": name, **({"blocks": 1} if name == "full-top" else {})})


def attached(name, shape="bert"):
    return method(name).attach(base(shape), head=models.head(shape))


def head(shape):
    return {
        n for n, _ in base(shape).named_parameters() if any(n.startswith(f"{part}.") for part in models.head(shape))
    }


def trains(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("options", "config", "count"),
    [
        ({"name": "full"}, MEDIUM, 354_823_168),
        ({"name": "full"}, LARGE, 774_030_080),
        ({"name": "full"}, GPT3, 174_604_259_328),
        ({"name": "full-top"}, MEDIUM, 25_192_448),
        ({"name": "full-top", "blocks": 24}, MEDIUM, 12 * 25_192_448),
        ({"name": "bitfit"}, GPT3, 12_988_416),
    ],
)
def test_counts_of_the_lora_paper_on_the_real_configurations(options, config, count):
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    model = build(options).attach(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@every_shape
def test_full_trains_every_weight(shape):
    assert all(p.requires_grad for p in attached("full", shape).parameters())


@every_shape
def test_full_top_trains_the_last_block_of_the_last_stack_and_the_head(shape):
    block = {
        "gpt2": "transformer.h.1.",
        "llama": "model.layers.1.",
        "t5": "transformer.decoder.block.0.",
        "deberta-v2": "deberta.encoder.layer.1.",
    }.get(shape, f"{shape}.encoder.layer.1.")
    expected = {n for n, _ in base(shape).named_parameters() if n.startswith(block)}
    assert expected and trains(attached("full-top", shape)) == expected | head(shape)


@every_shape
def test_bitfit_trains_every_bias_of_the_base_and_the_head(shape):
    model = attached("bitfit", shape)
    if shape in ("llama", "t5"):
        inner = [n for n, part in base(shape).named_modules() if isinstance(part, nn.Linear) and ".layer" in n]
        expected = {f"{n}.bias" for n in inner}
        assert len(expected) == {"llama": 2 * 7, "t5": 6 + 10}[shape]
        assert all(not p.any() for n, p in model.named_parameters() if n in expected)
    else:
        expected = {n for n, _ in base(shape).named_parameters() if n.endswith(".bias") and n not in head(shape)}
        assert model.state_dict().keys() == base(shape).state_dict().keys()
    assert trains(model) == expected | head(shape)


def test_a_bias_is_known_by_its_name_and_a_table_of_biases_is_none():
    model = nn.Module()
    model.q_bias, model.table = nn.Parameter(torch.ones(2)), nn.Module()
    model.table.relative_attention_bias = nn.Embedding(3, 2)
    model.recurrent = nn.LSTM(2, 2)
    found = {id(p) for p in biases(model)}
    assert found == {id(model.q_bias), id(model.recurrent.bias_ih_l0), id(model.recurrent.bias_hh_l0)}


def test_bitfit_takes_a_model_that_is_no_transformer():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert trains(build({"name": "bitfit"}).attach(model)) == {"0.bias", "1.bias"}
    with pytest.raises(rw.InputError, match="has neither biases nor transformer blocks"):
        build({"name": "bitfit"}).attach(nn.Sequential(nn.Linear(2, 2, bias=False)))


def test_new_biases_have_the_type_of_their_weights():
    model = build({"name": "bitfit"}).attach(base("llama").bfloat16(), head=["score"])
    assert {p.dtype for p in biases(model)} == {torch.bfloat16}
    assert torch.equal(models.logits(model), models.logits(base("llama").bfloat16()))
    assert not model.score.bias


@every_name
@every_shape
def test_the_outputs_are_the_base_models_bit_for_bit_at_the_start(name, shape):
    assert torch.equal(models.logits(attached(name, shape)), models.logits(base(shape)))


@every_name
@every_shape
def test_training_moves_what_trains_and_nothing_else(name, shape):
    model = attached(name, shape)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    models.train(model, rw.SimplexAdam(method(name), model, lr=1e-2), 3)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # No softmax hears a key's bias: only rounding may move it.
    deaf = {n for n in trains(model) if n.endswith(("key.bias", "key_proj.bias", "k.bias", "k_proj.bias"))}
    assert trains(model) - deaf <= moved <= trains(model)


@every_name
@every_shape
def test_saved_and_loaded_again_gives_the_same_logits(name, shape, tmp_path):
    model = attached(name, shape)
    models.train(model, rw.SimplexAdam(method(name), model, lr=1e-2), 3)
    rw.save(model, tmp_path / "adapter", method(name), head=models.head(shape))
    again = rw.load(base(shape), tmp_path / "adapter")
    assert torch.equal(models.logits(again), models.logits(model))


@every_name
@pytest.mark.parametrize("shape", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("cut", [1, 3])
def test_cut_and_resumed_goes_on_bit_identically(name, shape, cut, tmp_path):
    def start():
        model = attached(name, shape)
        return model, rw.SimplexAdam(method(name), model, lr=1e-2)

    goes_on_bit_identically(start, cut, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", NAMES[1:])
@every_shape
def test_activation_checkpointing_gives_the_same_gradients(name, shape):
    def gradients(checkpointing):
        model = attached(name, shape).train()
        if checkpointing:
            model.config.use_cache = False
            models.recompute(model)
        torch.manual_seed(3)
        model(**models.batch()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for n, grad in plain.items():
        assert (checkpointed[n] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, n


@every_name
@every_shape
def test_bf16_autocast_trains(name, shape):
    model = attached(name, shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = models.train(model, rw.SimplexAdam(method(name), model, lr=1e-2), 4)
    assert torch.isfinite(torch.tensor(losses)).all()


def test_a_deep_copy_has_biases_of_its_own():
    model = attached("bitfit", "llama")
    twin, before = copy.deepcopy(model), models.logits(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.bias.add_(torch.arange(16.0))
    assert torch.equal(models.logits(twin), before)
    assert not torch.equal(models.logits(model), before)


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


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5"])
def test_a_language_model_trains_is_saved_and_writes_the_same_when_loaded(name, shape, tmp_path):
    inputs = {k: v for k, v in models.batch(4).items() if k != "labels"}
    plain = language_model(shape).generate(**inputs, max_new_tokens=6, do_sample=False)
    model = method(name).attach(language_model(shape))
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), plain)
    optimizer = rw.SimplexAdam(method(name), model, lr=3e-2)
    for _ in range(5):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rw.save(model, tmp_path / "adapter", method(name))
    again = rw.load(language_model(shape), tmp_path / "adapter")
    written = again.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(written, model.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert not torch.equal(written, plain)
    if model.config.tie_word_embeddings:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "full-top", "blocks": 0}, "blocks must be at least 1"),
        ({"name": "full-top", "block": 2}, "block"),
        ({"name": "full", "blocks": 2}, "blocks"),
    ],
)
def test_bad_options_get_one_clear_line(options, message):
    with pytest.raises(rw.InputError, match=message) as caught:
        build(options)
    assert "\n" not in str(caught.value)


def test_more_blocks_than_the_last_stack_has_are_refused():
    for shape, has in (("bert", 2), ("t5", 1)):
        model = base(shape)
        with pytest.raises(rw.InputError, match=f"blocks {has + 1} is more than the last stack has: use at most {has}"):
            build({"name": "full-top", "blocks": has + 1}).attach(model)
        assert all(p.requires_grad for p in model.parameters())


@every_name
def test_a_model_with_an_adapter_is_refused(name):
    lora = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["query"]))
    for model in (lora, lora.get_base_model()):
        with pytest.raises(rw.InputError, match="already has an adapter"):
            method(name).attach(model, head=["classifier"])


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_head_that_is_not_there_is_refused(name):
    with pytest.raises(rw.InputError, match="classifier"):
        method(name).attach(base(), head=["klassifier"])


def test_quantised_weights_cannot_train_but_biases_beside_them_can():
    def packed():
        model = base("llama")
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight
            layer.mlp.down_proj.weight = nn.Parameter(torch.zeros_like(weight, dtype=torch.int8), requires_grad=False)
        return model

    for name in ("full", "full-top"):
        with pytest.raises(rw.InputError, match="quantised weights cannot train"):
            method(name).attach(packed())
    model = method("bitfit").attach(packed())
    assert model.model.layers[0].mlp.down_proj.bias.dtype == torch.float32


def test_none_trains_nothing_and_keeps_the_model(tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=models.VOCABULARY)
    ids = models.batch()["input_ids"]

    def written(model):
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    before = written(model)
    nothing = rw.Untrained()
    assert trains(nothing.attach(model)) == set() and nothing.peak(model) == nothing.budget(model) == 0
    assert torch.equal(written(nothing.fold(model)), before)
    rw.save(model, tmp_path / "adapter", nothing)
    assert torch.equal(written(rw.load(model, tmp_path / "adapter")), before)


@every_shape
def test_none_refuses_a_model_with_a_head_that_must_train(shape):
    with pytest.raises(rw.InputError, match=f"^the method none trains nothing, and {models.head(shape)[0]} must: use"):
        rw.Untrained().attach(base(shape), head=models.head(shape))
