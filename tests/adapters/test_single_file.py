"""Adapters that are one safetensors file, with the names that their trainers give."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
from models import stirred
from rankwise.adapters.stored import Factors, stored, write

DRAW = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=DRAW)


# Names as real files have them: kohya's SD, SDXL, Flux and Wan trainers, diffusers old and new, AI-Toolkit, XLabs.
FORMS = {
    "kohya": ("lora_unet_down_blocks_0_attentions_0_proj_in", ".lora_down.weight", ".lora_up.weight"),
    "kohya's text encoders": ("lora_te1_text_model_encoder_layers_0_mlp_fc1", ".lora_down.weight", ".lora_up.weight"),
    "musubi": ("lora_unet_blocks_0_self_attn_q", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("transformer.transformer_blocks.0.attn.to_q", ".lora_A.weight", ".lora_B.weight"),
    "diffusers' processors": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "_lora.down.weight",
        "_lora.up.weight",
    ),
    "older diffusers": ("unet.mid_block.attentions.0.proj_in", ".lora.down.weight", ".lora.up.weight"),
    "diffusers' text encoders": (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
    "ComfyUI": ("diffusion_model.double_blocks.0.img_attn.qkv", ".lora_A.weight", ".lora_B.weight"),
    "Mochi": ("diffusion_model.blocks.0.attn.qkv_x", ".lora_A", ".lora_B"),
    "Qwen": ("transformer_blocks.0.attn.to_k", ".lora_A.default.weight", ".lora_B.default.weight"),
    "XLabs": ("double_blocks.0.processor.qkv", "_lora1.down.weight", "_lora1.up.weight"),
}
FORMAT = {
    "kohya": "kohya",
    "kohya's text encoders": "kohya",
    "musubi": "kohya",
    "ComfyUI": "comfyui",
    "Mochi": "comfyui",
}


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("alpha", [None, 2.5, 8.0])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_and_written_in_its_own(form, alpha, kernel, tmp_path):
    name, down, up = FORMS[form]
    A, B = normal(4, 6, *kernel), normal(5, 4, *(1 for _ in kernel))
    tensors = {name + down: A, name + up: B, f"{name}_2{down}": normal(2, 6), f"{name}_2{up}": normal(5, 2)}
    if alpha:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    found = stored(tmp_path / "a.safetensors")
    assert found.format == FORMAT.get(form, "diffusers") and sorted(found.names) == [name, f"{name}_2"]
    assert not found.others
    factors = found.factors(name)
    assert torch.equal(factors.A, A.flatten(1)) and torch.equal(factors.B, B.flatten(1)) and factors.kernel == kernel
    assert factors.scale == (alpha / 4 if alpha else 1) and found.factors(f"{name}_2").scale == 1
    assert (found.rank(name), found.cost(name), found.limit(name)) == (4, A[0].numel() + 5, 5)

    write(tmp_path / "b.safetensors", found, {each: found.factors(each) for each in found.names})
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in again)

    smaller = Factors(A.flatten(1)[:3], B.flatten(1)[:, :3], 0.7, kernel)
    write(tmp_path / "c.safetensors", found, {name: smaller})
    again, product = load_file(tmp_path / "c.safetensors"), 0.7 * smaller.B @ smaller.A
    assert f"{name}_2{down}" not in again and again[name + down].shape[2:] == kernel
    scale = again[f"{name}.alpha"] / 3 if alpha else 1.0
    assert torch.allclose(scale * again[name + up].flatten(1) @ again[name + down].flatten(1), product, atol=1e-6)


class Pipe(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.proj = (nn.Linear(6, 6) for _ in range(3))


@pytest.mark.parametrize(
    "starts", [{"transformer.": True, "text_encoder.": False}, {"": True}], ids=["pipeline", "model"]
)
def test_the_configuration_that_diffusers_writes_into_a_file_is_read_and_kept_true(starts, tmp_path):
    options = {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"proj": 3}}
    tensors, metadata, models = {}, {}, {}
    for start, rslora in starts.items():
        config = LoraConfig(target_modules=["to_q", "to_k", "proj"], use_rslora=rslora, **options)
        models[start] = stirred(get_peft_model(Pipe(), config))
        state = {k.removeprefix("base_model.model."): v for k, v in models[start].state_dict().items() if "lora" in k}
        tensors |= {f"{start}{key.replace('.default', '')}": value for key, value in state.items()}
        metadata |= {f"{start}{key}": value for key, value in config.to_dict().items()}
    metadata = {key: [*value] if isinstance(value, set) else value for key, value in metadata.items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, default=str)})
    found = stored(tmp_path)  # the only file in its folder
    for start, model in models.items():
        for name in ("to_q", "to_k", "proj"):
            factors = found.factors(f"{start}{name}")
            delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
            assert torch.allclose(factors.scale * factors.B @ factors.A, delta, atol=1e-6)
    ranks = {name: 1 + (place % 4) for place, name in enumerate(found.names)}
    new = {name: Factors(normal(rank, 6), normal(6, rank), 0.4) for name, rank in ranks.items()}
    write(tmp_path / "b.safetensors", found, new)
    again = stored(tmp_path / "b.safetensors")
    for name, rank in ranks.items():
        factors = again.factors(name)
        assert factors.rank == rank
        assert torch.allclose(factors.scale * factors.B @ factors.A, 0.4 * new[name].B @ new[name].A, atol=1e-6)
    with safe_open(tmp_path / "b.safetensors", "pt") as written:
        config = json.loads(written.metadata()["lora_adapter_metadata"])
    start = next(iter(starts))
    assert config[f"{start}alpha_pattern"] == config[f"{start}rank_pattern"] and not config[f"{start}use_rslora"]
    assert config[f"{start}lora_alpha"] == config[f"{start}r"]  # the scale 1, as who does not read this has it too
    LoraConfig(**{k.removeprefix(start): v for k, v in config.items() if k.startswith(start)})


NAME = "lora_unet_mid_block_attentions_0_proj_in"
PLAIN = {f"{NAME}.lora_down.weight": normal(2, 6), f"{NAME}.lora_up.weight": normal(6, 2)}
REFUSED = {
    "LoHa": ({f"{NAME}.hada_w1_a": normal(2, 2)}, "is LoHa"),
    "LoKr": ({f"{NAME}.lokr_w1": normal(2, 2)}, "is LoKr"),
    "OFT": ({f"{NAME}.oft_blocks": normal(2, 2)}, "is OFT"),
    "GLoRA": ({f"{NAME}.a1.weight": normal(2, 2)}, "is GLoRA"),
    "Tucker": (PLAIN | {f"{NAME}.lora_mid.weight": normal(2, 2, 3, 3)}, "is a LoCon with a Tucker core"),
    "Control-LoRA": (PLAIN | {"lora_controlnet": normal(1)}, "is a Control-LoRA"),
    "no layer": ({"unet.conv_in.weight": normal(2, 2)}, "holds no LoRA adapter"),
    "half": ({f"{NAME}.lora_up.weight": normal(6, 2)}, "but no A of that layer"),
    "twice": (PLAIN | {f"{NAME}.lora_A.weight": normal(2, 6)}, "holds both"),
    "alpha 0": (PLAIN | {f"{NAME}.alpha": torch.tensor(0.0)}, "which is no scale"),
    "alphas": (PLAIN | {f"{NAME}.alpha": torch.ones(2)}, "which is no scale"),
    "scalar": (PLAIN | {f"{NAME}.scalar": torch.ones(1)}, "what it does is not known here"),
    "PEFT": (
        {"base_model.model.q.lora_A.weight": normal(2, 6), "base_model.model.q.lora_B.weight": normal(6, 2)},
        "is the file of a PEFT adapter",
    ),
    "shapes": ({**PLAIN, f"{NAME}.lora_up.weight": normal(6, 3)}, "the shapes of lora_unet_.* do not match"),
    "a search": (PLAIN | {"unet.lora_omega": normal(2)}, "is no tensor of plain LoRA"),
}


@pytest.mark.parametrize(("tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_lora_is_refused_by_its_name(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(rw.InputError, match=message) as caught:
        stored(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", ["{", "3", '"x"', '{"unet.lora_alpha": 2}', '{"lora_alpha": 2, "r": "x"}'])
def test_a_configuration_in_a_file_that_is_damaged_is_refused(options, tmp_path):
    tensors = {"unet.q.lora_A.weight": normal(2, 6), "unet.q.lora_B.weight": normal(6, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": options})
    with pytest.raises(rw.InputError, match="in its metadata is damaged|says rank .* which has rank 2"):
        stored(tmp_path / "a.safetensors")


def test_magnitudes_biases_and_weights_that_are_added_stay(tmp_path):
    more = {
        f"{NAME}.dora_scale": normal(6, 1),
        f"{NAME}.reshape_weight": torch.tensor([6, 6]),
        "lora_unet_conv_in.diff": normal(3, 3),
        "lora_unet_norm.w_norm": normal(3),
        "bundle_emb.x.string_to_param.*": normal(2, 3),
        f"{NAME}.alpha": torch.tensor(1.0),
    }
    metadata = {"ss_network_dim": "2", "ss_base_model": "sdxl", "sshs_model_hash": "abc"}
    save_file(PLAIN | more, tmp_path / "a.safetensors", metadata)
    found = stored(tmp_path / "a.safetensors")
    assert len(found.others) == 3
    with pytest.raises(rw.InputError, match="magnitude"):
        found.check_linear("a sum")
    write(tmp_path / "b.safetensors", found, {NAME: Factors(normal(1, 6), normal(6, 1), 0.5)})
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == (PLAIN | more).keys()
    assert all(torch.equal(again[key], more[key]) for key in more.keys() - {f"{NAME}.alpha"})
    with safe_open(tmp_path / "b.safetensors", "pt") as written:
        assert written.metadata() == {"ss_network_dim": "Dynamic", "ss_base_model": "sdxl"}

    bias = {
        "unet.proj.lora_A.weight": normal(2, 6),
        "unet.proj.lora_B.weight": normal(6, 2),
        "unet.proj.lora_B.bias": normal(6),
    }
    save_file(bias, tmp_path / "bias.safetensors")
    found = stored(tmp_path / "bias.safetensors")
    write(tmp_path / "c.safetensors", found, {"unet.proj": Factors(normal(3, 6), normal(6, 3), 0.5)})
    assert torch.equal(load_file(tmp_path / "c.safetensors")["unet.proj.lora_B.bias"], bias["unet.proj.lora_B.bias"])


def test_a_file_has_one_alpha_since_diffusers_takes_the_commonest_for_all_attention(tmp_path):
    """diffusers 0.42.1 loses the alphas of `to_q`, `to_k`, `to_v` and `to_out` in a file of kohya's."""
    names = [f"lora_unet_down_blocks_{n}_attentions_0_transformer_blocks_0_attn1_to_q" for n in range(4)]
    tensors = {}
    for place, name in enumerate(names):
        tensors |= {f"{name}.lora_down.weight": normal(2 + place, 6), f"{name}.lora_up.weight": normal(5, 2 + place)}
        tensors[f"{name}.alpha"] = torch.tensor(1.0 if place < 3 else 7.0)
    save_file(tensors, tmp_path / "a.safetensors")
    found = stored(tmp_path / "a.safetensors")
    write(tmp_path / "b.safetensors", found, {name: found.factors(name) for name in names})
    again = load_file(tmp_path / "b.safetensors")
    assert {float(again[f"{name}.alpha"]) for name in names} == {1.0}
    for name in names:
        before, after = found.factors(name), stored(tmp_path / "b.safetensors").factors(name)
        assert torch.allclose(before.scale * before.B @ before.A, after.scale * after.B @ after.A, atol=1e-6)
    assert torch.equal(again[f"{names[0]}.lora_up.weight"], tensors[f"{names[0]}.lora_up.weight"])


def test_halves_keep_their_type_and_an_alpha_that_it_cannot_hold_goes_into_b(tmp_path):
    tensors = {key: value.bfloat16() for key, value in PLAIN.items()} | {f"{NAME}.alpha": torch.tensor(3.0).bfloat16()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = stored(tmp_path / "a.safetensors")
    new = Factors(normal(3, 6), normal(6, 3), 1 / 3 + 0.001)
    write(tmp_path / "b.safetensors", found, {NAME: new})
    again = load_file(tmp_path / "b.safetensors")
    assert {value.dtype for value in again.values()} == {torch.bfloat16}
    product = again[f"{NAME}.alpha"].double() / 3 * again[f"{NAME}.lora_up.weight"].double()
    assert torch.allclose(product, new.scale * new.B.double(), rtol=2**-8)
    large = {f"{NAME}.lora_down.weight": normal(2, 6).half(), f"{NAME}.lora_up.weight": torch.full((6, 2), 6e4).half()}
    save_file(large, tmp_path / "large.safetensors")
    found = stored(tmp_path / "large.safetensors")
    with pytest.raises(rw.InputError, match="numbers cannot hold B times 2"):
        write(tmp_path / "c.safetensors", found, {NAME: Factors(*large.values(), 2.0)})
    assert not (tmp_path / "c.safetensors").exists()


def test_a_single_file_goes_to_a_name_that_says_so(tmp_path):
    save_file(PLAIN, tmp_path / "a.safetensors")
    found = stored(tmp_path / "a.safetensors")
    new = {NAME: found.factors(NAME)}
    with pytest.raises(rw.InputError, match=r"give a name that ends in .safetensors"):
        write(tmp_path / "b", found, new)
    write(tmp_path / "b.safetensors", found, new)
    with pytest.raises(rw.InputError, match="is there already"):
        write(tmp_path / "b.safetensors", found, new)
    write(tmp_path / "a.safetensors", found, {NAME: Factors(normal(1, 6), normal(6, 1), 1.0)}, force=True)
    assert stored(tmp_path / "a.safetensors").rank(NAME) == 1  # though it was read while it was replaced
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(rw.InputError, match="is a folder"):
        write(tmp_path / "folder.safetensors", found, new, force=True)
    for name in ("a.pt", "a.bin", "a.ckpt"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(rw.InputError, match="is no safetensors file; only those are read"):
            stored(tmp_path / name)
    with pytest.raises(rw.InputError, match="neither adapter_config.json nor one safetensors file"):
        stored(tmp_path)
