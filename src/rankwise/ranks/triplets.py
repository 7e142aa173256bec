"""AdaLoRA's layers in PEFT, h = W x + b + s B diag(E) A x.

A triplet is one unit of rank: a row of A (r, in), an entry of E (r, 1), a column of B (out, r).

PEFT 0.21 keeps scores in dictionaries, and the chosen triplets in its configuration, which makes it cut checkpoints to
a size that cannot be loaded again. Here both are buffers of the layers, copied to PEFT's allocator and back at each
step.
"""

from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from rankwise.errors import InputError
from rankwise.ranks.peft_calls import allow_peft_calls
from rankwise.ranks.peft_records import write_ranks
from rankwise.ranks.resize import resize
from rankwise.ranks.sites import peft_model

PARTS = ("A", "E", "B")
KEPT = (
    *("lora_alpha", "lora_dropout", "modules_to_save", "fan_in_fan_out", "bias"),
    *("task_type", "base_model_name_or_path", "revision", "inference_mode"),
)
"""The options that plain LoRA takes from AdaLoRA's configuration."""


class Scores(nn.Module):
    """The smoothed sensitivity of every entry of A, E and B (`mean_…`), how much it varies (`spread_…`), and the
    triplets chosen last (`chosen`, (r, 1)). PEFT saves modules inside its layers, so checkpoints keep it."""

    chosen: Tensor

    def __init__(self, layer: Any, adapter: str):
        super().__init__()
        for part in PARTS:
            for kind in ("mean", "spread"):
                self.register_buffer(f"{kind}_{part}", torch.zeros_like(getattr(layer, f"lora_{part}")[adapter].data))
        self.register_buffer("chosen", torch.ones_like(layer.lora_E[adapter].data, dtype=torch.bool))


def triplets(model: nn.Module) -> dict[str, Any]:
    """AdaLoRA's layers of the active adapter by their names in the base model; {} for other adapters."""
    peft = peft_model(model)
    named = peft.get_base_model().named_modules()
    return {n: layer for n, layer in named if isinstance(layer, AdaLoraLayer) and peft.active_adapter in layer.lora_E}


def live_ranks(model: nn.Module) -> dict[str, int]:
    """The number of triplets of each layer that are not 0."""
    adapter = peft_model(model).active_adapter
    return {name: int(layer.lora_E[adapter].count_nonzero()) for name, layer in triplets(model).items()}


def peft_config(model: nn.Module) -> Any:
    """PEFT's configuration of the active adapter."""
    peft = peft_model(model)
    return peft.peft_config[peft.active_adapter]


def extra_parameters(model: nn.Module) -> int:
    """How many more parameters plain LoRA can have at the end than A, E and B have now; negative if fewer.

    The number of triplets at the end is fixed, so there are most parameters if the largest layers keep theirs.
    """
    config = peft_config(model)
    costs = sorted((layer.in_features + layer.out_features for layer in triplets(model).values()), reverse=True)
    left, more = config.target_r * len(costs) if costs else 0, 0  # plain LoRA has no target_r
    for cost in costs:
        rank = min(config.init_r, left)
        left -= rank
        more += rank * cost - config.init_r * (cost + 1)
    return more


def add_scores(model: PeftModel) -> None:
    """Give each of AdaLoRA's layers its Scores, and list these layers on the tuner."""
    adapter, layers = model.active_adapter, triplets(model)
    for layer in layers.values():
        layer.lora_scores = nn.ModuleDict({adapter: Scores(layer, adapter)})
    model.base_model.__dict__.setdefault("lora_scored", {})[adapter] = layers


def _scored(model: PeftModel) -> dict[str, Any]:
    """The layers with Scores by name, without a search through all modules, since every step needs them."""
    return model.base_model.__dict__.get("lora_scored", {}).get(model.active_adapter, {})


@torch.no_grad()
def add_orthogonality(model: nn.Module, weight: float) -> None:
    """Add to the gradients that of weight · mean_P ‖P Pᵀ - I‖_F, over P = A and P = Bᵀ of all layers.

    ∂‖M‖_F/∂P = 2 M P / ‖M‖_F with M = P Pᵀ - I. Parameters without a gradient get one, which PEFT's allocator needs.
    """
    peft = peft_model(model)
    layers, adapter = _scored(peft), peft.active_adapter
    for layer in layers.values():
        A, E, B = (getattr(layer, f"lora_{part}")[adapter] for part in PARTS)
        for p in (A, E, B):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for P, grad in ((A, A.grad), (B.T, B.grad.T)):
            M = P @ P.T - torch.eye(len(P), device=P.device, dtype=P.dtype)
            grad.add_(M @ P / M.norm().clamp_min(torch.finfo(P.dtype).tiny), alpha=weight / len(layers))


@torch.no_grad()
def choose(model: nn.Module, step: int) -> None:
    """PEFT's update_and_allocate after step `step`, reading and writing our Scores."""
    peft = peft_model(model)
    tuner: Any = peft.base_model
    adapter, config = peft.active_adapter, peft_config(peft)
    layers, allocator = _scored(peft), tuner.rankallocator
    if step > config.total_step - config.tfinal:
        for layer in layers.values():
            layer.lora_E[adapter].masked_fill_(~layer.lora_scores[adapter].chosen, 0)
        return
    scores = {name: layer.lora_scores[adapter] for name, layer in layers.items()}
    mean, spread = (
        {f"{name}.lora_{p}.{adapter}": getattr(score, f"{kind}_{p}") for name, score in scores.items() for p in PARTS}
        for kind in ("mean", "spread")
    )
    allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc = dict(mean), dict(mean), dict(spread)
    tuner.update_and_allocate(step)
    for buffers, values in ((mean, allocator.exp_avg_ipt), (spread, allocator.exp_avg_unc)):
        for name, value in values.items():
            buffers[name].copy_(value)
    for name, chosen in (config.rank_pattern or {}).items():
        scores[name.removesuffix(f".lora_E.{adapter}")].chosen.copy_(torch.tensor(chosen)[:, None])
    config.rank_pattern = None  # or PEFT would cut what it saves to that size, and could not load it again
    allocator.reset_ipt()


@torch.no_grad()
def to_lora(model: nn.Module) -> PeftModel:
    """Plain LoRA with the same outputs, on the same base weights and with a copy of the head; `model` is not changed.

    A' = diag(E) A and B' = B without the triplets whose E is 0. Sites without live triplets are emptied; if no site has
    one, the first keeps a triplet whose product is 0, since PEFT has no adapters without layers.
    """
    peft = peft_model(model)
    layers, adapter = triplets(peft), peft.active_adapter
    old = peft_config(peft)
    live = {name: layer.lora_E[adapter].flatten().nonzero().flatten() for name, layer in layers.items()}
    ranks = {name: max(1, len(units)) for name, units in live.items()}
    scales = {name: layer.scaling[adapter] / (layer.ranknum[adapter].item() + 1e-5) for name, layer in layers.items()}
    for name, part in peft.get_base_model().named_modules():
        if isinstance(part, AuxiliaryTrainingWrapper) and not isinstance(part, ModulesToSaveWrapper):
            raise InputError(
                f"{name} trains tokens as well (trainable_token_indices), which AdaLoRA cannot turn into plain LoRA: "
                "train without them"
            )
    config = LoraConfig(r=old.target_r, target_modules=list(layers), **{name: getattr(old, name) for name in KEPT})
    write_ranks(config, {name: (ranks[name], scales[name] * ranks[name]) for name in layers}, peft, [])
    # A copy of the modules around the same tensors.
    base = deepcopy(peft.get_base_model(), {id(t): t for t in (*peft.parameters(), *peft.buffers())})
    heads = {}
    for name, part in list(base.named_modules()):
        if isinstance(part, AdaLoraLayer):
            base.set_submodule(name, part.base_layer)
        elif isinstance(part, ModulesToSaveWrapper):
            heads[name] = part.modules_to_save[adapter].state_dict()
            base.set_submodule(name, part.original_module)
    del base.peft_config
    with torch.random.fork_rng(devices=[]):  # its random values are overwritten
        lora = get_peft_model(base, config, adapter)
    for name, state in heads.items():
        wrapper: Any = base.get_submodule(name)
        wrapper.modules_to_save[adapter].load_state_dict(state)
    for name, units in live.items():
        layer: Any = base.get_submodule(name)
        A, E, B = (getattr(layers[name], f"lora_{part}")[adapter] for part in PARTS)
        units = units if len(units) else units.new_zeros(1)
        layer.lora_A[adapter].weight.copy_((A * E)[units])
        layer.lora_B[adapter].weight.copy_(B[:, units])
    allow_peft_calls(lora)
    empty = [name for name, units in live.items() if not len(units)]
    resize(lora, dict.fromkeys(empty[len(empty) == len(live) :], 0))
    return lora.train(peft.training)
