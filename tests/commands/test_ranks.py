"""What is shown of an adapter on disk."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

import rankwise as rw
from models import stirred
from rankwise.adapters.layers import Factors
from rankwise.adapters.overlap import shared, svd

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")


def adapted(folder, seed, **options):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(5, 9), nn.Linear(4, 4), nn.Conv2d(4, 4, 1, groups=2))
    options = {"r": 2, "target_modules": ["0", "1", "2"], **options}
    stirred(get_peft_model(base, LoraConfig(**options)), seed).save_pretrained(folder)
    return folder


def test_each_layer_has_its_rank_norm_and_energy(tmp_path, cli):
    adapted(tmp_path / "a", 0, rank_pattern={"1": 3}, target_modules=["0", "1", "2", "3"])
    code, shown, _ = cli("ranks", tmp_path / "a", "--json", "--picture", tmp_path / "p.svg")
    found = json.loads(shown)
    assert code == 0 and (tmp_path / "p.svg").exists() and found["fixed"] == ["3"]
    assert [(site["site"], site["rank"], site["cost"]) for site in found["sites"]] == [
        ("0", 2, 20),
        ("1", 3, 14),
        ("2", 2, 8),
    ]
    assert sum(site["energy"] for site in found["sites"]) == pytest.approx(1)
    for site in found["sites"]:
        factors = rw.adapter_ranks(tmp_path / "a") and stored_factors(tmp_path / "a", site["site"])
        whole = factors.scale * factors.B.double() @ factors.A.double()
        values = torch.linalg.svdvals(whole)
        assert site["norm"] == pytest.approx(float(values.norm())) and site["top"] == pytest.approx(float(values[0]))
        share = values.square().cumsum(0) / values.square().sum()
        assert share[site["half"] - 1] >= 0.5 - 1e-9 and share[site["most"] - 1] >= 0.99 - 1e-9
        assert site["half"] == 1 or share[site["half"] - 2] < 0.5
    code, shown, _ = cli("ranks", tmp_path / "a")
    assert code == 0 and "not shown: 3" in shown and "3 layers, 98 parameters" in shown


def stored_factors(folder, name):
    from rankwise.adapters.stored import stored

    return stored(folder).factors(name)


def test_two_adapters_are_compared_layer_by_layer(tmp_path, cli):
    one = adapted(tmp_path / "a", 0, rank_pattern={"0": 4, "1": 3}, lora_alpha=2)
    same = rw.adapter_ranks(one, one)
    assert all(site.shared.cosine == pytest.approx(1) == site.shared.outputs for site in same.sites)
    assert same.rank_correlation == pytest.approx(1) and same.norm_correlation == pytest.approx(1)
    other = adapted(tmp_path / "b", 1, target_modules=["1", "2"])
    found = rw.adapter_ranks(one, other)
    assert [site.other_rank for site in found.sites] == [0, 2, 2] and found.sites[0].shared is None
    assert found.rank_correlation is not None and -1 <= found.rank_correlation < 0
    code, shown, _ = cli("ranks", one, "--compare", other)
    assert code == 0 and "2 layers in common" in shown and "rank correlation (Spearman) of the norms" in shown
    flat = rw.adapter_ranks(adapted(tmp_path / "c", 2), adapted(tmp_path / "d", 3))
    assert flat.rank_correlation is None and "none, as one adapter has the same value at every layer" in flat.text()
    save_file(
        {"l.lora_down.weight": torch.ones(1, 8), "l.lora_up.weight": torch.ones(12, 1)}, tmp_path / "k.safetensors"
    )
    code, _, log = cli("ranks", one, "--compare", tmp_path / "k.safetensors")
    assert code == 2 and "no layer in common" in log


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99), st.floats(0.1, 9))
def test_what_two_layers_share_is_what_their_products_say(rank, other_rank, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    one, other = (
        Factors(torch.randn(r, 6, generator=draw), torch.randn(7, r, generator=draw), s)
        for r, s in ((rank, scale), (other_rank, -1.0))
    )
    whole, second = (each.scale * each.B.double() @ each.A.double() for each in (one, other))
    U, S, V = svd(one)
    assert (U * S @ V.T - whole).abs().max() < 1e-9
    found = shared(one, other)
    assert found.cosine == pytest.approx(float((whole * second).sum() / whole.norm() / second.norm()), abs=1e-9)
    bases = [torch.linalg.svd(each, full_matrices=False) for each in (whole, second)]
    k = [rank, other_rank]
    for side, value in ((0, found.outputs), (2, found.inputs)):
        spaces = [b[side][:, :n] if side == 0 else b[side][:n].T for b, n in zip(bases, k, strict=True)]
        angles = torch.linalg.svdvals(spaces[0].T @ spaces[1])
        assert value == pytest.approx(float(angles.square().mean()), abs=1e-9) and 0 <= value <= 1 + 1e-9
    inside = Factors(one.A[:1], one.B[:, :1], 1.0)
    assert shared(one, inside).outputs == pytest.approx(1) == shared(one, inside).inputs
    assert shared(one, Factors(one.A, torch.zeros_like(one.B), 1.0)) is None
