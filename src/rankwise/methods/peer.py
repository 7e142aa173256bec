"""What the methods share that PEFT has and rankwise only carries out, for comparison: adapters far smaller than LoRA's.

They adapt the layers that LoRA adapts and are saved as PEFT saves them, but they have no rank to learn or to change.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rankwise.errors import InputError
from rankwise.methods.base import Method
from rankwise.methods.targets import ALL_LINEAR, placement

DRAWN_AGAIN = "Specified to not (save|load) "
"""How PEFT's warnings begin that frozen random parts are not in a file: it draws them again from their seed."""


@dataclass(frozen=True)
class Peer(Method):
    """A method of PEFT on linear layers; `configuration` is the class of its settings there."""

    configuration: ClassVar[type[PeftConfig]]
    targets: str | list[str] = ALL_LINEAR

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The fields of PEFT's configuration that differ from its defaults."""

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        placed = placement(model, self.targets, head, rank=1, only=self.name)
        names, known = placed["target_modules"], {field.name for field in fields(self.configuration)}
        wanted = {key: value for key, value in placed.items() if key in known}
        try:
            attached = get_peft_model(model, self.configuration(**wanted, **self.settings))
        except (TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"PEFT cannot adapt these layers by {self.name}: {why}") from error
        base = attached.get_base_model()
        adapted = {name for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
        if other := adapted ^ {*names}:
            raise InputError(f"{self.name} of PEFT adapts other layers too, such as {min(other)}: name other targets")
        return attached

    def fold(self, model: nn.Module) -> nn.Module:
        """Leave frozen random parts out of what is saved from now on: VeRA's would be larger than LoRA."""
        for config in getattr(model, "peft_config", {}).values():
            if hasattr(config, "save_projection"):
                config.save_projection = False
        return model

    def budget(self, model: nn.Module) -> int:
        kept = [p for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in name]
        return sum(p.numel() for p in kept)
