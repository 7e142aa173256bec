"""A state dict brings its own structure."""

import torch

import models
import rankwise as rw
from rankwise.ranks import RankPlan, ranks, sites


def attached():
    torch.manual_seed(1)
    model = rw.LoRA(rank=2).attach(models.model(), head=["classifier"])
    for site in sites(model):
        torch.nn.init.normal_(site.B, std=0.3)
    return model


def test_a_state_from_before_a_merge_takes_the_product_out_of_the_weights_again():
    model = attached()
    states, logits = [], []
    for name in list(ranks(model))[:3]:
        states.append({k: v.clone() for k, v in model.state_dict().items() if "lora_" in k})
        logits.append(models.logits(model))
        torch.nn.init.normal_(sites(model)[-1].B, std=0.3)
        rw.resize(model, RankPlan({name: 0}, empty="merge"))
    for i in (2, 0, 1):
        model.load_state_dict(states[i], strict=False)
        assert torch.allclose(models.logits(model), logits[i], atol=1e-5)


def test_a_state_with_another_adapter_is_loaded_under_its_own_name(tmp_path):
    model, other = attached(), attached()
    with torch.no_grad():
        for site in sites(other):
            site.B.neg_()
    rw.save(other, tmp_path / "other")
    model.load_adapter(str(tmp_path / "other"), "a+b")
    before = models.logits(model)
    model.set_adapter("a+b")
    assert torch.equal(models.logits(model), models.logits(other)) and not torch.equal(models.logits(model), before)
    again = attached()
    again.load_adapter(str(tmp_path / "other"), "a+b")
    again.load_state_dict(model.state_dict())
    assert torch.equal(models.logits(again), before)
