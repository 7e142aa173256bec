"""Weights of a model that are not in its checkpoint: loading the checkpoint again gives them other values.

transformers marks each tensor that it loads. Tensors that the checkpoint lacks, such as a new classifier's, get random
values and no mark. Rows added by `resize_token_embeddings` are in a marked tensor, so the vocabulary size is compared.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

MARK = "_is_hf_initialized"


def new_weights(model: nn.Module) -> list[str]:
    """Names of the parameters of `model` that are not in its checkpoint, with or without PEFT's layers in it.

    Empty for a model that was not loaded from a checkpoint. In a deep copy, which has lost the marks, these are all
    parameters that may be new: those outside the body, and those of a pooler inside it.
    """
    if not isinstance(model, PreTrainedModel) or not model.name_or_path:
        return []
    parameters = {name: p for name, p in own_tensors(model).items() if isinstance(p, nn.Parameter)}
    if any(hasattr(p, MARK) for p in parameters.values()):
        new = {id(p) for p in parameters.values() if not hasattr(p, MARK)}
    else:
        output = model.get_output_embeddings()
        known = {id(p) for part in (model.base_model, output) if part is not None for p in part.parameters()}
        new = {id(p) for name, p in parameters.items() if id(p) not in known or ".pooler." in f".{name}"}
    tables = (model.get_input_embeddings(), model.get_output_embeddings()) if _resized(model) else ()
    new |= {id(p) for table in tables if table is not None for p in table.parameters()}
    return [name for name, p in parameters.items() if id(p) in new]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers in the model's state dict, under all their names.

    The state of quantised weights, such as bitsandbytes' `absmax`, is in the state dict too, but in no buffer.
    """
    names = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point tensors of the model's own state under all their names, without those of adapters."""
    added = tuple(f"{name}.{part}." for name, module in model.named_modules() for part in _added(module))
    known = dict(model.named_parameters(remove_duplicate=False)).keys() | buffers(model).keys()
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in known
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta
        if type(tensor.data) is Tensor and not f"{name}.".startswith(added)
    }


def _added(module: nn.Module) -> list[str]:
    """Names of the children and parameters that PEFT has added to a module, or replaced by a copy."""
    if isinstance(module, ModulesToSaveWrapper):
        return ["original_module", "modules_to_save"]
    if isinstance(module, BaseTunerLayer):
        return [name for name in (*vars(module)["_modules"], *vars(module)["_parameters"]) if name != "base_layer"]
    return []


def _resized(model: Any) -> bool:
    """Whether the vocabulary size differs from the checkpoint's, or the checkpoint can no longer be read."""
    kind = type(model.config)
    try:
        values, _ = kind.get_config_dict(model.name_or_path, local_files_only=True)
        return kind.from_dict(values).get_text_config().vocab_size != model.config.get_text_config().vocab_size
    except (OSError, ValueError):
        return True
    except AttributeError:  # no vocabulary
        return False
