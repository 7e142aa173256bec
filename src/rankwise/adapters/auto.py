"""The task type in an adapter's configuration, from which PEFT's Auto classes choose the class of the model."""

from inspect import Parameter, signature

from peft import PeftModel, auto
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")
"""Ends of the names of modules that PEFT always trains and loads in full for classification and question answering."""


def task(model: PeftModel) -> str | None:
    """The PEFT task type whose Auto class builds the class of the pretrained model.

    None if there is none, or if with it PEFT would expect a head that is not in the file, or pass the model arguments
    that it does not take.
    """
    base, config = model.get_base_model(), model.peft_config[model.active_adapter]
    kinds = auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    name = next((name for name, kind in kinds.items() if _builds(kind, base)), None)
    if name is None:
        return None
    heads = [part for part, _ in base.named_modules() if part.endswith(HEADS)]
    stored = getattr(config, "modules_to_save", None) or ()
    accepted, passed = (signature(part).parameters.values() for part in (base.forward, kinds[name].forward))
    names = {p.name for p in passed if p.kind is not Parameter.VAR_KEYWORD} - {"self", "task_ids"}
    fits = any(p.kind is Parameter.VAR_KEYWORD for p in accepted) or names <= {p.name for p in accepted}
    return name if fits and all(any(f".{part}".endswith(f".{end}") for end in stored) for part in heads) else None


def _builds(kind: type, base: nn.Module) -> bool:
    """Whether the Auto class for PeftModels of class `kind` builds models of the class of `base`."""
    for auto_class in vars(auto).values():
        if getattr(auto_class, "_target_peft_class", None) is kind and auto_class._target_class is not None:
            built = auto_class._target_class._model_mapping.get(type(getattr(base, "config", None)), ())
            return type(base) in (built if isinstance(built, tuple | list) else (built,))
    return False
