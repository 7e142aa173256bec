"""What an attached model does when PEFT's own methods are called on it, as PEFT, a Trainer and TRL do.

What these write in the middle of a search, or after a residual start, looks like an adapter and is not one: its
configuration says so where PEFT must look, and PEFT refuses it. In memory the configuration stays as it is. An adapter
that they add by the configuration of one that is there gets the same scales.
"""

from copy import copy
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from rankwise.errors import InputError
from rankwise.ranks.kept import products_of, start_of
from rankwise.ranks.restore import follow_state_dict
from rankwise.ranks.scales import copy_scale
from rankwise.ranks.sites import Site

UNFINISHED = (
    "rankwise: this is the state of a training and no finished adapter; resume from it, or write the adapter by "
    "rankwise.save(model, folder)"
)
"""Written as the way in which A and B start, which PEFT does not know and repeats in its error."""


class MarkedConfig(LoraConfig):
    """A LoraConfig whose file may say something else of the start of A and B than it does in memory."""

    # In an annotation it would be a field, and fields are what PEFT saves and copies.
    start_written = None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **({"init_lora_weights": self.start_written} if self.start_written else {})}


def allow_peft_calls(model: PeftModel) -> None:
    """Let PEFT's own methods load into `model`, write it and add adapters to it."""
    follow_state_dict(model)
    model.register_state_dict_pre_hook(_mark)
    allow_added_adapters(model)


def allow_added_adapters(model: PeftModel) -> None:
    """Let PEFT's own methods add adapters to `model`."""
    model.__class__ = CLASSES[type(model)]


class RankwisePeftModel(PeftModel):
    """A PeftModel in which an adapter that is added by the configuration of another one gets its scales too.

    So TRL does for its reference: it copies parameter by parameter, by their names.
    """

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        alike = [name for name, config in self.peft_config.items() if config is peft_config]
        try:
            super().add_adapter(adapter_name, copy(peft_config), *args, **kwargs)  # ranks change in one of them
        except ValueError as error:
            if alike:
                raise InputError(f"no second adapter as {alike[0]!r} ({error}); in TRL pass ref_model=") from error
            raise
        for layer in self.modules() if alike else ():
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
                copy_scale(Site("", layer, alike[0]), adapter_name)


_PEFTS: set[type[PeftModel]] = {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}
CLASSES = {
    kind: RankwisePeftModel
    if kind is PeftModel
    else type(f"Rankwise{kind.__name__}", (RankwisePeftModel, kind), {"__module__": __name__})
    for kind in _PEFTS
}
"""PEFT's class of a model -> ours, such as RankwisePeftModelForSequenceClassification."""
globals().update({kind.__name__: kind for kind in CLASSES.values()})  # where pickle looks for them


def _mark(model: nn.Module, *_: object) -> None:
    """Before anyone gets the model's state, and writes the configuration after it."""
    configs: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    for adapter, config in configs.items():
        if type(config) in (LoraConfig, MarkedConfig):
            config.__class__ = MarkedConfig
            config.start_written = _written(model, adapter)


def _written(model: nn.Module, adapter: str) -> str | None:
    """What the file says of the start of A and B: `pissa` where PEFT can do it again; None where nothing is to say."""
    again = False
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.lora_A, nn.ModuleDict):
            site = Site("", layer, adapter)
            start = start_of(site)
            again |= start is not None and start.by_peft
            residual = start is not None and start.A is not None and not start.by_peft
            part = site.present and not layer.get_base_layer()._parameters  # no layer of the pretrained model
            if site.scale is not None or residual or part or products_of(site):
                return UNFINISHED
    return "pissa" if again else None
