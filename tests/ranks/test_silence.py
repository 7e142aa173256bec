"""Sites without a gradient are named once, and only then a search takes their rank."""

import warnings

import pytest
import torch
import transformers
from torch import nn

import models
import rankwise as rw
from rankwise.ranks import ranks, sites

pytestmark = pytest.mark.filterwarnings("ignore:.* of the weights of .* are in no layer")
TOKENS = {"vocab_size": 64, "num_labels": 3, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def jamba():
    config = transformers.JambaConfig(
        **TOKENS, **SMALL, num_key_value_heads=1, num_experts=1, attn_layer_period=2, attn_layer_offset=1,
        mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    return transformers.AutoModelForSequenceClassification.from_config(config)


def siglip():
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    config = transformers.SiglipVisionConfig(**vision)
    return transformers.SiglipVisionModel(config)


def wavlm():
    config = transformers.WavLMConfig(
        **SMALL, num_labels=3, conv_dim=(8,), conv_kernel=(4,), conv_stride=(4,), num_conv_pos_embeddings=2,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    return transformers.AutoModelForAudioClassification.from_config(config)


def torchs():
    return nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)


def loss(model, seed):
    """Some number of what the model gives for a batch of its kind."""
    kind = type(model.get_base_model()).__name__
    torch.manual_seed(seed)
    if kind.startswith("Siglip"):
        out = model(pixel_values=torch.randn(2, 3, 8, 8)).pooler_output
    elif kind.startswith("WavLM"):
        out = model(torch.randn(2, 64)).logits
    elif kind.startswith("Transformer"):
        out = model(torch.randn(2, 5, 32))
    else:
        out = model(input_ids=models.batch(2)["input_ids"]).logits
    return (out * torch.randn(out.shape)).sum()


def run(model, method, steps, optimizer=None):
    optimizer = optimizer or rw.SimplexAdam(method, model, lr=1e-2)
    for step in range(optimizer.steps, optimizer.steps + steps):
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("made", [jamba, siglip, torchs, wavlm])
def test_layers_that_never_run_are_named_once_and_lose_their_rank_to_the_others(made):
    torch.manual_seed(0)
    method = rw.SimplexLoRA(rank=2, every=3, times=2)
    model = method.attach(made())
    whole = rw.rank_report(model).total
    with pytest.warns(UserWarning, match="no gradient has reached") as told:
        optimizer = run(model, method, 2)
        assert not told and set(ranks(model).values()) == {2}
        run(model, method, 6, optimizer)
    assert len(told) == 1
    dead = {site.name for site in sites(model) if site.dead}
    assert dead and {name for name, rank in ranks(model).items() if not rank} >= dead
    assert all(site.B.any() for site in sites(model) if site.present)
    assert whole - max(site.cost for site in sites(model)) < rw.rank_report(model).total <= whole


def test_in_a_run_whose_ranks_stay_they_are_named_at_step_10(tmp_path):
    torch.manual_seed(0)
    method = rw.LoRA(rank=2)
    model = method.attach(torchs())
    optimizer = run(model, method, 9)
    rw.save_checkpoint(tmp_path / "cut", model, optimizer)
    with pytest.warns(
        UserWarning, match=r"1 of 3 sites, .*learn nothing: self_attn\.out_proj; leave them out of targets$"
    ) as told:
        run(model, method, 3, optimizer)
    assert len(told) == 1
    torch.manual_seed(0)
    again = method.attach(torchs())
    resumed = rw.SimplexAdam(method, again, lr=1e-2)
    rw.load_checkpoint(tmp_path / "cut", again, resumed)
    with pytest.warns(UserWarning, match="no gradient"):
        run(again, method, 1, resumed)
    rw.save_checkpoint(tmp_path / "cut", again, resumed)
    torch.manual_seed(0)
    last = method.attach(torchs())
    resumed = rw.SimplexAdam(method, last, lr=1e-2)
    rw.load_checkpoint(tmp_path / "cut", last, resumed)
    run(last, method, 12, resumed)  # not named again
    assert [site.name for site in sites(last) if site.dead] == ["self_attn.out_proj"]


def test_one_micro_batch_with_a_gradient_is_enough():
    model = rw.LoRA(rank=2, targets=["used", "idle"]).attach(models.Half(4))
    optimizer = rw.SimplexAdam(rw.LoRA(rank=2), model)
    for step in range(11):
        x = torch.ones(1, 4)
        out = model.get_base_model().idle(x) if step == 4 else model(x)
        out.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(site.dead for site in sites(model))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_experts_that_wait_for_their_first_token_are_not_dead():
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=8,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=8, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    method = rw.LoRA(rank=2)
    model = method.attach(transformers.SwitchTransformersForConditionalGeneration(config))
    optimizer = rw.SimplexAdam(method, model, lr=1e-3)
    ids = torch.tensor([[5, 6, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(11):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    unrouted = [site.name for site in sites(model) if not site.B.any()]
    assert unrouted and all("expert_" in name for name in unrouted)


def test_a_layer_that_is_not_used_in_an_expert_that_is_has_no_excuse():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([models.Half(4) for _ in range(3)])

        def forward(self, x):
            return self.experts[0](x)

    model = rw.LoRA(rank=2).attach(Experts())
    optimizer = rw.SimplexAdam(rw.LoRA(rank=2), model)
    with pytest.warns(UserWarning, match=r"1 of 6 sites, .*learn nothing: experts\.\*\.idle \(1\)"):
        for _ in range(10):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
