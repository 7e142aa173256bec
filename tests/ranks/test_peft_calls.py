"""Models in the hands of others: what PEFT and transformers write, load and add by their own methods."""

import copy
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter

import methods
import models
import rankwise as rw
from rankwise.methods.peer import Peer
from rankwise.ranks.sites import omega

KINDS = {
    **{name: {} for name in methods.OPTIONS},
    "residual": {"name": "lora", "rank": 2, "init": "svd_residual"},
    "start": {"name": "lora", "rank": 2, "init": "svd"},
    "pull": {"name": "lora", "rank": 2, "init": "svd", "pull": 0.1},
    "merge": {"name": "simplex-lora", "rank": 2, "every": 2, "times": 2, "omega_rate": 5e3, "empty": "merge"},
    "parts": {"name": "lora", "rank": 2, "targets": ["c_attn.q", "c_proj"]},
}
STEPS = 5
# The steps until a model is a finished adapter: its scales are folded by then; never if W has changed.
LIVE = {
    **dict.fromkeys(("simplex-lora", "fat-lora", "weight-lora"), 4),
    **dict.fromkeys(("sora", "residual", "merge", "parts"), STEPS + 1),
}


def attached(kind):
    method = rw.methods.build(KINDS[kind]) if KINDS[kind] else methods.method(kind)
    shape = "gpt2" if kind == "parts" else "bert"
    torch.manual_seed(1)
    return method, method.attach(models.model(shape), head=models.head(shape)), shape


# Not those that are PEFT's in every part: what PEFT can do with them is its own affair.
ADAPTERS = [
    kind for kind in KINDS if isinstance((made := attached(kind))[1], PeftModel) and not isinstance(made[0], Peer)
]


def by_peft(shape, folder):
    return PeftModel.from_pretrained(models.model(shape), folder).eval()


def by_peft_without_memory(shape, folder):
    return PeftModel.from_pretrained(models.model(shape), folder, low_cpu_mem_usage=True).eval()


def by_transformers(shape, folder):
    model = models.model(shape)
    model.load_adapter(str(folder))
    return model.eval()


READERS = [by_peft, by_peft_without_memory]
if Version(transformers.__version__) >= Version("5.23"):  # 5.6 leaves the head of stock PEFT's adapter out, too
    READERS.append(by_transformers)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.large] * (kind in ("adalora", "start", "pull", "dora")))
        for kind in ADAPTERS
    ],
)
def test_what_peft_writes_at_any_step_is_refused_by_peft_or_right(kind, tmp_path):
    method, model, shape = attached(kind)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    refused = []
    for step in range(STEPS + 1):
        folder = tmp_path / str(step)
        model.save_pretrained(folder)
        for load in READERS:
            if (kind, load) in (("dora", by_transformers), ("pissa", by_peft_without_memory)):
                continue  # which they cannot do with adapters of their own either
            try:
                again = load(shape, folder)
            except ValueError as error:
                assert "this is the state of a training, not a finished adapter" in str(error)
                refused.append((step, load))
                continue
            assert torch.allclose(models.logits(again), models.logits(model), atol=1e-5), (step, load)
        if step < STEPS:
            models.train(model, optimizer, 1, start=step)
    assert refused == [(step, load) for step in range(LIVE.get(kind, 0)) for load in READERS]


@pytest.mark.parametrize("kind", ["simplex-lora", "sora", "residual"])
def test_the_configuration_in_memory_and_that_of_a_finished_adapter_keep_their_start(kind, tmp_path):
    _, model, _ = attached(kind)
    model.save_pretrained(tmp_path / "live")
    rw.save(model, tmp_path / "adapter")
    assert model.peft_config["default"].init_lora_weights is True
    assert torch.allclose(models.logits(by_peft("bert", tmp_path / "adapter")), models.logits(model), atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="not a finished adapter"):
        by_peft("bert", tmp_path / "again")


def test_a_live_state_is_not_swapped_into_an_adapter(tmp_path):
    _, model, _ = attached("simplex-lora")
    model.save_pretrained(tmp_path / "live")
    _, other, _ = attached("lora")
    rw.save(other, tmp_path / "plain")
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        hotswap_adapter(by_peft("bert", tmp_path / "plain"), str(tmp_path / "live"), "default")


def test_a_configuration_that_is_added_tells_its_owner_what_it_became():
    """PEFT writes the names of the adapted layers into it, which its owner may read, save or add elsewhere."""
    _, model, _ = attached("simplex-lora")
    config = LoraConfig(r=2, target_modules="all-linear")
    model.add_adapter("other", config)
    assert model.peft_config["other"] is config and "all-linear" not in config.target_modules
    model.add_adapter("again", config)
    assert model.peft_config["again"] is not config  # ranks change in one of them


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
    models.train(model, optimizer, 1)
    then = models.logits(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    referred(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    model.set_adapter("ref")
    assert torch.equal(models.logits(model), then)
    model.set_adapter("default")
    assert torch.equal(models.logits(model), then)
    models.train(model, optimizer, STEPS - 1, start=1)
    now = models.logits(model)
    assert not torch.allclose(now, then, atol=1e-4)
    if kind != "merge":  # whose W has moved
        model.set_adapter("ref")
        assert torch.allclose(models.logits(model), then, atol=1e-5)
        model.set_adapter("default")
    if kind != "merge":
        model = method.fold(model)
        rw.save(model, tmp_path / "adapter")
        assert torch.allclose(models.logits(by_peft(shape, tmp_path / "adapter")), now, atol=1e-5)


def test_a_reference_that_peft_cannot_add_is_refused_in_one_line():
    _, model, _ = attached("adalora")
    with pytest.raises(rw.InputError, match="in TRL pass ref_model=$") as caught:
        referred(model)
    assert "\n" not in str(caught.value)


def test_copies_and_pickles_of_a_model_are_models():
    _, model, _ = attached("lora")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(models.logits(again), models.logits(model))
    _, model, _ = attached("simplex-lora")
    assert omega(copy.deepcopy(model)) is not omega(model)
