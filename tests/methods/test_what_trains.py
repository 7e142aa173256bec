"""Sites are what trains: in the report, in the budget and in the file, whatever PEFT makes of the targets."""

import re
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

import models
import rankwise as rw
from methods import attached, every_method, every_shape, method
from rankwise.methods.base import _check_budget
from rankwise.ranks import sites
from rankwise.ranks.sites import omega


def mixture(dense=(), **more):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=list(dense), **more,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def count(parameters):
    return sum(p.numel() for p in parameters)


@every_method
@every_shape
def test_what_trains_is_the_head_the_scales_what_lies_beside_and_the_ranks_cost(name, shape):
    model = attached(name, shape)
    here = [site for site in sites(model) if site.present]
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    scales = [omega(model), *(site.gates for site in here)] if here else []
    aside = count([*head, *(p for p in scales if p is not None), *method(name).beside(model)])
    both = sum(site.rank * ("A" in method(name).factors) * site.in_features for site in here)
    both += sum(site.rank * site.out_features for site in here)
    if here:
        assert count(p for p in model.parameters() if p.requires_grad) - aside == both
        frozen = sum(site.rank * site.in_features for site in here) if name == "lora-fa" else 0  # A, in the report too
        assert both + frozen == rw.rank_report(model).total


def test_no_method_can_leave_the_comparison_out():
    class Loose(rw.LoRA):
        def attach(self, model, head=()):
            model = super().attach(model, head)
            model.get_base_model().bert.pooler.dense.weight.requires_grad_(True)
            return model

    class Looser(Loose):
        pass

    for kind in (Loose, Looser):
        with pytest.raises(rw.InputError, match=r"bert\.pooler\.dense trains but is no adapted layer"):
            kind(rank=2, targets=["query"]).attach(models.model())


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_factor_that_does_not_train_is_no_budget_spent(frozen):
    model = attached("lora")
    getattr(sites(model)[1], frozen).requires_grad_(False)
    with pytest.raises(rw.InputError, match="but their ranks cost"):
        _check_budget(method("lora"), model, models.head())


@pytest.mark.filterwarnings("ignore:.* of the weights of Qwen3MoeForCausalLM")
@pytest.mark.parametrize("kind", [rw.LoRA, rw.DoRA, rw.SimplexLoRA, rw.SoRA])
def test_targets_that_peft_rewrites_are_refused_with_those_that_it_does_not(kind):
    model = mixture(dense=[0])
    with pytest.raises(
        rw.InputError, match=r"PEFT cannot adapt .*mlp\.down_proj .*targets: \[k_proj, o_proj, q_proj, v_proj"
    ):
        kind(rank=2).attach(model)
    with pytest.raises(rw.InputError, match="PEFT refuses these targets"):
        kind(rank=2, targets=["gate_proj", "q_proj"]).attach(model)
    model = kind(rank=2, targets=["k_proj", "o_proj", "q_proj", "v_proj"]).attach(model)  # as if nothing had been
    assert len(sites(model)) == 8 == sum(isinstance(m, nn.Module) and hasattr(m, "lora_A") for m in model.modules())


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 2)


def test_a_full_name_that_ends_another_ones_is_not_stretched_to_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.classifier = nn.Linear(8, 8), Classifier()

    with pytest.raises(rw.InputError, match=r"ends of names, so classifier\.dense would be adapted too"):
        rw.LoRA(rank=2).attach(Net())
    assert [site.name for site in sites(rw.LoRA(rank=2).attach(Net(), head=["classifier"]))] == ["dense"]


def small(kind):
    """The configuration of a mixture of experts of the family `kind`, or None."""
    try:
        config = transformers.AutoConfig.for_model(kind)
        text = config.get_text_config()
    except Exception:  # one that needs more to be made, or has several parts
        return None
    if not any("expert" in key for key in text.to_dict()):
        return None
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(getattr(text, key, None), int):
            setattr(text, key, 4)
    text.num_hidden_layers = 2
    return config


@pytest.mark.large
def test_every_mixture_of_experts_has_sites_that_are_what_trains_or_is_refused():
    seen, told = set(), set()
    for kind in FAMILIES:
        config = small(kind)
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
        except Exception:  # its defaults make no model
            continue
        stacked = [name for name, p in model.named_parameters() if re.search(r"experts\.\w+$", name) and p.dim() == 3]
        with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
            warnings.simplefilter("always")
            try:
                model = rw.LoRA(rank=1).attach(model)
            except rw.InputError as refused:
                assert "\n" not in str(refused), kind
                continue
        seen.add(kind)
        assert count(p for p in model.parameters() if p.requires_grad) == rw.rank_report(model).total, kind
        if any("all-linear leaves out" in str(w.message) for w in caught):
            told.add(kind)
        elif stacked:
            left = sum(model.get_base_model().get_parameter(name).numel() for name in stacked)
            assert left < 0.01 * count(model.parameters()), kind
    assert len(seen) > 25 and {"mixtral", "qwen3_moe", "llama4_text"} <= told
