"""Which layers `targets` and `head` mean, and what is said where that cannot be."""

from pathlib import Path

import pytest
import torch
import transformers

import models
import rankwise as rw
from rankwise import tasks
from rankwise.methods import build
from rankwise.methods.targets import head_names, target_names
from rankwise.ranks import sites
from rankwise.train.model import check


def test_the_output_layer_may_be_named_in_a_list_and_is_no_part_of_all() -> None:
    model = transformers.AutoModelForCausalLM.from_config(models.small_config("llama"))
    assert target_names(model, ["q_proj", "lm_head"], []) == [
        *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)),
        "lm_head",
    ]
    assert "lm_head" not in target_names(model, "all-linear", [])
    ids = torch.arange(6)[None]
    before = model.eval()(ids).logits
    attached = rw.LoRA(rank=2, targets=["q_proj", "lm_head"]).attach(model)
    assert torch.equal(attached(ids).logits, before)
    assert "lm_head" in {site.name for site in sites(attached)}


def test_a_head_whose_name_ends_another_is_told_with_that_other() -> None:
    model = transformers.AutoModelForSequenceClassification.from_config(models.small_config("distilbert"))
    with pytest.raises(rw.InputError, match=r"name all of them, head=\[classifier, pre_classifier\], or rename"):
        head_names(model, ["classifier"])
    assert set(head_names(model, ["classifier", "pre_classifier"])) == {"classifier", "pre_classifier"}


def test_what_peft_refuses_is_not_called_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = str(tmp_path / "mamba")
    transformers.AutoModelForCausalLM.from_config(models.small_config("mamba")).save_pretrained(folder)
    models.tokenizer("<pad>", pad_token="<pad>").save_pretrained(folder)
    writing = tasks.build("samsum")
    with pytest.raises(
        rw.InputError, match=r"^PEFT refuses these targets \(.*out_proj, x_proj\): .*incompatible with Mamba"
    ) as caught:
        check(folder, writing, [build({"name": "lora", "rank": 2})], 16)
    assert "cannot load" not in str(caught.value) and "OFFLINE" not in str(caught.value)
    check(folder, writing, [build({"name": "lora", "rank": 2, "targets": ["in_proj", "x_proj"]})], 16)
