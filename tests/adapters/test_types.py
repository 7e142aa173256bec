"""Every type of adapter in PEFT, and every initialization of its LoRA, listed by introspection."""

import dataclasses
import typing

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

import rankwise as rw
from models import LLAMA_IDS, llama, llama_logits, stirred

OPTIONS = {
    "r": 2,
    "num_virtual_tokens": 3,
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "v_proj"],
    "feedforward_modules": [],
    "token_indices": [1, 2],
    "total_step": 10,
    "n_frequency": 16,
    "vector_length": 8,
    "adapter_layers": 1,
    "adapter_len": 2,
    "block_size": 8,
    "group_size": 8,
    "num_tasks": 2,
}
OTHER = {"OFT": {"r": 0, "oft_block_size": 8}, "ADAPTION_PROMPT": {"target_modules": "self_attn"}}
NEEDS_MORE = {"XLORA": "adapters in folders of their own", "SHADOW": "a model of its own beside the base"}
TASKS = ("POLY", "MULTITASK_PROMPT_TUNING")


@pytest.mark.filterwarnings("ignore")  # PEFT's, about types that are new in it
@pytest.mark.parametrize("kind", [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_every_type_of_adapter_is_saved_as_peft_would_and_loads_again(kind, checkpoint, tmp_path):
    if kind in NEEDS_MORE:
        pytest.skip(f"{kind} needs {NEEDS_MORE[kind]}")
    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(made) if field.init}
    options = {name: value for name, value in OPTIONS.items() if name in known} | OTHER.get(kind, {})
    more = {"task_ids": torch.zeros(len(LLAMA_IDS), dtype=torch.long)} if kind in TASKS else {}
    model = stirred(get_peft_model(llama(checkpoint), made(**options)))
    before = llama_logits(model, **more)
    rw.save(model, tmp_path / "ours")
    assert torch.allclose(llama_logits(model, **more), before, atol=1e-5)  # CPT's forward changes what it reads
    assert torch.allclose(llama_logits(rw.load(llama(checkpoint), tmp_path / "ours"), **more), before, atol=1e-5)
    weights = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    if kind != "ADALORA":  # which becomes LoRA
        model.save_pretrained(tmp_path / "stock", save_embedding_layers=False)
        assert weights.keys() == load_file(tmp_path / "stock" / "adapter_model.safetensors").keys()
    first = min(weights)
    for changed in ({**weights, "extra": torch.ones(1)}, {k: v for k, v in weights.items() if k != first}):
        save_file(changed, tmp_path / "ours" / "adapter_model.safetensors")
        with pytest.raises(rw.InputError, match="does not fit this model"):
            rw.load(llama(checkpoint), tmp_path / "ours")


def starts():
    """All that `init_lora_weights` takes; LoRA-GA's is missing from the annotation."""
    annotation = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    named = [name for part in annotation for name in typing.get_args(part)]
    return [True, False, *(name.replace("[number of iters]", "4") for name in named), "lora_ga"]


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize("begun", starts())
def test_every_start_of_pefts_keeps_its_logits_or_is_refused(begun, checkpoint, tmp_path):
    options = {"eva_config": peft.EvaConfig()} if begun == "eva" else {}
    made = True if begun in ("corda", "loftq", "lora_ga") else begun  # these need data or a GPU
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=made, modules_to_save=["lm_head"], **options)
    model = get_peft_model(llama(checkpoint), config)
    model.peft_config["default"].init_lora_weights = begun
    before = llama_logits(stirred(model))
    if str(begun).startswith(("pissa_niter", "corda", "loftq", "lora_ga")):
        with pytest.raises(rw.InputError, match=f"the start {begun} has changed the base weights"):
            rw.save(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        return
    rw.save(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(checkpoint), tmp_path / "adapter")
    assert torch.allclose(llama_logits(again), before, atol=1e-6)
    assert again.peft_config["default"].init_lora_weights == begun


def test_an_adapter_beside_one_that_took_something_out_of_w_is_refused(checkpoint, tmp_path):
    model = get_peft_model(llama(checkpoint), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("second")
    with pytest.raises(rw.InputError, match="'default' has a residual start"):
        rw.save(model, tmp_path / "adapter")


def test_what_adalora_has_beside_its_triplets_is_kept_or_refused(checkpoint, tmp_path):
    options = {"target_r": 2, "init_r": 3, "total_step": 10, "target_modules": ["q_proj"]}
    model = stirred(get_peft_model(llama(checkpoint), peft.AdaLoraConfig(task_type="CAUSAL_LM", bias="all", **options)))
    rw.save(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(checkpoint), tmp_path / "adapter")
    assert isinstance(again, peft.PeftModelForCausalLM) and torch.allclose(
        llama_logits(again), llama_logits(model), atol=1e-5
    )
    tokens = get_peft_model(llama(checkpoint), peft.AdaLoraConfig(trainable_token_indices=[1], **options))
    with pytest.raises(rw.InputError, match="embed_tokens trains tokens as well"):
        rw.save(tokens, tmp_path / "tokens")
