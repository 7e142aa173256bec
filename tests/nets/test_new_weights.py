"""Weights that no checkpoint gives, in every family and in the hands of every method: they are saved with the rest."""

import copy

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import models
import rankwise as rw
from methods import every_method, method
from models import llama, stirred, write_llama
from rankwise.nets.new_weights import new_weights

Classifier = transformers.AutoModelForSequenceClassification


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    """A folder for each family with a body that has never had a classifier."""
    found = {}
    for shape in models.SHAPES:
        found[shape] = tmp_path_factory.mktemp(shape)
        transformers.AutoModel.from_config(models.model(shape).config).save_pretrained(found[shape])
    return found


def loaded(folder):
    return Classifier.from_pretrained(folder, num_labels=3).eval()


@pytest.mark.parametrize("shape", models.SHAPES)
def test_a_head_that_the_checkpoint_lacks_is_drawn_and_nothing_else_is(shape, bodies):
    net = loaded(bodies[shape])
    heads = (*models.head(shape), *(["pooler"] if shape == "deberta-v2" else []))  # whose pooler is no part of the body
    assert new_weights(net) and all(name.startswith(heads) for name in new_weights(net))
    copied = [name for name in new_weights(copy.deepcopy(net)) if "pooler" not in name or name in new_weights(net)]
    assert copied == new_weights(net)
    assert new_weights(rw.LoRA(rank=2).attach(net, head=heads).get_base_model()) == []
    assert new_weights(models.model(shape)) == new_weights(nn.Linear(2, 2)) == []
    models.model(shape).save_pretrained(bodies[shape] / "whole")
    assert new_weights(loaded(bodies[shape] / "whole")) == []
    more = Classifier.from_pretrained(bodies[shape] / "whole", num_labels=5, ignore_mismatched_sizes=True)
    assert new_weights(more) and all(name.startswith(heads) for name in new_weights(more))


@pytest.mark.parametrize("shape", models.SHAPES)
def test_a_head_that_nobody_named_is_saved_all_the_same(shape, bodies, tmp_path):
    model = stirred(rw.LoRA(rank=2).attach(loaded(bodies[shape])))
    rw.save(model, tmp_path / "adapter")
    torch.manual_seed(7)  # another head
    fresh = loaded(bodies[shape])
    assert not torch.allclose(models.logits(fresh), models.logits(model), atol=1e-3)
    assert torch.allclose(
        models.logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), models.logits(model), atol=1e-6
    )
    assert torch.allclose(
        models.logits(rw.load(loaded(bodies[shape]), tmp_path / "adapter")), models.logits(model), atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:.*`max_length` is ignored")
@every_method
def test_every_method_without_a_head_is_saved_with_the_one_that_was_drawn(name, bodies, tmp_path):
    way = method(name)
    if name == "head":
        with pytest.raises(rw.InputError, match="name its modules"):
            way.attach(loaded(bodies["bert"]))
        return
    model = stirred(way.attach(loaded(bodies["bert"])))
    rw.save(model, tmp_path / "adapter", way)
    torch.manual_seed(7)
    again = rw.load(loaded(bodies["bert"]), tmp_path / "adapter")
    assert torch.allclose(models.logits(again), models.logits(model), atol=1e-5)


def test_of_a_deep_copy_a_pooler_and_rows_of_new_tokens_are_saved_too(tmp_path):
    transformers.BertForMaskedLM(models.model("bert").config).save_pretrained(tmp_path / "base")  # has no pooler

    def grown(seed):
        torch.manual_seed(seed)
        net = copy.deepcopy(loaded(tmp_path / "base"))
        net.resize_token_embeddings(70)
        return net

    model = stirred(rw.LoRA(rank=2).attach(grown(1)))
    rw.save(model, tmp_path / "adapter")
    ids = torch.tensor([[1, 65, 2, 69]])
    for way in (PeftModel.from_pretrained, rw.load):
        again = way(grown(7), tmp_path / "adapter").eval()
        assert torch.allclose(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5)


TARGETS = {
    "plain": {"target_modules": ["q_proj"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [65, 66]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_rows_of_new_tokens_are_saved(targets, tied, tmp_path):
    def grown():
        net = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", use_cache=False)
        net.resize_token_embeddings(70)
        return net.eval()

    config = transformers.LlamaForCausalLM.from_pretrained(write_llama(tmp_path / "base")).config
    config.tie_word_embeddings = tied
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = stirred(get_peft_model(grown(), LoraConfig(r=2, **TARGETS[targets])))
    ids = torch.tensor([[1, 65, 2, 69]])
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        rw.save(model, tmp_path / "adapter")
        torch.manual_seed(7)
        for way in (PeftModel.from_pretrained, rw.load):
            again = way(grown(), tmp_path / "adapter").eval()(input_ids=ids).logits
            assert torch.allclose(again, before, atol=1e-5)


def test_where_the_checkpoint_is_gone_the_embeddings_are_saved(tmp_path):
    net = llama(write_llama(tmp_path / "base"))
    assert new_weights(net) == []
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert new_weights(net) == ["model.embed_tokens.weight", "lm_head.weight"]


def test_what_trains_beside_an_adapter_and_statistics_are_saved(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules=["0"]))
    model.base_model.model[2].bias.requires_grad_(True)
    stirred(model)
    for step in range(3):
        model.train()(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)) * 3 + 1)
    rw.save(model, tmp_path / "adapter")
    x = torch.randn(5, 4)
    assert torch.equal(peft.PeftModel.from_pretrained(net, tmp_path / "adapter").eval()(x), model.eval()(x))
