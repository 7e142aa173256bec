"""Every kind of LoRA layer that PEFT has either changes its rank rightly or is refused in one line."""

import copy
import typing

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as kinds

import models
import rankwise as rw
from rankwise.ranks import ranks, sites
from rankwise.ranks.resize import truncate
from rankwise.ranks.restore import follow_state_dict

ROUTER = peft.ArrowConfig()
ROUTER.task_adapter_names = ["another"]  # as create_arrow_model sets it

# By the names that PEFT's layers give to their variants: what has to be asked for.
ASKED = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "arrow_config": {"arrow_config": ROUTER},
    "kasa_config": {"kasa_config": peft.KasaConfig()},
    "mica": {"init_lora_weights": "mica"},
    "monteclora_config": {"monteclora_config": peft.MontecloraConfig()},
    "use_bdlora": {"use_bdlora": peft.BdLoraConfig(target_modules_bd_b=["q_proj", "v_proj"], nblocks=2)},
    "use_dora": {"use_dora": True},
    "velora_config": {"velora_config": peft.VeloraConfig(num_groups=2)},
}
# What no layer calls a variant.
BESIDE = {
    "lora_bias": {"lora_bias": True, "bias": "lora_only"},
    "layer_replication": {"layer_replication": [(0, 2), (0, 2)]},
    "rslora": {"use_rslora": True},
    "target_parameters": {"target_modules": ["v_proj"], "target_parameters": ["self_attn.q_proj.weight"]},
    **{f"init {start}": {"init_lora_weights": start} for start in (False, "olora", "orthogonal", "pissa")},
}
NAME = "model.layers.0.self_attn.q_proj"
NEED_DATA = {"corda", "eva", "loftq"}  # or scipy


def base():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(models.model("llama").config)


def made(options):
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(base(), LoraConfig(**settings))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=models.batch()["input_ids"]).logits


def variants():
    layers = [kind for kind in vars(kinds).values() if isinstance(kind, type) and issubclass(kind, kinds.LoraLayer)]
    found = [vars(kind)["lora_variants"].fget(None) for kind in layers if "lora_variants" in vars(kind)]
    return {key for mapping in found for keys in mapping for key in keys}


def test_the_tests_here_know_every_variant_and_every_start_of_peft():
    assert variants() == set(ASKED)
    starts = typing.get_args(typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])[1])
    known = {f"init {start}" for start in starts if "[" not in start} - {f"init {start}" for start in NEED_DATA}
    assert known <= {*BESIDE, "init gaussian", "init mica"}


@pytest.mark.filterwarnings("ignore:.*LoRA tensor\\(s\\) have invalid shape:UserWarning")  # PEFT, of a bias
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.parametrize("asked", [*ASKED, *BESIDE])
def test_a_layer_changes_its_rank_rightly_or_is_refused(asked, tmp_path):
    model = made({**ASKED, **BESIDE}[asked])
    twin = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        rw.resize(model, {NAME: 2})
    except rw.InputError as refused:
        assert NAME in str(refused) and "\n" not in str(refused)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    site = next(s for s in sites(twin) if s.name == NAME)
    with torch.no_grad():
        A, B, _, _ = truncate(site.A, site.B, 2)
        site.A.zero_()[:2] = A
        site.B.zero_()[:, :2] = B
    shrunk = logits(model)
    assert torch.allclose(shrunk, logits(twin), atol=1e-5)
    rw.resize(model, {NAME: 6})
    assert torch.allclose(logits(model), shrunk, atol=1e-5)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.allclose(logits(again), shrunk, atol=1e-5)
    batch = models.batch()
    model(**batch | {"labels": batch["input_ids"]}).loss.backward()
    assert all(p.grad.isfinite().all() for s in sites(model) for p in (s.A, s.B))


@pytest.mark.filterwarnings("ignore:.*LoRA tensor\\(s\\) have invalid shape:UserWarning")  # PEFT, of a bias
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.parametrize(
    "asked", [name for name in (*ASKED, *BESIDE) if name != "arrow_config"]
)  # not by from_pretrained
def test_what_is_saved_is_loaded_by_peft_as_what_it_saves(asked, tmp_path):
    model = made({**ASKED, **BESIDE}[asked])
    rw.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = (logits(PeftModel.from_pretrained(base(), tmp_path / by).eval()) for by in ("ours", "theirs"))
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.parametrize("asked", [*ASKED, *BESIDE])
def test_a_state_of_the_same_ranks_changes_no_shape(asked):
    model = made({**ASKED, **BESIDE}[asked])
    follow_state_dict(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.MultiheadAttention])
def test_what_is_adapted_and_no_plain_product_is_named_as_such(kind):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = kind(8, 2)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["part"]))
    assert sites(model) == []
    with pytest.raises(rw.InputError, match=r"part adapts a .*so its rank cannot change"):
        rw.resize(model, {"part": 1})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    follow_state_dict(model)
    model.load_state_dict(state)


def test_an_adapter_for_inference_stays_frozen_when_a_site_returns(tmp_path):
    made({}).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path)
    rw.resize(model, {NAME: 0})
    rw.resize(model, {NAME: 3})
    assert not any(p.requires_grad for p in model.parameters())


def test_factors_that_are_frozen_come_back_frozen():
    method = rw.LoRAFA(rank=2)
    model = method.attach(base())
    optimizer = rw.SimplexAdam(method, model)
    rw.resize(model, {NAME: 0})
    rw.resize(model, {NAME: 3})
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name} == set()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(sites(model))


def test_the_last_site_may_go_in_the_plan_that_brings_another_one_back():
    model = made({})
    first, *rest = ranks(model)
    rw.resize(model, dict.fromkeys(rest, 0))
    rw.resize(model, {first: 0, rest[0]: 2})
    assert [rank for rank in ranks(model).values() if rank] == [2]
