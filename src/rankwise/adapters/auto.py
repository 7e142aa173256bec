"""What PEFT has to know of the pretrained model so that its Auto classes can build it again."""

from inspect import Parameter, signature

from peft import PeftModel, auto
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")
"""How the names of modules end that PEFT trains and loads whole with a task of classes or of answers, unasked."""


def task(model: PeftModel) -> str | None:
    """PEFT's name for what the pretrained model does: the one whose Auto class would build this very class.

    None where there is no such name, or where PEFT would then expect a head in the file that is not there, or hand the
    model arguments that it does not take.
    """
    base, config = model.get_base_model(), model.peft_config[model.active_adapter]
    kinds = auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    name = next((name for name, kind in kinds.items() if _builds(kind, base)), None)
    if name is None:
        return None
    heads = [part for part, _ in base.named_modules() if part.endswith(HEADS)]
    stored = getattr(config, "modules_to_save", None) or ()
    taken, given = (signature(part).parameters.values() for part in (base.forward, kinds[name].forward))
    names = {p.name for p in given if p.kind is not Parameter.VAR_KEYWORD} - {"self", "task_ids"}
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in taken)
    fits = takes_any or names <= {p.name for p in taken}
    return name if fits and all(any(f".{part}".endswith(f".{end}") for end in stored) for part in heads) else None


def _builds(kind: type, base: nn.Module) -> bool:
    """Whether the Auto class that makes PeftModels of this kind makes models of the class of `base`."""
    for found in vars(auto).values():
        if getattr(found, "_target_peft_class", None) is kind and found._target_class is not None:
            made = found._target_class._model_mapping.get(type(getattr(base, "config", None)), ())
            return type(base) in (made if isinstance(made, tuple | list) else (made,))
    return False
