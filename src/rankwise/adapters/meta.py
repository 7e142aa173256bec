"""The base model of an adapter without its weights, as its configuration names it."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def base_of(config: Mapping[str, Any]) -> tuple[nn.Module | None, str]:
    """The base model on the meta device, or None and a sentence that says why it could not be built."""
    from peft import auto
    from transformers import AutoConfig

    name, task = config.get("base_model_name_or_path"), config.get("task_type")
    kind: Any = None
    for each in vars(auto).values():
        peft_class = auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(task))
        if peft_class is not None and getattr(each, "_target_peft_class", None) is peft_class:
            kind = each._target_class
    mapped = config.get("auto_mapping") or {}
    if kind is None and str(mapped.get("parent_library")).startswith("transformers."):
        kind = getattr(importlib.import_module(mapped["parent_library"]), str(mapped.get("base_model_class")), None)
    try:
        if not name or kind is None:
            raise OSError("the adapter does not name it" if not name else "the class of the model is not known")
        settings = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            return (kind.from_config if hasattr(kind, "from_config") else kind._from_config)(settings), ""
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return None, f"its base model could not be looked at ({reason})"
