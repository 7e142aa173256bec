"""PEFT's `adapter_config.json`, as PEFT 0.21 writes it; it says nothing about data or training."""

from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from rankwise.errors import InputError
from rankwise.foreign.carried import Carried

TASKS = {"CAUSAL_LM": "chat", "SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "classification"}
"""PEFT's kinds of task -> the type of ours that trains such a model."""


def carry(file: Carried) -> None:
    """Carry an adapter's configuration over. InputError for adapters that are not LoRA."""
    kind = file.take("peft_type")
    if kind != "LORA":
        raise InputError(f"{file.file}: peft_type is {kind}, but only LORA can be imported; see rankwise methods")
    file.move("base_model_name_or_path", "model")
    file.lose("revision", "the newest revision is loaded: download this one, and name its folder as model")
    task = str(file.take("task_type"))
    if task not in TASKS:
        file.lost["task_type"] = f"{task} is not known here; chat is in its place"
    if isinstance(kind := file.take("auto_mapping"), dict):
        file.lose("auto_mapping", f"it adapts a {kind.get('base_model_class')}; models of other kinds may not be read")
    file.put("task.type", TASKS.get(task, "chat"), f"task_type {task}; the adapter does not say what it learnt")
    file.put("task.dataset", "train.jsonl", "put your own here")
    dora, start = bool(file.take("use_dora")), file.take("init_lora_weights", True)
    pissa = start == "pissa" and not dora
    file.put("method.name", "dora" if dora else "pissa" if pissa else "lora", "use_dora" if dora else "peft_type")
    if start == "gaussian":
        file.put("method.init", "normal", "init_lora_weights")
    elif start is not True and not pissa:
        file.lose("init_lora_weights", "A starts uniform, B at 0")
    file.rank(file.number("r", 8), file.number("lora_alpha", 8), bool(file.take("use_rslora")), "r, lora_alpha")
    if dropout := file.number("lora_dropout", 0):
        file.put("method.dropout", float(dropout), "lora_dropout")
    targets = file.take("target_modules")
    if targets is None:
        file.put("method.targets", "all-linear", "PEFT's own choice for the model there: name modules to have the same")
    else:
        file.targets(targets, "target_modules")
        if "method.targets" not in file.settings:
            file.put("method.targets", "all-linear", "target_modules is a regular expression: name modules")
    for key in ("rank_pattern", "alpha_pattern"):
        file.lose(key, "all layers start at one rank and alpha; simplex-lora learns where rank belongs")
    saved = file.take("modules_to_save")
    if task != "SEQ_CLS" or not isinstance(saved, list) or not {*map(str, saved)} <= {*SEQ_CLS_HEAD_NAMES}:
        file.lose("modules_to_save", "the head of a classifier trains with every method, and nothing else does")
    if file.take("bias", "none") != "none":
        file.lose("bias", "biases stay frozen; bitfit trains them, and nothing else")
    for key in ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters"):
        file.lose(key, "layers are chosen by name; name them at method.targets")
    file.mean_nothing("inference_mode", "fan_in_fan_out", "peft_version", "megatron_core", "qalora_group_size")
    file.finish()
