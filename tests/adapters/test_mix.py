"""The sum of adapters on disk is the sum of what they do in stock PEFT."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
from models import stirred
from rankwise.adapters.cut import spectrum
from rankwise.adapters.layers import Factors
from rankwise.adapters.mix import Mixed
from rankwise.adapters.stored import stored

LAYERS = ["linear", "table", "line", "space"]
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.table = nn.Embedding(11, 6)
        self.line = nn.Conv1d(4, 6, 3)
        self.space = nn.Conv3d(2, 7, 2)
        self.head = nn.Linear(3, 2)


def adapted(folder, seed=0, **options):
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 6, "target_modules": LAYERS, **options}
    model = get_peft_model(Layers(), LoraConfig(**options))
    torch.manual_seed(seed)
    stirred(model, seed).save_pretrained(folder)
    return folder


def deltas(folder):
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Layers(), folder).base_model.model
    layers = {name: model.get_submodule(name) for name in LAYERS}
    return {
        name: layer.get_delta_weight("default").detach().double().flatten(1)
        if hasattr(layer, "lora_A")
        else torch.zeros_like(layer.weight).double().flatten(1)
        for name, layer in layers.items()
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two adapters with other ranks, scales and layers."""
    folder = tmp_path_factory.mktemp("pair")
    adapted(folder / "a", 1, use_rslora=True, rank_pattern={"line": 5}, target_modules=["linear", "line", "space"])
    return folder / "a", adapted(
        folder / "b", 2, alpha_pattern={"linear": 1}, target_modules=["linear", "line", "table"]
    )


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, -1), (-2.5, 1e-3)])
def test_a_sum_without_a_limit_is_exact(pair, weights, tmp_path):
    done = rw.mix(dict(zip(pair, weights, strict=True)), tmp_path / "sum")
    one, other, both = map(deltas, (*pair, tmp_path / "sum"))
    for name in LAYERS:
        assert (both[name] - weights[0] * one[name] - weights[1] * other[name]).abs().max() < 1e-6, name
    assert done.error < 1e-6 and {site.site for site in done.sites} == {*LAYERS}


def test_within_a_budget_it_is_the_best_low_rank_sum(pair, tmp_path):
    done = rw.mix({pair[0]: 0.7, pair[1]: 0.3}, tmp_path / "sum", budget=150)
    one, other, both = map(deltas, (*pair, tmp_path / "sum"))
    assert (
        done.parameters <= 150
        and sum(v.numel() for v in load_file(tmp_path / "sum/adapter_model.safetensors").values()) == done.parameters
    )
    for site in done.sites:
        whole = 0.7 * one[site.site] + 0.3 * other[site.site]
        U, S, V = torch.linalg.svd(whole, full_matrices=False)
        best = (U[:, : site.rank] * S[: site.rank]) @ V[: site.rank]
        assert (both[site.site] - best).abs().max() < 1e-6
        assert site.error == pytest.approx(float(S[site.rank :].norm()), abs=1e-6)


def test_what_two_share_needs_no_more_rank_than_one(pair, tmp_path):
    rw.mix({pair[0]: 1.0}, tmp_path / "one")
    done = rw.mix({pair[0]: 0.7, tmp_path / "one": 0.3}, tmp_path / "sum")
    found = stored(pair[0])
    assert {site.site: site.rank for site in done.sites} == {name: found.rank(name) for name in found.names}
    one, both = deltas(pair[0]), deltas(tmp_path / "sum")
    assert all((one[name] - both[name]).abs().max() < 1e-6 for name in LAYERS)
    with pytest.raises(rw.InputError, match="adds nothing"):
        rw.mix({tmp_path / "one": 1, shutil.copytree(tmp_path / "one", tmp_path / "two"): -1}, tmp_path / "none")


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(-3, 3)), min_size=1, max_size=4), st.integers(0, 99))
def test_factors_side_by_side_are_the_sum(parts, seed):
    draw = torch.Generator().manual_seed(seed)

    class Held:
        def __init__(self, rank):
            self.layers, self.names = {"x": None}, ["x"]
            self.own = Factors(torch.randn(rank, 6, generator=draw), torch.randn(7, rank, generator=draw), 0.5)

        def factors(self, name):
            return self.own

    held = [(Held(rank), weight) for rank, weight in parts]
    found = Mixed(held).factors("x")
    expected = sum(0.5 * weight * each.own.B.double() @ each.own.A.double() for each, weight in held)
    assert (found.B.double() @ found.A.double() - expected).abs().max() < 1e-5
    assert spectrum(found).norm == pytest.approx(float(torch.linalg.norm(expected)), abs=1e-4)


def test_what_cannot_be_mixed_is_refused_in_one_line(pair, tmp_path):
    other = adapted(tmp_path / "head", modules_to_save=["head"])
    config = json.loads((pair[0] / "adapter_config.json").read_text())
    (tmp_path / "c").mkdir()
    (tmp_path / "c/adapter_model.safetensors").write_bytes((pair[0] / "adapter_model.safetensors").read_bytes())
    (tmp_path / "c/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another/model"}))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/adapter_model.safetensors").write_bytes((pair[0] / "adapter_model.safetensors").read_bytes())
    (tmp_path / "d/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "my/models"}))
    save_file(
        {"l.lora_down.weight": torch.ones(1, 8), "l.lora_up.weight": torch.ones(12, 1)}, tmp_path / "k.safetensors"
    )
    wide = {"l.lora_down.weight": torch.ones(1, 9), "l.lora_up.weight": torch.ones(12, 1)}
    save_file(wide, tmp_path / "w.safetensors")
    dora = adapted(tmp_path / "dora", use_dora=True, target_modules=["linear"])
    for second, message in [
        (other, "head.* is not the same in"),
        (tmp_path / "k.safetensors", "only adapters of one format can be mixed"),
        (dora, "has a magnitude"),
    ]:
        with pytest.raises(rw.InputError, match=message):
            rw.mix({pair[1]: 1, second: 1}, tmp_path / "out")
    with pytest.raises(rw.InputError, match="is for another/model and .* for my/models"):
        rw.mix({tmp_path / "c": 1, tmp_path / "d": 1}, tmp_path / "out")
    with pytest.raises(rw.InputError, match=r"l is \(8, 12\) in .* but \(9, 12\) in"):
        rw.mix({tmp_path / "k.safetensors": 1, tmp_path / "w.safetensors": 1}, tmp_path / "out.safetensors")
    for weight in (0, float("nan"), float("inf")):
        with pytest.raises(rw.InputError, match="a weight that is not 0"):
            rw.mix({pair[0]: weight}, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


def test_the_card_of_one_is_not_that_of_the_sum_and_the_base_weights_are_the_same(pair, tmp_path):
    one, other = (shutil.copytree(path, tmp_path / path.name) for path in pair)
    (one / "README.md").write_text("---\ntags:\n- rankwise\n---\n# One\n## Ranks\nnone\n## Use\nit")
    for folder, base in ((one, "a"), (other, "a")):
        (folder / "use.json").write_text(
            json.dumps({"settings": {"task": {"name": "mrpc"}}, "base": base, "format": 1})
        )
    rw.resize_adapter(one, tmp_path / "small", rank=1)
    assert "the scores are from before" in (tmp_path / "small" / "README.md").read_text()
    rw.mix({one: 1, other: 1}, tmp_path / "sum")
    assert not (tmp_path / "sum" / "README.md").exists() and (tmp_path / "sum" / "use.json").exists()
    (other / "use.json").write_text((one / "use.json").read_text().replace('"a"', '"b"'))
    with pytest.raises(rw.InputError, match="were trained on different base weights"):
        rw.mix({one: 1, other: 1}, tmp_path / "none")


def test_files_of_kohya_with_different_layers_have_all_of_them_in_their_sum(tmp_path):
    """A convolution that only the second one has is written as kohya does."""
    draw = torch.Generator().manual_seed(0)

    def save(name, alpha, **shapes):
        tensors = {}
        for layer, (inputs, outputs, kernel) in shapes.items():
            tensors[f"lora_unet_{layer}.lora_down.weight"] = torch.randn(2, inputs, *kernel, generator=draw)
            ones = [1 for _ in kernel]
            tensors[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(outputs, 2, *ones, generator=draw)
            tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(alpha)
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    one = save("one.safetensors", 1.0, q=(5, 6, ()), k=(5, 4, ()))
    other = save("other.safetensors", 4.0, q=(5, 6, ()), conv=(3, 7, (3, 3)))
    rw.mix({one: 0.5, other: 2.0}, tmp_path / "sum.safetensors")
    product = lambda found, name: found.factors(name).scale * found.factors(name).B @ found.factors(name).A  # noqa: E731
    first, second, both = map(stored, (one, other, tmp_path / "sum.safetensors"))
    assert sorted(both.names) == ["lora_unet_conv", "lora_unet_k", "lora_unet_q"]
    expected = {
        "lora_unet_q": 0.5 * product(first, "lora_unet_q") + 2 * product(second, "lora_unet_q"),
        "lora_unet_k": 0.5 * product(first, "lora_unet_k"),
        "lora_unet_conv": 2 * product(second, "lora_unet_conv"),
    }
    for name, whole in expected.items():
        assert torch.allclose(product(both, name), whole, atol=1e-5), name
    assert load_file(tmp_path / "sum.safetensors")["lora_unet_conv.lora_down.weight"].shape == (2, 3, 3, 3)


def test_the_command_takes_weights_after_a_colon(pair, tmp_path, cli):
    out = tmp_path / "sum"
    code, shown, log = cli("mix", f"{pair[0]}:0.7", f"{pair[1]}:0.3", "--budget", "150", "-o", str(out))
    assert code == 0 and "of the energy is kept" in shown and "wrote" in log
    assert stored(out).names
    for wrong in ([str(pair[0])], [f"{pair[0]}:x"], [f"{pair[0]}:1", f"{pair[0]}:2"], [":1"]):
        code, _, log = cli("mix", *wrong, "-o", str(tmp_path / "no"))
        assert code == 2 and "as in a:0.7 b:0.3" in log
