"""Models in the hands of others: what PEFT and transformers write, load and add by their own methods."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

import every
import rankwise as rw
import tiny
from rankwise.ranks.sites import omega

KINDS = {
    **{name: {} for name in every.OPTIONS},
    "residual": {"name": "lora", "rank": 2, "init": "svd_residual"},
    "start": {"name": "lora", "rank": 2, "init": "svd"},
    "pull": {"name": "lora", "rank": 2, "init": "svd", "pull": 0.1},
    "merge": {"name": "simplex-lora", "rank": 2, "every": 2, "times": 2, "omega_rate": 5e3, "empty": "merge"},
    "parts": {"name": "lora", "rank": 2, "targets": ["c_attn.q", "c_proj"]},
}
STEPS = 5


def attached(kind):
    method = rw.methods.build(KINDS[kind]) if KINDS[kind] else every.method(kind)
    shape = "gpt2" if kind == "parts" else "bert"
    torch.manual_seed(1)
    return method, method.attach(tiny.model(shape), head=tiny.head(shape)), shape


ADAPTERS = [kind for kind in KINDS if isinstance(attached(kind)[1], PeftModel)]


def by_peft(shape, folder):
    return PeftModel.from_pretrained(tiny.model(shape), folder).eval()


def by_peft_without_memory(shape, folder):
    return PeftModel.from_pretrained(tiny.model(shape), folder, low_cpu_mem_usage=True).eval()


def by_transformers(shape, folder):
    model = tiny.model(shape)
    model.load_adapter(str(folder))
    return model.eval()


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Those that read an adapter of stock PEFT as it is: early versions of transformers 5 do not."""
    folder = tmp_path_factory.mktemp("stock")
    config = LoraConfig(target_modules="all-linear", modules_to_save=tiny.head("bert"), init_lora_weights=False)
    model = get_peft_model(tiny.model("bert"), config)
    model.classifier.weight.data.add_(0.1)
    model.save_pretrained(folder)
    found = (by_peft, by_peft_without_memory, by_transformers)
    return [load for load in found if torch.allclose(tiny.logits(load("bert", folder)), tiny.logits(model), atol=1e-5)]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_peft_writes_at_any_step_is_refused_by_peft_or_right(kind, readers, tmp_path):
    method, model, shape = attached(kind)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    refused = []
    for step in range(STEPS + 1):
        folder = tmp_path / str(step)
        model.save_pretrained(folder)
        for load in readers:
            if (kind, load) in (("dora", by_transformers), ("pissa", by_peft_without_memory)):
                continue  # which they cannot do with adapters of their own either
            try:
                again = load(shape, folder)
            except ValueError as error:
                assert "this is the state of a training and no finished adapter" in str(error)
                refused.append((step, load))
                continue
            assert torch.allclose(tiny.logits(again), tiny.logits(model), atol=1e-5), (step, load)
        if step < STEPS:
            tiny.train(model, optimizer, 1, start=step)
    steps = {step for step, _ in refused}
    assert len(refused) == len(readers) * len(steps)
    live = dict.fromkeys(("simplex-lora", "fat-lora", "weight-lora", "merge"), 4).get(kind, STEPS + 1)
    if kind in ("residual", "parts", "sora", "weight-lora", "simplex-lora", "fat-lora", "merge"):
        assert steps >= set(range(live))
    assert kind != "merge" or steps == set(range(STEPS + 1))  # W is another one then
    assert kind not in ("lora", "pissa", "start", "pull", "dora", "adalora", "lora-fa") or not steps


@pytest.mark.parametrize("kind", ["simplex-lora", "sora", "residual"])
def test_the_configuration_in_memory_and_that_of_a_finished_adapter_keep_their_start(kind, tmp_path):
    _, model, _ = attached(kind)
    model.save_pretrained(tmp_path / "live")
    rw.save(model, tmp_path / "adapter")
    assert model.peft_config["default"].init_lora_weights is True
    assert torch.allclose(tiny.logits(by_peft("bert", tmp_path / "adapter")), tiny.logits(model), atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="no finished adapter"):
        by_peft("bert", tmp_path / "again")


def test_a_live_state_is_not_swapped_into_an_adapter(tmp_path):
    _, model, _ = attached("simplex-lora")
    model.save_pretrained(tmp_path / "live")
    _, other, _ = attached("lora")
    rw.save(other, tmp_path / "plain")
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        hotswap_adapter(by_peft("bert", tmp_path / "plain"), str(tmp_path / "live"), "default")


def referred(model):
    """As TRL makes its reference: another adapter of the same configuration, copied by the names of parameters."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "adalora"])
def test_an_adapter_copied_by_names_is_the_same_one_and_stays_so(kind, tmp_path):
    method, model, shape = attached(kind)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    tiny.train(model, optimizer, 1)
    then = tiny.logits(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    referred(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    model.set_adapter("ref")
    assert torch.equal(tiny.logits(model), then)
    model.set_adapter("default")
    assert torch.equal(tiny.logits(model), then)
    tiny.train(model, optimizer, STEPS - 1, start=1)
    now = tiny.logits(model)
    assert not torch.allclose(now, then, atol=1e-4)
    if kind != "merge":  # whose W has moved
        model.set_adapter("ref")
        assert torch.allclose(tiny.logits(model), then, atol=1e-5)
        model.set_adapter("default")
    if kind != "merge":
        model = method.fold(model)
        rw.save(model, tmp_path / "adapter")
        assert torch.allclose(tiny.logits(by_peft(shape, tmp_path / "adapter")), now, atol=1e-5)


def test_a_reference_that_peft_cannot_add_is_refused_in_one_line():
    _, model, _ = attached("adalora")
    with pytest.raises(rw.InputError, match="in TRL pass ref_model=$") as caught:
        referred(model)
    assert "\n" not in str(caught.value)


def test_copies_and_pickles_of_a_model_are_models():
    _, model, _ = attached("lora")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny.logits(again), tiny.logits(model))
    _, model, _ = attached("simplex-lora")
    assert omega(copy.deepcopy(model)) is not omega(model)
