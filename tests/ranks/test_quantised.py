"""Quantised base weights are codes: they are read as the numbers they mean, and never as something learnt."""

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import models
import rankwise as rw
from methods import goes_on_bit_identically
from rankwise.ranks import sites

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[dev]'")
pytestmark = [pytest.mark.large, pytest.mark.filterwarnings("ignore:MatMul8bitLt")]
KINDS = {
    "8 bits": (bitsandbytes.nn.Linear8bitLt, {"has_fp16_weights": False}),
    "4 bits": (bitsandbytes.nn.Linear4bit, {"quant_type": "nf4"}),
    "4 bits in bf16": (bitsandbytes.nn.Linear4bit, {"quant_type": "fp4", "quant_storage": torch.bfloat16}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def base(kind=None):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=3, pad_token_id=0, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    if kind is not None:
        made, options = KINDS[kind]
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and name != "score":
                codes = made(layer.in_features, layer.out_features, layer.bias is not None, **options)
                codes.load_state_dict(layer.state_dict())
                model.set_submodule(name, codes.to("cpu"))
    return model.eval()


@every_kind
def test_an_svd_start_is_that_of_the_numbers_that_the_codes_mean(kind):
    plain = {site.name: site.W for site in sites(rw.LoRA(rank=1).attach(base()))}
    codes = base(kind)
    before = models.logits(codes)  # bitsandbytes puts the scales of 8-bit codes elsewhere when a layer runs
    model = rw.LoRA(rank=8, alpha=8, init="svd").attach(codes, head=["score"])
    for site in sites(model):
        assert (site.W - plain[site.name]).norm() < 0.15 * plain[site.name].norm()  # the codes are no finer than that
        assert torch.linalg.matrix_norm(site.W - site.B @ site.A, 2) <= 1.01 * torch.linalg.svdvals(site.W.float())[8]
    with model.disable_adapter():
        assert torch.allclose(models.logits(model), before, atol=1e-2)
    assert torch.isfinite(models.logits(model)).all()


@every_kind
@pytest.mark.parametrize("options", [{"init": "svd_residual"}, {"init": "pissa"}])
def test_a_start_or_an_end_that_changes_the_codes_is_refused(kind, options):
    with pytest.raises(rw.InputError, match="is quantised, so its weight cannot change"):
        rw.LoRA(rank=2, **options).attach(base(kind))
    with pytest.raises(rw.InputError, match="is quantised, so its weight cannot change"):
        rw.SimplexLoRA(rank=2, empty="merge").attach(base(kind))
    with pytest.raises(rw.InputError, match="quantised weights cannot train"):
        rw.Full().attach(base(kind))


def test_codes_that_nobody_knows_are_no_numbers():
    model = base()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.int8), requires_grad=False)
    with pytest.raises(rw.InputError, match="cannot be dequantised: use init=kaiming"):
        rw.LoRA(rank=2, init="svd").attach(model)


@pytest.mark.parametrize("kind", ["8 bits", "4 bits"])  # as floats some codes are NaN, which equals nothing
def test_a_checkpoint_holds_what_is_learnt_and_goes_on_exactly(kind, tmp_path):
    method = rw.SimplexLoRA(rank=2, every=1, times=2)

    def start():
        torch.manual_seed(1)
        model = method.attach(base(kind), head=["score"])
        return model, rw.SimplexAdam(method, model, lr=1e-2)

    goes_on_bit_identically(start, 3, tmp_path / "cut")
    names = torch.load(tmp_path / "cut" / "checkpoint.pt")["model"]
    assert all("lora_" in name or "modules_to_save" in name for name in names)


@every_kind
@pytest.mark.parametrize("made", [rw.BitFit, rw.AdapterH, rw.LoRA])
def test_what_is_saved_beside_codes_is_what_was_learnt(kind, made, tmp_path):
    method = made()
    model = method.attach(base(kind), head=["score"])
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), 2)
    before = models.logits(model)
    rw.save(model, tmp_path / "made", method, head=["score"])
    with safe_open(tmp_path / "made" / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "absmax" in name or "SCB" in name or "quant" in name]  # noqa: SIM118
    again = rw.load(base(kind), tmp_path / "made")
    assert torch.allclose(models.logits(again), before, atol=1e-3)


@every_kind
def test_gradients_reach_every_site_after_evaluations(kind):
    """On CPUs with AVX512-BF16 bitsandbytes rewrites 4-bit codes in an evaluation, and no gradient passes them."""
    model = base(kind)
    models.logits(model)
    model = rw.LoRA(rank=2).attach(model, head=["score"])
    before = models.logits(model)
    model.train()(**models.batch()).loss.backward()
    assert all(site.B.grad.any() for site in sites(model))
    assert torch.equal(models.logits(model), before)
