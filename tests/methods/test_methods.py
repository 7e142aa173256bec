"""Options and promises of single methods; what all of them promise is in test_conformance.py."""

import copy

import pytest
import torch

import models
import rankwise as rw
from methods import attached, method
from rankwise.methods import build
from rankwise.ranks import sites
from rankwise.ranks.sites import omega


def test_budget_rounding_never_costs_more_than_uniform_ranks():
    model = attached("simplex-lora")
    uniform = sum(s.parameters for s in sites(attached("lora")))
    optimizer = rw.SimplexAdam(method("simplex-lora"), model, lr=1e-2)
    for step in range(5):
        models.train(model, optimizer, 1, start=step)
        assert sum(s.parameters for s in sites(model)) <= uniform


def test_all_linear_is_every_linear_layer_but_the_head():
    names = {s.name.rpartition(".")[2] for s in sites(attached("lora"))}
    assert names == {"query", "key", "value", "dense"}
    assert len(sites(attached("lora"))) == 2 * 6 + 1
    model = rw.LoRA(rank=2).attach(models.model(), head=["classifier", "pooler"])
    assert len(sites(model)) == 2 * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lora", "rank": 0}, "rank must be at least 1"),
        ({"name": "lora", "dropout": 1.5}, "dropout must be in"),
        ({"name": "simplex-lora", "every": 0}, "every must be at least 1"),
        ({"name": "simplex-lora", "rounding": "up"}, "rounding must be one of floor, ceil, budget"),
        ({"name": "simplex-lora", "omega_rate": -1}, "omega_rate must not be negative"),
        ({"name": "lorra"}, "lora"),
        ({"name": "lora", "rnk": 3}, "rnk"),
    ],
)
def test_bad_options_get_one_clear_line(options, message):
    with pytest.raises(rw.InputError, match=message) as caught:
        build(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("made", "head", "message"),
    [
        (lambda: rw.LoRA(rank=4, targets=["querry"]), ["classifier"], "query"),
        (lambda: rw.LoRA(rank=64), ["classifier"], "too large"),
        (lambda: rw.LoRA(rank=4), ["klassifier"], "classifier"),
        (lambda: rw.LoRA(targets=[]), ["classifier"], "targets is empty"),
        (lambda: rw.Head(), [], "name its modules"),
    ],
)
def test_what_does_not_fit_the_model_gets_one_clear_line(made, head, message):
    with pytest.raises(rw.InputError, match=message) as caught:
        made().attach(models.model(), head=head)
    assert "\n" not in str(caught.value)


def test_a_live_scale_is_seen_by_merge_disable_and_a_deep_copy():
    model = attached("simplex-lora")
    models.train(model, rw.SimplexAdam(method("simplex-lora"), model, lr=1e-2), 1)
    with torch.no_grad():
        for site in sites(model):
            torch.nn.init.normal_(site.B, std=0.2)
        omega(model)[:3] = torch.tensor([0.0, 2.0, 0.5])
    before = models.logits(model)
    twin = copy.deepcopy(model)
    model.merge_adapter()
    assert torch.allclose(models.logits(model), before, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not torch.allclose(models.logits(model), before, atol=1e-3)
    with torch.no_grad():
        omega(model).zero_()
    assert torch.equal(models.logits(twin), before) and not torch.equal(models.logits(model), before)


def test_a_site_with_weight_0_adds_nothing_but_its_omega_still_has_a_gradient():
    model = attached("simplex-lora")
    with torch.no_grad():
        for site in sites(model):
            torch.nn.init.normal_(site.B, std=0.2)
        omega(model)[0] = 0.0
    model(**models.batch()).loss.backward()
    first = sites(model)[0]
    assert not first.B.grad.any() and not first.A.grad.any() and omega(model).grad[0] != 0


def test_a_model_with_an_adapter_takes_no_second_method():
    with pytest.raises(rw.InputError, match="already has an adapter"):
        method("simplex-lora").attach(attached("lora"))


def test_the_largest_rank_is_read_off_the_layer_and_not_off_packed_weights():
    model = models.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # as bitsandbytes holds 4-bit weights
            module.weight = torch.nn.Parameter(torch.zeros(module.weight.numel() // 2, 1), requires_grad=False)
    assert all(site.rank == 2 for site in sites(rw.LoRA(rank=2).attach(model)))


def test_a_checkpoint_of_a_model_with_tied_weights_holds_no_base_weight(tmp_path):
    model = attached("lora", "t5")
    rw.save_checkpoint(tmp_path / "checkpoint", model, rw.SimplexAdam(method("lora"), model))
    names = torch.load(tmp_path / "checkpoint" / "checkpoint.pt")["model"]
    assert all("lora_" in name or "modules_to_save" in name for name in names)


def test_a_checkpoint_of_another_method_or_head_is_refused(tmp_path):
    model = attached("lora")
    rw.save_checkpoint(tmp_path / "checkpoint", model, rw.SimplexAdam(method("lora"), model))
    other = method("lora").attach(models.model(), head=["pooler"])
    with pytest.raises(rw.InputError, match="another method, head or model"):
        rw.load_checkpoint(tmp_path / "checkpoint", other, rw.SimplexAdam(method("lora"), other))


def test_a_checkpoint_does_not_replace_a_folder_of_other_things(tmp_path):
    model = attached("lora")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(rw.InputError, match="holds thesis.tex, which is no part of a checkpoint"):
        rw.save_checkpoint(tmp_path, model, rw.SimplexAdam(method("lora"), model))
    assert (tmp_path / "thesis.tex").exists()
