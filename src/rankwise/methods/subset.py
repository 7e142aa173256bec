"""Methods that add nothing and train a part of the model that is there already."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rankwise.config import InputError
from rankwise.methods.base import Method
from rankwise.methods.lora import head_names


@dataclass(frozen=True)
class Head(Method, name="head"):
    """The head alone on the frozen model: the floor under every comparison."""

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        if not head:
            raise InputError('the method head trains the head alone: name its modules, as in head=["classifier"]')
        names = head_names(model, head)
        model.requires_grad_(False)
        for name in names:
            model.get_submodule(name).requires_grad_(True)
        return model
