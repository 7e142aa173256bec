"""Adapters on q and v of GPT-2's fused projection: two sites while they train, one plain adapter when saved."""

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainingArguments, default_data_collator
from transformers.pytorch_utils import Conv1D

import models
import rankwise as rw
import stock_peft
from methods import method
from rankwise.nets.fused import Fused, Part
from rankwise.ranks import RankPlan, ranks, sites
from rankwise.ranks.sites import omega

QV = ["c_attn.q", "c_attn.v"]
WHOLES = [f"transformer.h.{layer}.attn.c_attn" for layer in range(2)]
SITES = [f"{whole}.{part}" for whole in WHOLES for part in "qv"]


def classifier(seed=0):
    return models.model("gpt2", seed)


def language_model(seed=0):
    config = transformers.GPT2Config(
        vocab_size=models.VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(config).eval()


def attached(name="lora", base=classifier, **options):
    torch.manual_seed(1)
    head = models.head("gpt2") if base is classifier else []
    return method(name, **{"targets": QV, **options}).attach(base(), head=head)


@torch.no_grad()
def filled(model, std=0.2):
    """With factors as they might be after some training."""
    for site in sites(model):
        if site.present:
            torch.nn.init.normal_(site.B, std=std)
    return model


def inputs():
    return {name: value for name, value in models.batch().items() if name != "labels"}


@torch.no_grad()
def logits(model):
    return model.eval()(**inputs()).logits


def exported(model, base=classifier, layout=None):
    """What stock PEFT makes of the saved adapter, on an untouched base model."""
    with tempfile.TemporaryDirectory() as folder:
        rw.save(model, Path(folder) / "adapter", layout=layout)
        return PeftModel.from_pretrained(base(), str(Path(folder) / "adapter")).eval()


# --- attaching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [classifier, language_model])
@pytest.mark.parametrize("name", ["lora", "dora", "simplex-lora", "sora", "adalora"])
@pytest.mark.parametrize("train", [False, True])
def test_attaching_leaves_the_logits_bit_for_bit(base, name, train):
    model, plain = attached(name, base).train(train), base().train(train)
    torch.manual_seed(7)  # the model's own dropout
    found = model(**inputs()).logits
    torch.manual_seed(7)
    assert torch.equal(found, plain(**inputs()).logits)


def test_the_sites_are_q_and_v_and_nothing_else_trains_but_the_head():
    model = attached(rank=2)
    assert ranks(model) == dict.fromkeys(SITES, 2)
    assert all((site.in_features, site.out_features) == (16, 16) for site in sites(model))
    assert rw.rank_report(model).total == 2 * 2 * 2 * (16 + 16)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        *(f"base_model.model.{site}.lora_{factor}.default.weight" for site in SITES for factor in "AB"),
        "base_model.model.score.modules_to_save.default.weight",
    }


@pytest.mark.parametrize(
    ("config", "count"),
    [  # 12 layers x 2 x 4 x (768 + 768), and so on
        ({"n_embd": 768, "n_layer": 12, "n_head": 12}, 147_456),
        ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, 393_216),
        ({"n_embd": 1280, "n_layer": 36, "n_head": 20}, 737_280),
        ({"n_embd": 12288, "n_layer": 96, "n_head": 96}, 18_874_368),
    ],
)
def test_counts_on_the_meta_device(config, count):
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
        whole = sum(p.numel() for p in model.parameters())
        model = rw.LoRA(rank=4, targets=QV).attach(model)
    assert len(sites(model)) == 2 * config["n_layer"] and rw.rank_report(model).total == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in model.parameters()) == count + whole


def test_an_adapter_on_q_changes_q_alone():
    model, base = filled(attached(targets=["c_attn.q"])), classifier()
    layer, plain = model.get_base_model().get_submodule(WHOLES[0]), base.get_submodule(WHOLES[0])
    x = torch.randn(2, 5, 16)
    q, k, v = (layer(x) - plain(x)).split(16, dim=-1)
    site = sites(model)[0]
    assert torch.allclose(q, site.scaling * x @ site.A.T @ site.B.T, atol=1e-5) and not k.any() and not v.any()


def test_one_layer_alone_and_a_part_beside_other_layers_can_be_named():
    model = attached(targets=["h.1.attn.c_attn.k", "mlp.c_proj", "h.0.attn.c_attn"])
    assert list(ranks(model)) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.attn.c_attn.k",
        "transformer.h.1.mlp.c_proj",
    ]
    base = model.get_base_model()
    assert isinstance(base.get_submodule(WHOLES[1]), Fused) and not isinstance(base.get_submodule(WHOLES[0]), Fused)
    assert torch.allclose(logits(exported(filled(model))), logits(model), atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"]])
def test_whole_modules_stay_whole(targets):
    model = attached(targets=targets)
    assert not any(isinstance(module, (Fused, Part)) for module in model.modules())
    assert {name.rpartition(".")[2] for name in ranks(model)} >= {"c_attn"}


@pytest.mark.parametrize(
    ("base", "targets", "message"),
    [
        (classifier, ["c_attn.x"], "match: all-linear, c_attn, c_attn.k, c_attn.q, c_attn.v, c_fc, c_proj"),
        (classifier, ["c_attn.q", "c_attn.w"], "c_attn.w.*c_attn.v"),
        (classifier, ["c_proj.q"], "c_proj.q.*c_attn.q"),
        (classifier, ["c_attn", "c_attn.q"], r"h\.0\.attn\.c_attn\.q and also the whole"),
        (classifier, ["c_attn.v", "h.1.attn.c_attn"], r"h\.1\.attn\.c_attn\.v and also the whole"),
        (classifier, "all-linear+c_attn.q", r"h\.0\.attn\.c_attn\.q and also the whole"),
        (lambda: models.model("bert"), ["c_attn.q"], "match: all-linear, dense, key, query, value$"),
    ],
)
def test_targets_that_cannot_be_get_one_clear_line_and_change_nothing(base, targets, message):
    model = base()
    with pytest.raises(rw.InputError, match=message) as caught:
        rw.LoRA(rank=2, targets=targets).attach(model)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, Fused) for module in model.modules())


def test_a_rank_above_the_width_of_a_part_is_refused():
    with pytest.raises(rw.InputError, match=r"large for transformer\.h\.0\.attn\.c_attn\.q, which allows at most 16"):
        attached(rank=17)


def test_a_model_whose_adapter_went_can_be_attached_whole_again():
    base = attached().unload()
    assert torch.equal(logits(base), logits(classifier()))
    again = rw.LoRA(rank=2).attach(base)
    assert not any(isinstance(module, Fused) for module in again.modules())
    assert list(ranks(again)) == list(ranks(rw.LoRA(rank=2).attach(classifier())))


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    def losses(checkpointing):
        model = attached()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
            models.recompute(model.get_base_model(), {"use_reentrant": reentrant})
        return models.train(model, rw.SimplexAdam(method("lora"), model, lr=1e-2), 4)

    assert losses(True) == pytest.approx(losses(False), abs=1e-6)


@pytest.mark.large
def test_compiled_and_generating_it_says_the_same():
    model = filled(attached(base=language_model))
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled), logits(model), atol=1e-6)
    start = {"input_ids": torch.tensor([[5, 9, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        words = model.generate(**start, max_new_tokens=6, do_sample=False)  # through the cache of keys and values
        for place in range(3, words.shape[1]):
            assert model(words[:, :place]).logits[0, -1].argmax() == words[0, place]


def test_bf16_autocast_trains():
    model = attached("simplex-lora")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = models.train(model, rw.SimplexAdam(method("simplex-lora"), model, lr=1e-2), 5)
    assert torch.isfinite(torch.tensor(losses)).all()


def test_a_deep_copy_is_a_model_of_its_own():
    model = filled(attached("simplex-lora"))
    before = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for site in sites(model):
            site.W.zero_()
        omega(model).zero_()
    assert torch.equal(logits(twin), before) and not torch.allclose(logits(model), before, atol=1e-3)
    twin.merge_adapter()
    assert torch.allclose(logits(twin), before, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_taking_it_back_work_on_the_one_weight(name, safe):
    model = filled(attached(name))
    before, weight = logits(model), model.get_base_model().get_submodule(WHOLES[0]).weight
    old = weight.detach().clone()
    model.merge_adapter(safe_merge=safe)
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert not torch.allclose(weight[:, :16], old[:, :16]) and torch.equal(weight[:, 16:32], old[:, 16:32])
    model.unmerge_adapter()
    assert torch.allclose(weight, old, atol=1e-6) and torch.allclose(logits(model), before, atol=1e-5)


def test_the_base_weights_of_another_state_dict_load_by_their_usual_names():
    model = attached()
    missing, unexpected = model.get_base_model().load_state_dict(
        {name: value for name, value in classifier(seed=3).state_dict().items() if "c_attn" in name}, strict=False
    )
    assert not unexpected and not any("c_attn.weight" in name for name in missing)
    assert torch.equal(sites(model)[0].W, classifier(seed=3).get_submodule(WHOLES[0]).weight[:, :16].T)


def bare(steps, cut, folder, resume):
    model = attached("simplex-lora")
    optimizer = rw.SimplexAdam(method("simplex-lora"), model, lr=1e-2)
    torch.manual_seed(5)
    start = rw.load_checkpoint(folder, model, optimizer) if resume else 0
    losses = []
    for step in range(start, steps):
        losses += models.train(model, optimizer, 1, start=step)
        if step + 1 == cut and not resume:
            rw.resize(model, {SITES[0]: 0, SITES[1]: 3}, optimizer)
            rw.save_checkpoint(folder, model, optimizer)
    return losses, model


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_bare_loop_cut_at_any_step_goes_on_bit_identically(cut, tmp_path):
    whole, model = bare(7, cut, tmp_path / "checkpoint", resume=False)
    rest, resumed = bare(7, cut, tmp_path / "checkpoint", resume=True)
    assert rest == whole[cut:] and ranks(resumed) == ranks(model)
    a, b = model.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_trainer_resumes_bit_identically(tmp_path):
    def trained(folder, resume=None):
        model = attached("simplex-lora")
        args = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, seed=3, save_strategy="steps",
            save_steps=1, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = rw.RankTrainer(
            method=method("simplex-lora"), model=model, args=args, train_dataset=models.rows(),
            data_collator=default_data_collator,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}, model

    losses, model = trained(tmp_path / "whole")
    again, resumed = trained(tmp_path / "rest", str(tmp_path / "whole" / "checkpoint-3"))
    assert again == losses
    a, b = model.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- saving ----------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(plan=st.lists(st.integers(0, 6), min_size=4, max_size=4), alpha=st.sampled_from([1.0, 6.5, 16.0]))
def test_the_export_is_the_model_whatever_the_ranks(plan, alpha):
    assume(any(plan))
    model = attached(rank=3, alpha=alpha)
    rw.resize(model, dict(zip(SITES, plan, strict=True)))
    filled(model)
    before, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.allclose(logits(exported(model)), before, atol=1e-5)
    again = exported(model, layout="compact")
    assert torch.allclose(logits(again), before, atol=1e-5)
    assert ranks(again) == {w: q + v for w, q, v in zip(WHOLES, plan[::2], plan[1::2], strict=True) if q + v}
    # The model that was saved is as it was, its configuration too.
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), before)
    rw.resize(model, dict.fromkeys(SITES, 1))


@settings(max_examples=20, deadline=None)
@given(q=st.integers(0, 5), k=st.integers(0, 5), v=st.integers(0, 5))
def test_the_joined_factors_are_the_parts_stacked_with_zeros_elsewhere(q, k, v):
    assume(q + k + v)
    model = attached(targets=["h.0.attn.c_attn.q", "h.0.attn.c_attn.k", "c_attn.v"], base=language_model)
    plan = {f"{WHOLES[0]}.q": q, f"{WHOLES[0]}.k": k, f"{WHOLES[0]}.v": v, f"{WHOLES[1]}.v": 0}
    rw.resize(model, plan)
    filled(model)
    with tempfile.TemporaryDirectory() as folder:
        rw.save(model, Path(folder) / "adapter", layout="compact")
        stored = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
        config = json.loads((Path(folder) / "adapter" / "adapter_config.json").read_text())
    A, B = (stored.pop(f"base_model.model.{WHOLES[0]}.lora_{factor}.weight") for factor in "AB")
    assert not stored and A.shape == (q + k + v, 16) and B.shape == (48, q + k + v)
    here = [site for site in sites(model) if site.present]
    assert torch.equal(A, torch.cat([site.A for site in here]))
    wanted, column = torch.zeros_like(B), 0
    for site in here:
        row = 16 * "qkv".index(site.name[-1])
        wanted[row : row + 16, column : column + site.rank] = site.B
        column += site.rank
    assert torch.equal(B, wanted)
    assert config["target_modules"] == WHOLES[:1] and not config["exclude_modules"]  # the other whole has no site left
    assert config["fan_in_fan_out"]
    pattern = "^" + WHOLES[0].replace(".", r"\.")
    rank = config["rank_pattern"].get(pattern, config["r"])
    assert rank == q + k + v
    assert config["alpha_pattern"].get(pattern, config["lora_alpha"]) / rank == pytest.approx(here[0].scaling)


METHODS = {
    "adalora": {},
    "dora": {},
    "fat-lora": {},
    "lora": {},
    "lora-fa": {},
    "pissa": {},
    "random-lora": {"keep": 2},
    "spaced-lora": {"mean_rank": 1.5},
    "squeeze": {"every": 2},
    "simplex-lora": {},
    "sora": {"rank": 3, "sparsity": 0.7, "gate_rate": 0.2},
    "svd": {"init": "svd"},
    "svd_residual": {"init": "svd_residual"},
    "weight-lora": {"keep": 2},
}


def trained(name, base=classifier):
    """A model some steps into its training, at another place than it began."""
    options = METHODS[name]
    name = "lora" if name.startswith("svd") else name
    model = attached(name, base, **options)
    chosen = method(name, **{"targets": QV, **options})
    optimizer = rw.SimplexAdam(chosen, model, lr=0.1)
    model.train()
    for step in range(4):
        batch = models.batch(seed=step)
        labels = batch["labels"] if base is classifier else batch["input_ids"]
        model(**{**batch, "labels": labels}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return chosen.fold(model)


@pytest.mark.large
@pytest.mark.parametrize("base", [classifier, language_model])
def test_stock_peft_in_a_fresh_process_gives_the_same_logits(base, tmp_path):
    wanted = {}
    for name in METHODS:
        model = trained(name, base)
        wanted[tmp_path / name] = logits(model)
        assert not torch.allclose(wanted[tmp_path / name], logits(base()), atol=1e-4)
        rw.save(model, tmp_path / name)
    stock_peft.agrees(base(), inputs(), wanted, tmp_path)


def test_a_search_moves_rank_between_q_and_v_and_is_exported_at_every_moment():
    chosen = method("simplex-lora", targets=QV, every=2, times=2, rank=3, omega_rate=50.0)
    torch.manual_seed(1)
    model = chosen.attach(classifier(), head=models.head("gpt2"))
    optimizer = rw.SimplexAdam(chosen, model, lr=1e-2)
    seen = []
    for step in range(6):
        models.train(model, optimizer, 1, start=step)
        seen.append((omega(model) is not None, tuple(ranks(model).values())))
        assert torch.allclose(logits(exported(model)), logits(model), atol=1e-5)
        assert sum(seen[-1][1]) <= 3 * 4
    assert [searching for searching, _ in seen] == [True] * 3 + [False] * 3
    assert any(q != v for _, (q, v, *_) in seen)


def test_a_residual_start_is_subtracted_part_by_part():
    model = attached(init="svd_residual", rank=2)
    filled(model)
    again = exported(model)
    assert ranks(again) == dict.fromkeys(WHOLES, 2 * (2 + 2))
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_a_site_whose_scale_was_changed_alone_is_exported_at_its_own():
    model = filled(attached())
    sites(model)[1].layer.set_scale("default", 3.0)
    assert torch.allclose(logits(exported(model)), logits(model), atol=1e-5)


def test_magnitudes_of_parts_without_an_adapter_are_the_norms_of_the_weight(tmp_path):
    model = filled(attached("dora", targets=["c_attn.v"]))
    with torch.no_grad():
        for site in sites(model):
            site.layer.lora_magnitude_vector["default"].weight.mul_(1.5)
    rw.save(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = stored[f"base_model.model.{WHOLES[0]}.lora_magnitude_vector"]
    norms = classifier().get_submodule(WHOLES[0]).weight.norm(dim=0)
    assert torch.allclose(found / norms, torch.tensor([1.0, 1.0, 1.5]).repeat_interleave(16))
    assert torch.allclose(logits(exported(model)), logits(model), atol=1e-5)


def test_what_is_loaded_again_is_one_site_per_projection_that_can_be_resized(tmp_path):
    model = filled(attached(rank=2))
    rw.save(model, tmp_path / "adapter")
    again = rw.load(classifier(), tmp_path / "adapter")
    assert ranks(again) == dict.fromkeys(WHOLES, 4)
    rw.resize(again, dict.fromkeys(WHOLES, 4 + 2))
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_an_adapter_of_any_name_is_joined(tmp_path):
    model = filled(attached(rank=2))
    other = filled(attached(rank=2))
    other.add_adapter("mine", copy.deepcopy(other.peft_config["default"]))
    other.set_adapter("mine")
    filled(other)
    rw.save(other, tmp_path / "adapter")
    assert torch.allclose(logits(rw.load(classifier(), tmp_path / "adapter")), logits(other), atol=1e-5)
    assert not torch.allclose(logits(other), logits(model), atol=1e-3)


@pytest.mark.parametrize("base", [classifier, language_model])
def test_products_merged_into_the_weight_are_in_the_model_that_stock_transformers_loads(base, tmp_path):
    model = filled(attached(base=base))
    before = model.get_base_model().get_submodule(WHOLES[0]).weight.detach().clone()
    rw.resize(model, RankPlan({SITES[1]: 0, SITES[2]: 0}, empty="merge"))
    weight = model.get_base_model().get_submodule(WHOLES[0]).weight
    assert torch.equal(weight[:, :32], before[:, :32]) and not torch.allclose(weight[:, 32:], before[:, 32:])
    wanted = logits(model)
    with pytest.raises(rw.InputError, match="merged into the base weights"):
        rw.save(model, tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "model")
    plain, report = type(base()).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    assert type(plain.get_submodule(WHOLES[0])) is Conv1D
    assert torch.allclose(logits(plain), wanted, atol=1e-5)


def test_merged_products_come_back_with_a_checkpoint(tmp_path):
    def fresh():
        model = attached()
        return model, rw.SimplexAdam(method("lora"), model, lr=1e-2)

    model, optimizer = fresh()
    filled(model)
    rw.resize(model, RankPlan({SITES[1]: 0}, empty="merge"), optimizer)
    rw.save_checkpoint(tmp_path / "checkpoint", model, optimizer)
    again, other = fresh()
    rw.load_checkpoint(tmp_path / "checkpoint", again, other)
    assert torch.equal(logits(again), logits(model)) and ranks(again) == ranks(model)
