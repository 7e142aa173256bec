"""A trained model as plain LoRA on the pretrained weights, with the names and shapes of PEFT's files."""

import re

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from rankwise.nets.fused import PARTS, Part
from rankwise.nets.new_weights import new_weights, own_tensors
from rankwise.ranks.fold import kept_units
from rankwise.ranks.kept import start_of
from rankwise.ranks.layers import shaped
from rankwise.ranks.sites import OMEGA_NAME, Site, sites


@torch.no_grad()
def folded(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, in) and B (out, r) as plain LoRA on the pretrained W, of every site that is not plain yet.

    Scales are folded in, without units whose gate is 0; a site whose ω is 0 gets r = 0. A residual start,
    W ← W - s B0 A0, is undone by appending its negative: W + s (B A - B0 A0), at rank r + r0. `model` does not change.
    """
    present = [site for site in sites(model) if site.present]
    kept, factors = kept_units(present), {}
    for site in present:
        start = start_of(site)
        if site.scale is None and (start is None or start.A is None):
            continue
        A, B, units = site.A.flatten(1), site.B.flatten(1), kept[site.name]
        if site.scale is not None:
            if site.scale.idle():
                units = units[:0]
            A, B = A[units], (B * site.scale.value.to(B.dtype).expand(site.rank, 1).T)[:, units]
        if start is not None and start.A is not None:
            A, B = torch.cat([A, start.A.to(A)]), torch.cat([B, -start.B.to(B)], dim=1)
        factors[site.name] = A, B
    return factors


def on_part(site: Site) -> bool:
    """Whether the site is on a part of a fused projection."""
    return isinstance(site.layer.get_base_layer(), Part)


def modules(model: PeftModel) -> dict[str, list[Site]]:
    """The adapted modules of the pretrained model by name, each with its site, or with the sites on its parts."""
    by_module: dict[str, list[Site]] = {}
    for site in sites(model):
        by_module.setdefault(site.name.rpartition(".")[0] if on_part(site) else site.name, []).append(site)
    return by_module


@torch.no_grad()
def joined(modules: dict[str, list[Site]], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors, with one pair of factors for each fused projection instead of those of its parts.

    B_q is in the rows of q and B_v in those of v, with zeros elsewhere, at rank r_q + r_v:

        ⎡B_q  0 ⎤ ⎡A_q⎤
        ⎢ 0   0 ⎥ ⎣A_v⎦
        ⎣ 0  B_v⎦

    DoRA's magnitudes (out,) are joined too; for parts without an adapter they are the norms of the weight.
    """
    stored = dict(stored)
    for name, module_sites in modules.items():
        if not on_part(module_sites[0]):
            continue
        As, Bs, magnitudes = [], [], {}
        for site in module_sites:
            part: Part = site.layer.get_base_layer()
            prefix = f"base_model.model.{site.name}"
            if f"{prefix}.lora_A.weight" in stored:
                As.append(stored.pop(f"{prefix}.lora_A.weight"))
                scale = site.scaling / module_sites[0].scaling  # the whole has that of the first part
                Bs.append(scale * part.widened(stored.pop(f"{prefix}.lora_B.weight")))
            if f"{prefix}.lora_magnitude_vector" in stored:
                magnitudes[part.index] = stored.pop(f"{prefix}.lora_magnitude_vector")
        if As:
            stored[f"base_model.model.{name}.lora_A.weight"] = torch.cat(As)
            stored[f"base_model.model.{name}.lora_B.weight"] = torch.cat(Bs, dim=1)
        if magnitudes:
            norms = part.whole[0].weight.detach().norm(dim=0).cpu().chunk(len(PARTS))
            stored[f"base_model.model.{name}.lora_magnitude_vector"] = torch.cat(
                [magnitudes.get(index, norm) for index, norm in enumerate(norms)]
            )
    return stored


def base_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The base model's tensors that must be saved with the adapter, by their names in its state dict.

    These are weights that its checkpoint does not have, what else trains, and statistics of normalisations.
    """
    base = model.get_base_model()
    prefix = next(name for name, module in model.named_modules() if module is base)
    new = set(new_weights(base))
    kept = {
        name
        for name, tensor in own_tensors(base).items()
        if name in new or tensor.requires_grad or isinstance(base.get_submodule(name.rpartition(".")[0]), _NormBase)
    }
    return {f"{prefix}.{name}": value.clone() for name, value in base.state_dict().items() if name in kept}


def state_of(model: PeftModel, factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The model's state dict with `factors` instead of its own, and without what only training needs.

    Buffers on the layers themselves are the method's own: PEFT has none there.
    """
    by_name = {site.name: site for site in sites(model)}
    own = {f"base_model.model.{name}.{buffer}" for name, site in by_name.items() for buffer in site.layer._buffers}
    names = "|".join(map(re.escape, factors)) or r"(?!)"
    left_out = re.compile(
        rf"base_model\.(?:{OMEGA_NAME}\.|model\.(?:.+\.lora_start\.|(?:{names})\.(?:lora_A\.|lora_B\.[^.]+\.weight$)))"
    )
    state = {name: value for name, value in model.state_dict().items() if not left_out.match(name) and name not in own}
    for name, (A, B) in factors.items():
        for part, value, like in (("lora_A", A, by_name[name].A), ("lora_B", B, by_name[name].B)):
            if len(A):
                value = shaped(value.detach(), like).contiguous()
                state[f"base_model.model.{name}.{part}.{model.active_adapter}.weight"] = value
    return state
