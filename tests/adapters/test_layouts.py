"""Layouts of saved adapters: the same model in stock PEFT, and in programs that know less than PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

import models
import rankwise as rw
import stock_peft
from methods import one_shape
from models import stirred
from rankwise.adapters.layouts import compact, neighbours, portable, reading, targeted
from rankwise.adapters.save import settle
from rankwise.adapters.stored import padding, stored
from rankwise.ranks import ranks, sites


def searched(shape):
    """An adapter with several ranks, an empty layer and a search that is still on."""
    method = rw.SimplexLoRA(rank=3, every=2, times=2, omega_rate=50.0)
    torch.manual_seed(1)
    model = method.attach(models.model(shape), head=models.head(shape))
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), 3)
    names = list(ranks(model))
    rw.resize(model, {names[0]: 0, names[1]: 1, names[2]: 5})
    return model


@pytest.mark.parametrize("shape", models.SHAPES)
@pytest.mark.parametrize("layout", ["compact", "portable", None])
def test_what_was_settled_is_what_is_loaded_to_the_last_bit_whatever_the_ranks(layout, shape, tmp_path):
    """Ranks that are no powers of two, of which padding to one rank would round B each time."""
    torch.manual_seed(1)
    model = rw.LoRA(rank=3, alpha=5.0).attach(models.model(shape), head=models.head(shape))
    names, chosen = list(ranks(model)), (3, 5, 7, 1, 0) if layout else (3, 0, 0, 5, 0)
    rw.resize(model, {name: chosen[place % 5] for place, name in enumerate(names)})
    stirred(model)
    settle(model)
    folders = [rw.save(model, tmp_path / "first", layout=layout)]
    loaded = rw.load(models.model(shape), folders[0])
    if layout != "compact":  # as a run saves
        assert torch.equal(models.logits(loaded), models.logits(model))
    assert torch.allclose(models.logits(loaded), models.logits(model), atol=1e-6)
    folders.append(rw.save(loaded, tmp_path / "second", layout=layout))
    first, second = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert first == second
    PeftModel.from_pretrained(models.model(shape), folders[1])  # its configuration is true too


def as_simple_programs_do(folder):
    """ΔW of each layer as a program computes it that reads lora_alpha and the factors, and no pattern.

    llama.cpp divides lora_alpha by the rank of the tensor, others by r.
    """
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            B = tensors[key.replace("lora_A", "lora_B")]
            product = B.flatten(1) @ A.flatten(1)
            found[key] = (config["lora_alpha"] / config["r"] * product, config["lora_alpha"] / len(A) * product)
    return config, found


@pytest.mark.large
@one_shape
def test_both_layouts_are_the_same_model_in_stock_peft(shape, tmp_path):
    model = searched(shape)
    expected = models.logits(model)
    for layout in ("compact", "portable"):
        rw.save(model, tmp_path / layout, layout=layout)
    stock_peft.agrees(
        models.model(shape), models.batch(), {tmp_path / each: expected for each in ("compact", "portable")}, tmp_path
    )
    folded = stored(tmp_path / "compact")
    config, portable_factors = as_simple_programs_do(tmp_path / "portable")
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] == 8
    assert all(each.count(".") <= 1 for each in config["target_modules"])
    assert len(portable_factors) == len(sites(model)) > len(folded.layers)  # with the empty ones
    _, compact_factors = as_simple_programs_do(tmp_path / "compact")
    for name in folded.names:
        factors, key = folded.factors(name), f"base_model.model.{name}.lora_A.weight"
        delta = factors.scale * factors.B @ factors.A
        for by_r in (*portable_factors[key], compact_factors[key][1]):
            assert torch.allclose(by_r, delta, atol=1e-6)


@pytest.mark.parametrize("shape", models.SHAPES)
def test_padding_of_the_default_is_seen_by_nothing_of_ours(shape, tmp_path):
    model = searched(shape)
    rw.save(model, tmp_path / "default")
    rw.save(model, tmp_path / "compact", layout="compact")
    padded, plain = stored(tmp_path / "default"), stored(tmp_path / "compact")
    own = {name: layer.rank for name, layer in plain.layers.items()}
    assert padded.config["rank_pattern"] == {} and padded.config["r"] > max(own.values())
    assert {name: layer.rank for name, layer in padded.layers.items()} == own
    sizes = [
        sum(each.nbytes for each in load_file(file).values()) for file in (*padded.tensors.files, *plain.tensors.files)
    ]
    assert padding(padded) == sizes[0] - sizes[1] > 0 == padding(plain)
    assert f"padded with zeros to rank {padded.config['r']}" in reading(padded)
    assert f"{padding(padded):,} bytes smaller" in reading(padded) and "vLLM up to 0.31" in reading(plain)
    assert padded.names == plain.names and {*padded.config["target_modules"]} == {*plain.config["target_modules"]}
    again = rw.load(models.model(shape), tmp_path / "default")
    assert ranks(again) == own
    assert torch.allclose(models.logits(again), models.logits(model), atol=1e-6)
    for each in ("default", "compact"):
        rw.resize_adapter(tmp_path / each, tmp_path / f"{each} cut", keep_energy=0.5)
    smaller = [stored(tmp_path / f"{each} cut").layers for each in ("default", "compact")]
    assert smaller[0] == smaller[1] and len(smaller[0])
    rw.save(again, tmp_path / "twice")
    assert stored(tmp_path / "twice").tensors.metadata == padded.tensors.metadata


@pytest.mark.parametrize("shape", models.SHAPES)
def test_an_adapter_on_few_layers_gets_one_rank_for_those_alone(shape, tmp_path):
    """Padded to all layers, a file of kilobytes would have megabytes; with a pattern, some programs would be wrong."""
    model = stirred(rw.LoRA(rank=2, alpha=3.0).attach(models.model(shape)))
    places = dict(enumerate(ranks(model)))
    few = {places[1]: 2, places[len(places) - 2]: 3}
    rw.resize(model, {name: few.get(name, 0) for name in places.values()})
    rw.save(model, tmp_path / "default")
    found = stored(tmp_path / "default")
    assert {name: layer.rank for name, layer in found.layers.items()} == few
    assert found.config["rank_pattern"] == found.config["alpha_pattern"] == {} and found.config["r"] == 3
    assert sum("lora_A" in key for key in found.tensors.shape) == 2
    assert reading(found).splitlines()[-1].startswith("read wrongly, without an error, by TGI and LoRAX: ")
    expected = models.logits(model)
    stock_peft.agrees(models.model(shape), models.batch(), {tmp_path / "default": expected}, tmp_path)
    rw.save(model, tmp_path / "portable", layout="portable")
    assert reading(stored(tmp_path / "portable")).startswith("padded with zeros to rank 8")
    assert "TGI" not in reading(stored(tmp_path / "portable"))
    done = rw.export_adapter(tmp_path / "default", tmp_path / "guessed")  # its base cannot be read
    assert ("TGI and LoRAX" in done.not_served) == ("TGI" in reading(stored(tmp_path / "guessed")))
    rw.save(stirred(rw.LoRA(rank=3, alpha=3.0).attach(models.model(shape))), tmp_path / "plain")
    swapped = PeftModel.from_pretrained(models.model(shape), tmp_path / "plain").eval()
    hotswap_adapter(swapped, str(tmp_path / "default"), "default")
    assert torch.allclose(models.logits(swapped), expected, atol=1e-5)


@pytest.mark.parametrize("shape", models.SHAPES)
def test_there_is_nothing_to_say_of_one_rank_on_all_layers(shape, tmp_path):
    rw.save(stirred(rw.LoRA(rank=8).attach(models.model(shape), models.head(shape))), tmp_path / "adapter")
    assert reading(stored(tmp_path / "adapter")) == ""
    done = rw.export_adapter(tmp_path / "adapter", tmp_path / "compact", "peft")
    assert "TGI and LoRAX" not in done.not_served
    assert done.not_served.get("SGLang") == (None if shape == "llama" else "wrong")  # by the names of its layers


@pytest.mark.parametrize("shape", models.SHAPES)
def test_a_rank_that_tgi_pads_is_said_where_it_is_written(shape, tmp_path):
    """TGI and LoRAX pad it to 8, and scale what follows by lora_alpha / 8."""
    rw.save(stirred(rw.LoRA(rank=3).attach(models.model(shape))), tmp_path / "adapter")
    assert reading(stored(tmp_path / "adapter")).startswith("read wrongly, without an error, by TGI and LoRAX: ")
    rw.export_adapter(tmp_path / "adapter", tmp_path / "padded", "tgi")
    assert "wrongly" not in reading(stored(tmp_path / "padded"))


Q_AND_V = r".*\.(q|v)_proj"


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        ({"target_modules": Q_AND_V}, False),
        ({"target_modules": Q_AND_V, "exclude_modules": r".*layers\.1\..*"}, True),
        ({"target_modules": r".*layers\.0\.self_attn\.(q|v)_proj"}, True),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, True),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}, True),
    ],
)
def test_layers_are_found_that_others_targets_leave_out(config, left_out, tmp_path):
    model = stirred(get_peft_model(models.model("llama"), LoraConfig(r=8, **config)))
    rw.save(model, tmp_path / "default")
    found = stored(tmp_path / "default")
    assert found.layers.keys() == {site.name for site in sites(model)}
    rw.export_adapter(tmp_path / "default", tmp_path / "compact", "peft")
    for each in ("default", "compact"):
        padded = padding(stored(tmp_path / each)) > 0
        assert ("TGI" in reading(stored(tmp_path / each))) == (left_out and not padded), each
        loaded = rw.load(models.model("llama"), tmp_path / each)
        assert torch.allclose(models.logits(loaded), models.logits(model), atol=1e-6)
    stock_peft.agrees(models.model("llama"), models.batch(), {tmp_path / "default": models.logits(model)}, tmp_path)


def test_a_layer_whose_name_ends_as_anothers_is_not_adapted_with_it(tmp_path):
    def twice():
        torch.manual_seed(0)
        both = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(3))})
        both["draft"] = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])})
        both.forward = lambda x: x
        return both

    config = LoraConfig(r=2, target_modules=["q"], exclude_modules=["draft.blocks.0.q", "blocks.1.q", "blocks.2.q"])
    rw.save(stirred(get_peft_model(twice(), config)), tmp_path / "adapter")
    loaded = rw.load(twice(), tmp_path / "adapter")
    assert [site.name for site in sites(loaded)] == ["blocks.0.q"]


def test_numbers_where_the_padding_was_are_not_cut_off(tmp_path):
    rw.save(searched("llama"), tmp_path / "a")
    file, like = tmp_path / "a" / "adapter_model.safetensors", stored(tmp_path / "a")
    tensors, metadata = load_file(file), like.tensors.metadata
    for name, key in (
        ("padded", next(key for key in tensors if key.endswith(f"{like.names[0]}.lora_B.weight"))),
        ("empty", next(key for key in tensors if "B" in key and not any(n in key for n in like.names))),
    ):
        changed = {**tensors, key: torch.ones_like(tensors[key])}
        save_file(changed, file, metadata)
        with pytest.raises(rw.InputError, match="load the adapter in PEFT|is damaged"):
            rw.load(models.model("llama"), tmp_path / "a")
        save_file(changed, file, {"format": "pt"})  # as PEFT would write it
        assert stored(tmp_path / "a").layers.keys() > like.layers.keys(), name
    for damaged in ("[]", "{", '{"no such layer": 1}', json.dumps({like.names[0]: 99})):
        save_file(tensors, file, {**metadata, "rankwise.ranks": damaged})
        with pytest.raises(rw.InputError, match=r"rankwise\.ranks in the metadata of its weights is damaged"):
            stored(tmp_path / "a")


@pytest.mark.parametrize(("rank", "said"), [(8, ""), (3, "read wrongly, without an error, by TGI and LoRAX: ")])
def test_an_adapter_of_one_rank_stays_as_peft_writes_it(rank, said, tmp_path):
    model = models.adapted(rank=rank)
    model.save_pretrained(tmp_path / "peft")
    rw.save(model, tmp_path / "ours")
    assert reading(stored(tmp_path / "ours"))[: len(said) or None] == said
    ours, theirs = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "peft"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("ours", "peft"))
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
        del config["task_type"]
    assert ours == theirs


def in_file(adapter):
    """The layers that a file of PEFT's has, those that are only padding among them."""
    found = (key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in adapter.tensors.shape)
    return {name for name in found if name}


class Nested(nn.Module):
    """Names that end alike, and one that ends in a number."""

    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"to_out": nn.Sequential(nn.Linear(4, 4), nn.ReLU())}) for _ in range(3)]
        )
        self.draft = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"to_out": nn.Sequential(kind(4, 4))})])})

    def forward(self, x):
        for block in (*self.blocks, *self.draft["blocks"]):
            x = x + block["to_out"](x.long() if isinstance(block["to_out"][0], nn.Embedding) else x)
        return x


def test_layers_with_a_number_for_a_name_and_others_of_their_name(tmp_path):
    config = LoraConfig(r=2, target_modules=r"blocks\.[02]\.to_out\.0")
    torch.manual_seed(0)
    base = Nested()
    model = stirred(get_peft_model(base, config)).eval()
    expected = model(torch.ones(1, 4))
    rw.save(model, tmp_path / "portable", layout="portable")
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["to_out.0"]
    found = stored(tmp_path / "portable")
    assert in_file(found) == {*(f"blocks.{n}.to_out.0" for n in range(3)), "draft.blocks.0.to_out.0"}
    assert found.names == ["blocks.0.to_out.0", "blocks.2.to_out.0"]
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Nested(), tmp_path / "portable").eval()
    assert torch.allclose(again(torch.ones(1, 4)), expected, atol=1e-6)

    torch.manual_seed(0)
    other = stirred(get_peft_model(Nested(nn.Embedding), LoraConfig(r=2, target_modules=r"blocks\.[02]\.to_out\.0")))
    rw.save(other, tmp_path / "embedding", layout="portable")
    assert "base_model.model.draft.blocks.0.to_out.0.lora_embedding_A" in stored(tmp_path / "embedding").tensors.shape


def test_a_layer_that_cannot_be_padded_is_named(tmp_path):
    class Groups(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (
                nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1)}),
                nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1, groups=2)}),
            )

    model = get_peft_model(Groups(), LoraConfig(r=2, target_modules=["a.conv"]))
    with pytest.raises(rw.InputError, match=r"would need an adapter on b.conv, a Conv2d whose name ends as"):
        rw.save(model, tmp_path / "out", layout="portable")
    assert stored(rw.save(model, tmp_path / "default")).names == ["a.conv"]
    model = get_peft_model(Groups(), LoraConfig(r=2, target_modules=["a.conv"]))
    with pytest.raises(rw.InputError, match="layout is 'flat', but must be one of compact, portable"):
        rw.save(model, tmp_path / "out", layout="flat")
    assert not (tmp_path / "out").exists()


def test_variants_that_are_more_than_factors_keep_pefts_layout(tmp_path):
    model = stirred(
        get_peft_model(models.model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    )
    expected = models.logits(model.eval())
    rw.save(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"
    assert torch.allclose(
        models.logits(rw.load(models.model("llama"), tmp_path / "adapter").eval()), expected, atol=1e-5
    )
    with pytest.raises(rw.InputError, match="cannot be written as portable: its start, pissa, is subtracted"):
        rw.save(model, tmp_path / "portable", layout="portable")


def test_without_the_model_the_layers_next_to_each_other_are_filled_in(tmp_path):
    model = searched("llama")
    rw.save(model, tmp_path / "compact")
    rw.save(model, tmp_path / "portable", layout="portable")
    like, whole = stored(tmp_path / "compact"), stored(tmp_path / "portable")
    portable(tmp_path / "filled", like)
    filled = stored(tmp_path / "filled")
    assert filled.tensors.shape == whole.tensors.shape
    for name in filled.names:
        one, other = filled.factors(name), whole.factors(name)
        assert torch.allclose(one.scale * one.B @ one.A, other.scale * other.B @ other.A, atol=1e-6)
    assert neighbours(like).keys() == in_file(whole)
    base = models.model("llama")
    assert targeted(base, {}, ["q_proj", "v_proj"], tmp_path).keys() == {
        name for name, _ in base.named_modules() if name.endswith(("q_proj", "v_proj"))
    }
    compact(tmp_path / "again", whole)
    assert torch.allclose(
        models.logits(rw.load(models.model("llama"), tmp_path / "again").eval()), models.logits(model.eval()), atol=1e-5
    )


def test_neighbours_of_experts_and_of_blocks_that_are_missing_altogether(tmp_path):
    names = ["model.layers.0.mlp.experts.1.up", "model.layers.3.attn.q", "model.layers.3.mlp.experts.0.up", "lm_head"]
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(2, 4)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(6, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    assert neighbours(stored(tmp_path)).keys() == {
        *names,
        "model.layers.0.mlp.experts.0.up",
        *(f"model.layers.{n}.attn.q" for n in range(4)),
    }
