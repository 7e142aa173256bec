import copy
import inspect
import json
import re

import pytest
import torch
import transformers
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import models
import rankwise as rw
import stock_peft
from methods import attached, method
from rankwise.ranks import RankPlan, ranks, sites
from rankwise.ranks.sites import omega


def searched(shape, steps):
    """A model after `steps` of a search that ends at step 4; every kind of site is made sure of."""
    method = rw.SimplexLoRA(rank=3, every=2, times=2, omega_rate=50.0)
    torch.manual_seed(1)
    model = method.attach(models.model(shape), head=models.head(shape))
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), steps)
    names = list(ranks(model))
    rw.resize(model, {names[0]: 0, names[1]: 1, names[2]: 5})
    return model


@pytest.mark.parametrize("shape", models.SHAPES)
@pytest.mark.parametrize("steps", [3, pytest.param(5, marks=pytest.mark.large)])
def test_stock_peft_without_rankwise_gives_the_same_logits(shape, steps, tmp_path):
    model = searched(shape, steps)
    assert (omega(model) is not None) == (steps == 3)
    before = models.logits(model)
    rw.save(model, tmp_path / "adapter")
    assert torch.equal(models.logits(model), before) and (omega(model) is not None) == (steps == 3)
    fresh = (shape, steps) == ("bert", 3)  # one process that is started for it
    stock_peft.agrees(models.model(shape), models.batch(), {tmp_path / "adapter": before}, tmp_path, fresh)


def test_what_is_saved_is_a_plain_adapter(tmp_path):
    model = searched("bert", 3)
    rw.save(model, tmp_path / "adapter", layout="compact")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) or "classifier" in key for key in keys)
    first, *_ = sites(model)
    assert first.rank == 0 and not any(first.name in key for key in keys)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(key.startswith("^") for key in config["rank_pattern"])
    for site in sites(model):
        pattern = "^" + site.name.replace(".", r"\.")
        if site.present:
            assert config["rank_pattern"].get(pattern, config["r"]) == site.rank
    assert config["r"] == max(site.rank for site in sites(model)) and config["alpha_pattern"] == {}


def test_loading_again_finds_the_same_ranks(tmp_path):
    model = searched("bert", 5)
    rw.save(model, tmp_path / "adapter")
    again = rw.load(models.model(), tmp_path / "adapter")
    assert ranks(again) == {name: rank for name, rank in ranks(model).items() if rank}


def test_a_loaded_adapter_can_be_resized_and_saved_again(tmp_path):
    rw.save(searched("bert", 5), tmp_path / "adapter")
    again = rw.load(models.model(), tmp_path / "adapter")
    rw.resize(again, dict.fromkeys(ranks(again), 2))
    rw.save(again, tmp_path / "smaller")
    assert torch.allclose(models.logits(rw.load(models.model(), tmp_path / "smaller")), models.logits(again), atol=1e-6)


def test_a_merged_product_cannot_be_saved_as_an_adapter(tmp_path):
    model = searched("bert", 5)
    rw.resize(model, RankPlan({sites(model)[1].name: 0}, empty="merge"))
    with pytest.raises(rw.InputError, match="merged into the base weights"):
        rw.save(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_what_was_there_or_leaves_it(tmp_path):
    model = searched("bert", 5)
    rw.save(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "rankwise.json").touch()
    rw.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "rankwise.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_folders_without_an_adapter_and_of_another_model_are_refused(tmp_path):
    with pytest.raises(rw.InputError, match="holds no adapter"):
        rw.load(models.model(), tmp_path)
    with pytest.raises(rw.InputError, match="pass the method"):
        rw.save(models.model(), tmp_path / "adapter")
    method = rw.Head()
    rw.save(method.attach(models.model(), head=["classifier"]), tmp_path / "head", method, head=["classifier"])
    with pytest.raises(rw.InputError, match="classifier"):
        rw.load(models.model("gpt2"), tmp_path / "head")


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    model = searched("bert", 5)
    with pytest.raises(rw.InputError, match="holds thesis.tex, which is no part of an adapter"):
        rw.save(model, tmp_path)
    rw.save(model, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-3").mkdir()  # as the Trainer puts them beside what it saves
    with pytest.raises(rw.InputError, match="checkpoint-3"):
        rw.save(model, tmp_path / "run")
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "run" / "checkpoint-3").exists()
    with pytest.raises(rw.InputError, match="is a file"):
        rw.save(model, tmp_path / "thesis.tex")


def test_statistics_of_a_normalisation_are_saved_with_what_trains(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    for way, head in ((rw.Full(), []), (rw.BitFit(), ["3"]), (rw.Head(), ["3"])):
        model = way.attach(net(), head=head)
        optimizer = rw.SimplexAdam(way, model, lr=1e-2)
        for step in range(5):
            model(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)) * 3 + 1).square().sum().backward()
            optimizer.step()
        rw.save(model, tmp_path / way.name, way, head)
        x = torch.randn(5, 4)
        assert torch.equal(rw.load(net(), tmp_path / way.name)(x), model.eval()(x))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "rankwise.json", "adapter_config.json"])
@pytest.mark.parametrize("content", [None, b"", b'{"method": {"na'])
def test_damaged_files_get_one_line(file, content, tmp_path):
    rw.save(searched("bert", 5), tmp_path / "lora")
    way = rw.Head()
    rw.save(way.attach(models.model(), head=["classifier"]), tmp_path / "head", way, head=["classifier"])
    for folder in (tmp_path / "lora", tmp_path / "head"):
        if not (folder / file).exists():
            continue
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)
        with pytest.raises(rw.InputError) as caught:
            rw.load(models.model(), folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sora", "simplex-lora"])
def test_a_checkpoint_in_the_middle_of_a_search_is_no_adapter(name, tmp_path):
    model = attached(name)
    model.save_pretrained(tmp_path)  # what a Trainer writes
    with pytest.raises(rw.InputError, match="holds the state of a training .* resume from it"):
        rw.load(models.model(), tmp_path)


@pytest.mark.parametrize("name", ["sora", "simplex-lora", "weight-lora"])
def test_a_deep_copy_folds_without_the_model_and_the_model_without_it(name):
    model, way = attached(name), method(name)
    models.train(model, rw.SimplexAdam(way, model, lr=1e-2), 1)
    model.double()
    before = models.logits(model)
    twin = copy.deepcopy(model)
    assert torch.allclose(models.logits(way.fold(twin)), before, atol=1e-6)
    assert torch.equal(models.logits(model), before)
    other = copy.deepcopy(model)
    assert torch.allclose(models.logits(way.fold(model)), before, atol=1e-6)
    assert torch.equal(models.logits(other), before)


def test_an_adapter_of_any_name_and_in_a_wrapper_is_saved_plain(tmp_path):
    model = get_peft_model(models.model(), LoraConfig(r=2, target_modules=["query"]), adapter_name="mine").eval()
    torch.nn.init.normal_(sites(model)[0].B)
    rw.save(torch.nn.DataParallel(model), tmp_path / "adapter")
    assert torch.equal(models.logits(rw.load(models.model(), tmp_path / "adapter")), models.logits(model))


WRONG = {
    "a layer less": lambda all: {k: v for k, v in all.items() if "layers.1" not in k},
    "no B": lambda all: {k: v for k, v in all.items() if "lora_B" not in k},
    "other names": lambda all: {k.replace("self_attn", "attention"): v for k, v in all.items()},
    "one more": lambda all: {**all, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 2)},
    "no head": lambda all: {k: v for k, v in all.items() if "score" not in k},
    "nothing": lambda all: {},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_with_more_or_less_than_the_model_is_refused(wrong, tmp_path):
    rw.save(searched("llama", 5), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(WRONG[wrong](load_file(file)), file)
    with pytest.raises(rw.InputError, match="does not fit this model: .*(only|it lacks .*score)") as caught:
        rw.load(models.model("llama"), tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_a_file_of_a_larger_model_and_of_another_head_is_refused(tmp_path):
    rw.save(searched("bert", 5), tmp_path / "adapter")
    config = models.model().config
    config.num_hidden_layers = 1
    with pytest.raises(rw.InputError, match=r"layer\.1\..* is only in the file"):
        rw.load(transformers.BertForSequenceClassification(config), tmp_path / "adapter")
    rw.save(rw.LoRA(rank=2, targets=["query"]).attach(models.model(), head=["classifier"]), tmp_path / "queries")
    with pytest.raises(rw.InputError, match="classifier.* is only in the file"):
        rw.load(transformers.BertForMaskedLM(models.model().config), tmp_path / "queries")


def test_a_card_that_a_user_has_written_stays(tmp_path):
    model = models.adapted()
    rw.save(model, tmp_path / "adapter")
    card = tmp_path / "adapter" / "README.md"
    written = card.read_text()
    card.write_text("---\nmeta: hello\n---\nWhat I know of it.\n")
    rw.save(model, tmp_path / "adapter")
    assert card.read_text().endswith("What I know of it.\n")
    card.unlink()
    rw.save(model, tmp_path / "adapter")
    assert card.read_text() == written


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"peft_type": 3}', '{"peft_type": []}', '{"peft_type": "LORAA"}', "[" * 100_000]
)
def test_a_broken_configuration_is_called_damaged(text, tmp_path):
    rw.save(searched("bert", 5), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(rw.InputError, match="adapter_config.json.* is damaged"):
        rw.load(models.model(), tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    rw.save(searched("bert", 5), tmp_path / "adapter")
    with pytest.raises(rw.InputError, match="does not fit this model") as caught:
        rw.load(models.model("gpt2"), tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def combinations():
    """Every way in which PEFT's `add_weighted_adapter` puts adapters together, as its source has them."""
    source = inspect.getsource(LoraModel)
    found = set(re.findall(r'combination_type == "(\w+)"', source))
    assert {"linear", "cat", "svd", "ties", "dare_linear_svd"} <= found
    return sorted(found)


@pytest.mark.parametrize("kind", combinations())
def test_a_combination_of_adapters_with_uneven_ranks_is_saved_as_it_is(kind, tmp_path):
    """Stock `save_pretrained` of the elementwise ones writes no ranks, and its files do not load."""
    shape = "llama"
    model = get_peft_model(models.model(shape), uneven())
    model.add_adapter("other", uneven())
    options = {} if kind in ("linear", "cat", "svd") else {"density": 0.7}
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", combination_type=kind, **options)
    model.set_adapter("both")
    expected = models.logits(model.eval())
    rw.save(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(models.model(shape), tmp_path / "adapter").eval()
    assert torch.allclose(models.logits(again), expected, atol=1e-5)


def uneven():
    return LoraConfig(
        target_modules=["q_proj", "v_proj"],
        r=4,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "v_proj": 3},
        alpha_pattern={"v_proj": 3},
        init_lora_weights=False,
    )


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT's
@pytest.mark.parametrize("pattern", ["^q_proj", "model.layers.0.self_attn.q_proj", r"layers\.0\..*q_proj", "q_proj$"])
def test_patterns_that_match_nothing_or_in_another_way_than_meant_keep_what_is_there(pattern, tmp_path):
    config = uneven()
    config.rank_pattern, config.alpha_pattern = {pattern: 2}, {pattern: 100}
    model = get_peft_model(models.model("llama"), config).eval()
    for folder in ("as it is", "resized"):
        rw.save(model, tmp_path / folder)
        again = PeftModel.from_pretrained(models.model("llama"), tmp_path / folder).eval()
        assert torch.allclose(models.logits(again), models.logits(model), atol=1e-5)
        rw.resize(model, {sites(model)[0].name: 1})


@pytest.mark.filterwarnings("ignore:all-linear leaves out")
def test_layers_that_peft_renames_while_it_loads_them_have_their_weights(tmp_path):
    auto = transformers.AutoModelForCausalLM
    [(_, base)] = models.every_model(auto, ["laguna"])  # shared_experts, for which PEFT looks under another name
    base.save_pretrained(tmp_path / "base")
    model = models.stirred(rw.LoRA(rank=2, targets="all-linear").attach(base)).eval()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = model(ids).logits
        rw.save(model, tmp_path / "adapter")
        found = rw.load(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
