"""What a saved configuration says: all that PEFT's own said, and what makes stock PEFT build the same adapter."""

import copy
import json

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import models
import rankwise as rw
from models import llama, llama_logits, stirred
from rankwise.ranks import ranks, sites

BOTH = {"target_modules": ["embed_tokens", "q_proj"]}
LORA = {
    "patterns of an embedding": {**BOTH, "rank_pattern": {"embed_tokens": 4}, "alpha_pattern": {"embed_tokens": 5}},
    "patterns of both": {
        **BOTH,
        "rank_pattern": {"embed_tokens": 4, "q_proj": 3},
        "alpha_pattern": {"q_proj": 5, "embed_tokens": 7},
    },
    "one key for both": {**BOTH, "rank_pattern": {".*": 3}, "alpha_pattern": {r".*\.[a-z_]+": 5}},
    "the first key that matches": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.0\..*": 3, "q_proj": 4},
    },
    "layers_to_transform": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "exclude_modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "a pattern of targets": {"target_modules": r".*\.(q|v)_proj"},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "the output head": {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 3}},
    "rslora": {**BOTH, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"], "rank_pattern": {"q_proj": 3}},
}
PLANS = {
    "as it is": lambda names: {},
    "one changed": lambda names: {names[0]: 1},
    "all changed": lambda names: dict.fromkeys(names, 1),
    "one empty": lambda names: {names[0]: 0} if len(names) > 1 else {},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", LORA)
def test_all_that_is_not_of_a_changed_site_stays(options, plan, checkpoint, tmp_path):
    config = LoraConfig(r=2, lora_alpha=3, **LORA[options])
    patterns = config.rank_pattern, config.alpha_pattern
    model = stirred(get_peft_model(llama(checkpoint), config))
    changes = PLANS[plan](list(ranks(model)))
    if (options, plan) == ("dora", "one empty"):
        with pytest.raises(rw.InputError, match="more than A and B"):
            rw.resize(model, changes)
        return
    rw.resize(model, changes)
    before = llama_logits(stirred(model))
    rw.save(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(checkpoint), tmp_path / "adapter")
    assert torch.allclose(llama_logits(again), before, atol=1e-5)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    if options == "parameters":  # not plain LoRA, which keeps PEFT's layout
        assert plan != "as it is" or (written["rank_pattern"], written["alpha_pattern"]) == patterns
    else:
        assert not written["alpha_pattern"] and not written["use_rslora"] and not written["exclude_modules"]


def test_keys_of_others_are_kept_where_they_are_true(checkpoint):
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4, r"0\.self_attn\.v_proj": 3}
    )
    model = get_peft_model(llama(checkpoint), config)
    first, *_ = names = list(ranks(model))
    rw.resize(model, ranks(model))
    assert config.rank_pattern == {"q_proj": 4, r"0\.self_attn\.v_proj": 3}
    rw.resize(model, {first: 5})
    assert config.rank_pattern == {"^" + first.replace(".", r"\."): 5, "q_proj": 4, r"0\.self_attn\.v_proj": 3}
    rw.resize(model, {name: 2 for name in names if "v_proj" in name})
    assert config.rank_pattern == {"^" + first.replace(".", r"\."): 5, "q_proj": 4}
    rw.resize(model, {first: 4})
    assert config.rank_pattern == {"q_proj": 4}


@pytest.mark.parametrize("order", [["ours", "theirs"], ["theirs", "ours"]])
def test_a_weighted_sum_with_another_adapter_is_the_sum_in_either_order(order, checkpoint, tmp_path):
    ours = stirred(get_peft_model(llama(checkpoint), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])))
    rw.resize(ours, {sites(ours)[0].name: 0})
    rw.save(ours, tmp_path / "ours")
    theirs = stirred(get_peft_model(llama(checkpoint), LoraConfig(r=3, target_modules=["q_proj", "o_proj"])))
    theirs.save_pretrained(tmp_path / "theirs")
    model = PeftModel.from_pretrained(llama(checkpoint), tmp_path / order[0], adapter_name=order[0])
    model.load_adapter(tmp_path / order[1], order[1])
    model.add_weighted_adapter(order, [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    expected = llama(checkpoint)
    for name in order:
        expected = PeftModel.from_pretrained(expected, tmp_path / name).merge_and_unload()
    assert torch.allclose(llama_logits(model), llama_logits(expected), atol=1e-5)


class Nested(nn.Module):
    """Names that end others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"a": nn.Linear(4, 4)})

    def forward(self, x):
        return self.inner["a"](self.b(self.a(x)))


def test_a_name_that_ends_another_one_means_its_own_module_alone(tmp_path):
    torch.manual_seed(0)
    net, x = Nested(), torch.randn(3, 4)
    model = stirred(get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules="a|b")))
    rw.resize(model, {"b": 0})
    before = model(x)
    for layout in (None, "compact"):
        rw.save(model, tmp_path / "adapter", layout=layout)
        again = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "adapter")
        # padding lengthens the sums, whose order then differs on some processors
        assert torch.allclose(again(x), before, atol=0 if layout else 1e-6, rtol=0)
    assert list(ranks(again)) == ["a"]


AUTO = [
    pytest.param(kind, family, id=f"{name}-{family}")
    for name, kind in vars(peft.auto).items()
    if name.startswith("AutoPeftModelFor")
    for family in ("bert", "gpt2", "llama", "t5")
    if type(models.model(family).config) in kind._target_class._model_mapping
]


def test_every_auto_class_of_peft_is_tried():
    assert {case.values[0] for case in AUTO} == {
        kind for name, kind in vars(peft).items() if name.startswith("AutoPeftModelFor")
    }


@pytest.mark.filterwarnings("ignore:Could not find")  # no hub
@pytest.mark.parametrize(("auto", "family"), AUTO)
def test_pefts_auto_classes_build_the_model_again(auto, family, tmp_path):
    config = models.model(family).config
    config.is_decoder, config.num_labels = auto is peft.AutoPeftModelForCausalLM, 2
    torch.manual_seed(0)
    made = auto._target_class.from_config(config)
    made.save_pretrained(tmp_path / "base")
    net = type(made).from_pretrained(tmp_path / "base")
    head = [n for n, _ in net.named_children() if n in ("classifier", "score", "qa_outputs", "classification_head")]
    model = stirred(rw.LoRA(rank=2).attach(net, head=head)).eval()
    rw.save(model, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base") and written["task_type"]
    again = auto.from_pretrained(tmp_path / "adapter")
    inputs = {"input_ids": models.batch()["input_ids"]}
    if config.is_encoder_decoder and written["task_type"] in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


def test_a_head_that_is_not_in_the_file_is_not_promised_by_a_task(tmp_path):
    models.model().save_pretrained(tmp_path / "base")
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = stirred(rw.LoRA(rank=2).attach(net))
    rw.save(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(net.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(models.logits(again), models.logits(model)) and again.peft_config["default"].task_type is None


def test_a_model_that_transformers_adapted_is_told_what_it_is(checkpoint, tmp_path):
    model = llama(checkpoint)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    for ask in (rw.rank_report, lambda m: rw.resize(m, {}), lambda m: rw.save(m, tmp_path / "adapter")):
        with pytest.raises(rw.InputError, match="no PeftModel around them, as after transformers' add_adapter"):
            ask(model)
    rw.save(rw.LoRA(rank=2).attach(llama(checkpoint)), tmp_path / "adapter")
    for ask in (rw.LoRA(rank=2).attach, rw.BitFit().attach, lambda m: rw.load(m, tmp_path / "adapter")):
        for adapted in (model, rw.LoRA(rank=2).attach(llama(checkpoint))):
            with pytest.raises(rw.InputError, match="already has an adapter: use the base model"):
                ask(adapted)
