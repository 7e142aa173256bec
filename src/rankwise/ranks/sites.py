"""A site is one adapted weight: `h = W x + b + s B A x`, with A (r, in), B (out, r) and the scale s = alpha / r0.

On a convolution A is one with r channels and the layer's kernel, and B one of kernel 1, so that s B A is a kernel of
the layer's shape. Read as matrices, each place of the kernel being an input of its own, they are A and B as above with
in = channels · places of the kernel: ranks are counted, chosen and changed on these matrices.

Sites are read off the PEFT model each time they are asked for, so there is no second book to keep. A scale is a
parametrization of A, SimplexLoRA's ω or SoRA's gates g: every reader of `lora_A.weight` sees ω·A or diag(g) A, PEFT's
forward, merge and disable among them, without knowing. All ω of a model are one (n,) parameter beside the sites, so an
emptied site keeps its ω; gates belong to their site.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from rankwise.errors import InputError

OMEGA = "lora_omega"  # on the tuner itself, whose own parameters PEFT saves and loads: a checkpoint keeps ω unasked


class Scale(nn.Module):
    """Multiplies A, as a parametrization that leaves the stored A as it was."""

    value: Tensor
    """Shape () or (r, 1)."""

    def forward(self, A: Tensor) -> Tensor:
        return A * self.value.to(A.dtype).reshape(-1, *[1] * (A.dim() - 1))


class Omega(Scale):
    """One entry of ω, which scales a whole site."""

    def __init__(self, omegas: nn.ParameterDict, adapter: str, index: int):
        super().__init__()
        # In a tuple, so that torch does not register ω once more under every site.
        self.source = (omegas, adapter, index)

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        """ω of this site, shape ()."""
        omegas, adapter, index = self.source
        return omegas[adapter][index]


class Gates(Scale):
    """One gate per unit of rank (SoRA): g, a Parameter of shape (r, 1)."""

    def __init__(self, gates: Tensor):
        super().__init__()
        self.gates = nn.Parameter(gates.reshape(-1, 1))

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self.gates


@dataclass(frozen=True, eq=False)
class Site:
    """One adapted weight of a PEFT model, present (`rank` > 0) or emptied (`rank` == 0)."""

    name: str  # the module's path in the base model
    layer: Any  # peft.tuners.lora.LoraLayer, whose dictionaries PEFT leaves untyped
    adapter: str

    @property
    def present(self) -> bool:
        return self.adapter in self.layer.lora_A

    @property
    def A_owner(self) -> tuple[nn.Module, str]:
        """The module and attribute that hold A's Parameter: the linear, or its parametrization while a scale is on."""
        linear = self.layer.lora_A[self.adapter]
        if parametrize.is_parametrized(linear, "weight"):
            return linear.parametrizations.weight, "original"
        return linear, "weight"

    @property
    def B_owner(self) -> tuple[nn.Module, str]:
        return self.layer.lora_B[self.adapter], "weight"

    @property
    def A(self) -> nn.Parameter:
        """Shape (r, in), a convolution's (r, channels, *kernel), without the scale."""
        owner, name = self.A_owner
        return getattr(owner, name)

    @property
    def B(self) -> nn.Parameter:
        """Shape (out, r), a convolution's (out, r, 1, …)."""
        return self.layer.lora_B[self.adapter].weight

    @property
    def W(self) -> Tensor:
        """The pretrained weight, shape (out, in) whatever the layer's own layout."""
        weight = self.layer.get_base_layer().weight
        return weight.T if isinstance(self.layer.get_base_layer(), Conv1D) else weight.flatten(1)

    @property
    def scale(self) -> Scale | None:
        """The parametrization that multiplies A, if one is on."""
        owner, name = self.A_owner if self.present else (None, "")
        return owner[0] if name == "original" else None  # type: ignore[index]

    @property
    def gates(self) -> nn.Parameter | None:
        """Shape (r, 1), if the site has any."""
        return self.scale.gates if isinstance(self.scale, Gates) else None

    @property
    def scaling(self) -> float:
        """s, which stays alpha / r0 whatever the rank becomes."""
        return self.layer.scaling[self.adapter] if self.present else self.layer.lora_empty[self.adapter]

    @property
    def rank(self) -> int:
        return self.A.shape[0] if self.present else 0

    @property
    def live(self) -> int:
        """Units of rank that add to the output: all, or those whose gate is not 0."""
        return self.rank if self.gates is None or self.gates.is_meta else int(self.gates.count_nonzero())

    @property
    def in_features(self) -> int:
        return features(self.layer.get_base_layer())[0]

    @property
    def out_features(self) -> int:
        return features(self.layer.get_base_layer())[1]

    @property
    def cost(self) -> int:
        """Parameters per unit of rank: in + out."""
        return self.in_features + self.out_features

    @property
    def limit(self) -> int:
        """The largest rank that adds anything: min(in, out)."""
        return min(self.in_features, self.out_features)

    @property
    def parameters(self) -> int:
        """What the live units cost, the gates themselves aside."""
        return self.live * self.cost


def adapted(model: nn.Module) -> PeftModel:
    """The PEFT model inside wrappers such as DistributedDataParallel or a compiled module.

    Raises:
        TypeError: if there is none.
    """
    while not isinstance(model, PeftModel):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise TypeError(f"{type(model).__name__} has no adapter: attach a method first")
        model = inner
    return model


def is_weight(module: nn.Module) -> bool:
    """Whether a site can sit on this module: a linear map, in torch's layout or GPT-2's, or a convolution."""
    return isinstance(module, (nn.Linear, Conv1D)) or is_convolution(module)


def is_convolution(module: nn.Module) -> bool:
    """Whether this is a convolution; transposed ones, which PEFT does not adapt, are none."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def features(module: Any) -> tuple[int, int]:
    """(in, out) of a linear map. Not its weight's shape: 4-bit weights are packed into one column.

    Of a convolution as a matrix: channels · places of the kernel, channels.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if is_convolution(module):
        return module.in_channels * prod(module.kernel_size), module.out_channels
    return module.in_features, module.out_features


def check_convolution(name: str, module: Any) -> None:
    """Raise InputError for a convolution on which PEFT 0.21's factors are no product of two matrices to add to W."""
    if not is_convolution(module):
        return
    if module.groups > 1:
        reason = f"has {module.groups} groups: PEFT could not merge what is learnt on it"
    elif any(step != 1 for step in module.dilation):
        reason = "is dilated, and PEFT's factors are not"
    elif module.padding_mode != "zeros":
        reason = f"has {module.padding_mode} padding, and PEFT's factors pad with zeros"
    else:
        return
    raise InputError(f"the convolution {name} {reason}; leave it out of targets")


def check_own(model: nn.Module, name: str) -> None:
    """Raise InputError where the weight of the layer `name` is quantised or serves another module too."""
    layer: Any = model.get_submodule(name)
    packed = layer.weight.dim() != 2 and not is_convolution(layer)
    if not layer.weight.is_floating_point() or packed:
        raise InputError(f"{name} is quantised, its weight cannot change: use empty=drop, and no residual start")
    if sum(p is layer.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        raise InputError(f"{name} shares its weight with another module, which would change too")


def _sites(model: PeftModel) -> Iterator[Site]:
    adapter = model.active_adapter
    for name, module in model.get_base_model().named_modules():
        base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else None
        if base is None or not is_weight(base):
            continue
        if is_convolution(base) and base.groups > 1:  # B is one matrix per group
            continue
        if not isinstance(module.lora_A, nn.ModuleDict):  # AdaLoRA's layers hold bare parameters, and no plain product
            continue
        if adapter in module.lora_A or adapter in getattr(module, "lora_empty", {}):
            yield Site(name, module, adapter)


def sites(model: nn.Module) -> list[Site]:
    """All sites of the active adapter in model order, the emptied ones among them; none where nothing is adapted."""
    try:
        return list(_sites(adapted(model)))
    except TypeError:
        return []


def ranks(model: nn.Module) -> dict[str, int]:
    """Live rank of every site, by name."""
    return {site.name: site.live for site in sites(model)}


def omega(model: nn.Module) -> nn.Parameter | None:
    """The (n,) parameter of ω in the order of `sites`, or None when no search is on."""
    peft = adapted(model)
    return getattr(peft.base_model, OMEGA, {}).get(peft.active_adapter)
