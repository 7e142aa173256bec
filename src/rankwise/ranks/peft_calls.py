"""PEFT's own methods on an attached model, which PEFT itself, a Trainer and TRL call.

What they write during a search, or after a residual start, looks like an adapter but is unusable: its configuration
file says so in a field that PEFT reads, so that PEFT refuses it. The configuration in memory does not change. An
adapter that they add with the configuration of an existing one gets the same scales.
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
    "rankwise: this is the state of a training, not a finished adapter; resume from it, or write the adapter with "
    "rankwise.save(model, folder)"
)
"""Written as `init_lora_weights`: PEFT does not know this start and repeats it in its error."""


class MarkedConfig(LoraConfig):
    """A LoraConfig whose file may have another `init_lora_weights` than it has in memory."""

    # Not annotated, or it would be a field, which PEFT saves and copies.
    start_written = None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **({"init_lora_weights": self.start_written} if self.start_written else {})}


def allow_peft_calls(model: PeftModel) -> None:
    """Make PEFT's own methods work on `model`: load into it, save it, add adapters to it."""
    follow_state_dict(model)
    model.register_state_dict_pre_hook(_mark)
    allow_added_adapters(model)


def allow_added_adapters(model: PeftModel) -> None:
    """Make PEFT's own `add_adapter` work on `model`."""
    model.__class__ = CLASSES[type(model)]


class RankwisePeftModel(PeftModel):
    """A PeftModel in which an adapter added with the configuration of another one gets its scales too.

    TRL adds its reference model in this way, and copies each parameter by its name.
    """

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        alike = [name for name, config in self.peft_config.items() if config is peft_config]
        own = copy(peft_config) if alike else peft_config  # ranks change in one of them
        try:
            super().add_adapter(adapter_name, own, *args, **kwargs)
        except ValueError as error:
            if alike:
                raise InputError(
                    f"a second adapter like {alike[0]!r} cannot be added ({error}); in TRL pass ref_model="
                ) from error
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
globals().update({kind.__name__: kind for kind in CLASSES.values()})  # for pickle


def _mark(model: nn.Module, *_: object) -> None:
    """Before the model's state is read: the configuration is written after it."""
    configs: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    for adapter, config in configs.items():
        if type(config) in (LoraConfig, MarkedConfig):
            config.__class__ = MarkedConfig
            config.start_written = _written(model, adapter)


def _written(model: nn.Module, adapter: str) -> str | None:
    """`init_lora_weights` in the file: `pissa` if PEFT can repeat it, None for what is in memory."""
    repeats = False
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.lora_A, nn.ModuleDict):
            site = Site("", layer, adapter)
            start = start_of(site)
            repeats |= start is not None and start.by_peft
            residual = start is not None and start.A is not None and not start.by_peft
            part = site.present and not layer.get_base_layer()._parameters  # of a fused projection
            if site.scale is not None or residual or part or products_of(site):
                return UNFINISHED
    return "pissa" if repeats else None
