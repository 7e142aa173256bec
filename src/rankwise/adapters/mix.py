"""The weighted sum of several adapters, Σ_k w_k ΔW_k, without a product and without their base model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rankwise.adapters.layers import Factors, StoredAdapter
from rankwise.errors import InputError
from rankwise.runs import use


@dataclass(frozen=True)
class Mixed:
    """A sum of adapters, one layer at a time, as their factors side by side: [w_1 s_1 B_1, …] [A_1; …].

    Attributes:
        parts: the adapters, each with its weight w.
    """

    parts: Sequence[tuple[StoredAdapter, float]]

    @property
    def names(self) -> list[str]:
        """The layers that any of them adapts."""
        return list(dict.fromkeys(name for adapter, _ in self.parts for name in adapter.names))

    def factors(self, name: str) -> Factors:
        """The sum of a layer, with the scale 1, in fp32 or wider."""
        own = [(adapter.factors(name), weight) for adapter, weight in self.parts if name in adapter.layers]
        kind = torch.float64 if any(each.A.dtype == torch.float64 for each, _ in own) else torch.float32
        A = torch.cat([each.A.to(kind) for each, _ in own])
        B = torch.cat([weight * each.scale * each.B.to(kind) for each, weight in own], dim=1)
        return Factors(A, B, 1.0, own[0][0].kernel, own[0][0].embedding)

    def check(self) -> None:
        """Raise InputError unless they have one base model, format and shape of each layer, and the same heads."""
        first = self.parts[0][0]
        for adapter, _ in self.parts:
            adapter.check_linear("a sum")
            if fixed := next((name for name, layer in adapter.layers.items() if layer.fixed), None):
                raise InputError(f"{adapter.path}: the rank of {fixed} cannot change: {adapter.layers[fixed].fixed}")
            if adapter.format != first.format:
                raise InputError(
                    f"{adapter.path} is in the format of {adapter.format} and {first.path} in that of {first.format}: "
                    "only adapters of one format can be mixed"
                )
            bases = [(each.config or {}).get("base_model_name_or_path") for each in (first, adapter)]
            if all(bases) and Path(str(bases[0])).name != Path(str(bases[1])).name:
                raise InputError(
                    f"{first.path} is for {bases[0]} and {adapter.path} for {bases[1]}: only adapters of one base "
                    "model can be mixed"
                )
            used = [use.read(each.path) if each.config is not None else None for each in (first, adapter)]
            if all(each and each.base for each in used) and len({each.base for each in used if each}) > 1:
                raise InputError(
                    f"{first.path} and {adapter.path} were trained on different base weights: only adapters of one "
                    "base model can be mixed"
                )
            for name, layer in adapter.layers.items():
                other = first.layers.get(name, layer)
                if (layer.size, layer.kernel, layer.embedding) != (other.size, other.kernel, other.embedding):
                    raise InputError(f"{name} is {other.size} in {first.path} but {layer.size} in {adapter.path}")
            for key in {*first.others, *adapter.others}:
                known = key in first.others and key in adapter.others
                if not known or not torch.equal(first.tensor(key), adapter.tensor(key)):
                    raise InputError(
                        f"{key} is not the same in {first.path} and {adapter.path}: only A and B can be mixed"
                    )
