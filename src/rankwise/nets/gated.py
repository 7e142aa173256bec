"""A gated low-rank factor on any linear or convolution layer of any torch model (the module of the SoRA report).

SoRA (Ding et al. 2023, arXiv 2311.11696, section 3): W + s B diag(g) A with gates g, one per unit of rank, which a
proximal step g ← T_{ηλ}(g) sets to exactly 0 where rank is not worth its parameters. The course report on it (MIPT NLA
2023) packs this into a wrapper that acts as the layer: `activate` adds the factors and freezes the layer, `deactivate`
adds their product to W and removes them. Layers, factors and the proximal step are those of the rank engine; this
module adds a wrapper without PEFT or transformers, and factors for convolutions with groups.

>>> import torch
>>> from torch import nn
>>> from rankwise.nets.gated import Gated
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
>>> layers = Gated.wrap(model, [nn.Conv2d, nn.Linear])
>>> for layer in layers.values():
...     layer.activate(max_rank=4)
>>> gates = [layer.gates for layer in layers.values()]
>>> rest = [p for p in model.parameters() if p.requires_grad and all(p is not g for g in gates)]
>>> optimizer = torch.optim.SGD([{"params": rest}, {"params": gates, "lr": 1e-3}], lr=1e-2)
>>> model(torch.randn(2, 3, 8, 8)).pow(2).mean().backward()
>>> optimizer.step()
>>> for layer in layers.values():
...     layer.prox(1e-3 * 0.01)  # the gates' rate η times λ
>>> [layer.rank for layer in layers.values()]
[4, 4]
>>> Gated.unwrap(model)["0"]  # merged: the bare layers again
Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
"""

from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rankwise.errors import InputError, nearest, require
from rankwise.optim.project import prox_l1
from rankwise.ranks.layers import ConvolutionLayer, LinearLayer, weight_layer

Init = Literal["normal", "kaiming"]
Start = Literal["ones", "normal"]

_KINDS = (*LinearLayer.classes(), *ConvolutionLayer.classes())


class Gated(nn.Module):
    """Acts as `layer`; between `activate` and `deactivate` it is layer(x) + s B(g · A(x)), and only A, g, B train.

    For a convolution A has r output channels and the layer's kernel, stride, padding and dilation, and B is a 1×1
    convolution, so that their product has the shape of the layer's kernel and the merge is exact. In a layer with
    `groups` > 1 both factors keep the groups, and the rank is divided evenly among them.

    While active, `weight` is the effective weight W + s B diag(g) A, so that modules that read a layer's weight instead
    of calling it (nn.MultiheadAttention) see the factors. All other attributes are those of `layer`.

    Loading a state dict with factors activates the wrapper at their rank; loading one of an inactive wrapper removes
    the factors. A change of rank makes new Parameters: load, activate, deactivate and prune before the optimizer is
    built, or build it again.

    Attributes:
        layer: the wrapped layer, frozen while active.
        A, B: the factors, weights (r, in) and (out, r), or (r, in / groups, *kernel) and (out, r / groups, 1, …).
        gates: g, shape (r,).
        scaling: s = alpha / max_rank, a tensor () that is saved. All four are None while inactive.

    Raises:
        InputError: `layer` is not nn.Linear, nn.Conv1d, 2d or 3d, or its weight is computed from other tensors.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        if not isinstance(layer, _KINDS):
            known = ", ".join(kind.__name__ for kind in _KINDS)
            raise InputError(f"a {type(layer).__name__} cannot be gated; these can: {known}")
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            raise InputError(f"the weight of this {type(layer).__name__} is computed: remove its parametrization first")
        self.layer: Any = layer
        self._trained: dict[str, bool] = {}
        self.train(layer.training)
        self._drop()

    @torch.no_grad()
    def activate(self, max_rank: int, alpha: float = 16.0, init: Init = "normal", gates: Start = "ones") -> None:
        """Freeze the layer and add trainable factors with B = 0, so that outputs stay the same, bit for bit.

        Args:
            max_rank: r, at most `limit` and a multiple of the layer's groups.
            alpha: α in s = α / r, which pruning leaves as it is.
            init: A from N(0, 1/in) (`normal`, the report) or Kaiming uniform with a = √5 (`kaiming`, SoRA's code).
            gates: g starts at 1 (`ones`, the report) or from N(0, 1) (`normal`, SoRA's code).

        Raises:
            InputError: the layer is already active, or an argument is out of range.
        """
        require(not self.active, "this layer is already active: deactivate it first")
        groups, limit = self._groups, self.limit
        in_range = isinstance(max_rank, int) and 1 <= max_rank <= limit
        require(in_range, f"max_rank must be a whole number from 1 to {limit} for this layer, not {max_rank}")
        require(max_rank % groups == 0, f"max_rank must be a multiple of the layer's {groups} groups, not {max_rank}")
        require(alpha > 0 and isfinite(alpha), f"alpha must be above 0 and finite, not {alpha}")
        require(init in get_args(Init), f"init must be one of {', '.join(get_args(Init))}, not {init!r}")
        require(gates in get_args(Start), f"gates must be one of {', '.join(get_args(Start))}, not {gates!r}")
        self._add(max_rank)
        self.scaling.fill_(alpha / max_rank)
        if init == "normal":
            self.A.weight.normal_(std=self.layer.weight[0].numel() ** -0.5)
        else:
            self.A.reset_parameters()  # torch initialises its layers Kaiming uniform with a = √5
        self.B.weight.zero_()
        self.gates.normal_() if gates == "normal" else self.gates.fill_(1.0)

    @torch.no_grad()
    def deactivate(self) -> nn.Module:
        """Add s B diag(g) A to W, remove the factors, unfreeze the layer as it was before, and return it.

        The sum is computed in fp32 or better, whatever the layer's dtype.

        Raises:
            InputError: the layer is not active.
        """
        self._require_active()
        weight = self.layer.weight
        weight.copy_(self._effective(torch.promote_types(weight.dtype, torch.float32)))
        self._drop()
        return self.layer

    @torch.no_grad()
    def prox(self, threshold: float) -> None:
        """Move the gates to argmin_x ½‖x − g‖² + ξ‖x‖₁ = sign(g) max(|g| − ξ, 0), in place.

        Args:
            threshold: ξ = η λ, the learning rate of the step just taken times the weight of the ℓ1 norm.

        Raises:
            InputError: the layer is not active, or the threshold is negative.
        """
        self._require_active()
        require(threshold >= 0, f"the threshold must be 0 or more, not {threshold}")
        self.gates.copy_(prox_l1(self.gates, threshold))

    @property
    def active(self) -> bool:
        """Whether the layer has factors."""
        return self.gates is not None

    @property
    def rank(self) -> int:
        """Live ranks: gates that are not 0; 0 while inactive."""
        return int(self.gates.count_nonzero()) if self.active else 0

    @property
    def limit(self) -> int:
        """The largest useful rank, min(in, out) of W as a matrix: `in` counts a kernel's entries as inputs."""
        return min(self._kind.features)

    @property
    def weight(self) -> Tensor:
        """W, and while active W + s B diag(g) A with gradients to the factors; of W's shape."""
        return self._effective(self.layer.weight.dtype) if self.active else self.layer.weight

    @torch.no_grad()
    def prune(self) -> int:
        """Cut the ranks whose gate is 0 out of the factors, which changes no output, and return the live rank.

        All groups keep as many ranks as the one with most live ranks, and at least one.

        Raises:
            InputError: the layer is not active.
        """
        self._require_active()
        groups = self._groups
        dead = (self.gates == 0).view(groups, -1)
        size = dead.shape[1]
        keep = max(int((~dead).sum(1).max()), 1)
        kept = dead.int().argsort(dim=1, stable=True)[:, :keep].sort(dim=1).values  # live ones first, in order
        rows = (kept + size * torch.arange(groups, device=kept.device)[:, None]).flatten()
        A, B, gates = self.A.weight[rows], self.B.weight, self.gates[rows]
        columns = kept.repeat_interleave(len(B) // groups, dim=0).view(len(B), keep, *[1] * (B.dim() - 2))
        B = B.gather(1, columns)
        scaling = self.scaling
        self._add(groups * keep)
        for new, old in ((self.A.weight, A), (self.B.weight, B), (self.gates, gates), (self.scaling, scaling)):
            new.copy_(old)
        return self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if not self.active:
            return y
        gates = self.gates.view(-1, *[1] * (self.A.weight.dim() - 2))  # along the channels of a convolution
        return y + self.B(self.A(x) * (self.scaling * gates))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def extra_repr(self) -> str:
        return f"rank {self.rank} of {len(self.gates)}" if self.active else "inactive"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        gates = state_dict.get(f"{prefix}gates")
        if gates is None and f"{prefix}layer.weight" in state_dict:
            self._drop()
        elif gates is not None and not (self.active and len(gates) == len(self.gates)):
            self._add(len(gates))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def wrap(cls, model: nn.Module, targets: str | type | Sequence[str | type]) -> dict[str, "Gated"]:
        """Put wrappers around layers of `model`, in place, and return them by the layers' names.

        Args:
            targets: names of layers, matched by their last components, or types such as nn.Linear. Layers that are
                already wrapped are skipped.

        Raises:
            InputError: a target that matches no layer, cannot be wrapped, or shares its weight with another module
                (merging would change that one too). The model is then unchanged.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        wrapped = tuple(f"{name}." for name, module in modules.items() if isinstance(module, Gated))
        free = {name: module for name, module in modules.items() if not f"{name}.".startswith(wrapped)}
        chosen: dict[str, nn.Module] = {}
        for target in [targets] if isinstance(targets, (str, type)) else targets:
            if isinstance(target, type):
                matches = {name: module for name, module in free.items() if isinstance(module, target)}
            else:
                matches = {name: module for name, module in free.items() if f".{name}".endswith(f".{target}")}
            if not matches:
                word = target if isinstance(target, str) else target.__name__
                names = {name.rpartition(".")[2] for name, module in free.items() if isinstance(module, _KINDS)}
                raise InputError(f"{word} matches no layer of {type(model).__name__}{nearest(word, names)}")
            chosen |= matches
        require(bool(chosen), "no targets are given: name layers, or types of layers such as nn.Linear")
        require("" not in chosen, f"the model itself is a {type(model).__name__}: wrap it with Gated(model)")
        wrappers: dict[nn.Module, Gated] = {}
        for name, layer in chosen.items():
            try:
                wrappers.setdefault(layer, cls(layer))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            for other, module in model.named_modules():
                if module is not layer and any(p is layer.weight for p in module._parameters.values()):
                    raise InputError(
                        f"{name} shares its weight with {other}: untie them, or leave {name} out of targets"
                    )
        for name in chosen:
            model.set_submodule(name, wrappers[chosen[name]])
        return {name: wrappers[layer] for name, layer in chosen.items()}

    @staticmethod
    def unwrap(model: nn.Module) -> dict[str, nn.Module]:
        """Merge the active layers, put all bare layers back and return them by name; outputs do not change."""
        wrappers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Gated)}
        require("" not in wrappers, "the model itself is the wrapper: call its deactivate(), which returns the layer")
        for name, gated in wrappers.items():
            if gated.active:
                gated.deactivate()
            model.set_submodule(name, gated.layer)
        return {name: gated.layer for name, gated in wrappers.items()}

    @property
    def _kind(self) -> Any:
        return weight_layer(self.layer)

    @property
    def _groups(self) -> int:
        return getattr(self.layer, "groups", 1)

    def _require_active(self) -> None:
        require(self.active, "this layer is not active: activate it first")

    def _effective(self, dtype: torch.dtype) -> Tensor:
        """W + s B diag(g) A, of W's shape."""
        A, B, W = self.A.weight.to(dtype).flatten(1), self.B.weight.to(dtype).flatten(1), self.layer.weight
        gates = (self.scaling * self.gates).to(dtype)
        return W.to(dtype) + self._kind.product(gates[:, None] * A, B).view(W.shape)

    def _add(self, rank: int) -> None:
        """Freeze the layer and add factors of `rank` in its dtype and on its device; the caller sets every value."""
        layer = self.layer
        if not self.active:
            self._trained = {name: p.requires_grad for name, p in layer.named_parameters()}
        layer.requires_grad_(False)
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        # on "meta" no random number is drawn
        factors = self._kind.factors(rank, exact=True, device="meta", dtype=layer.weight.dtype)
        self.A, self.B = (factor.to_empty(device=layer.weight.device) for factor in factors)
        self.gates = nn.Parameter(torch.empty(rank, **like))
        self.scaling = torch.empty((), **like)
        self.train(self.training)

    def _drop(self) -> None:
        """Remove the factors, and unfreeze the parameters that trained before."""
        self.register_module("A", None)
        self.register_module("B", None)
        self.register_parameter("gates", None)
        self.register_buffer("scaling", None)
        for name, parameter in self.layer.named_parameters():
            parameter.requires_grad_(self._trained.get(name, parameter.requires_grad))
        self._trained = {}
