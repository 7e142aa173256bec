"""LLaMA-Factory's YAML, as its `hparams` and its examples have it at its commit ff6d4d12e."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import InputError
from rankwise.files import read_json
from rankwise.foreign.carried import Carried
from rankwise.settings.yaml_files import quoted

HOW = (
    *("preprocessing_*", "overwrite_*", "dataloader_*", "plot_loss", "ddp_*", "do_train", "do_eval", "dataset_dir"),
    *("logging_*", "save_only_model", "save_total_limit", "save_strategy", "data_shared_file_system", "media_dir"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "batch_eval_metrics", "use_fast_tokenizer", "run_name"),
    *("include_num_input_tokens_seen", "use_unsloth*", "low_cpu_mem_usage", "hf_hub_token"),
    *("use_reentrant_gc", "gradient_checkpointing_kwargs", "cache_dir", "tokenized_path", "print_param_status"),
    *("ignore_pad_token_for_loss", "resume_from_checkpoint", "remove_unused_columns", "ray_*", "export_*"),
)
"""Keys that say how LLaMA-Factory works: how fast, what it keeps and where it logs."""
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
"""Its names of the columns of a question and its answer -> our roles."""


def carry(file: Carried) -> None:
    """Carry a LLaMA-Factory file over. InputError for a training that is not on given answers."""
    stage = file.take("stage", "sft")
    if stage not in ("sft", "pt"):
        raise InputError(f"{file.file}: stage is {stage}, but rankwise trains on given answers only: sft and pt")
    if file.take("do_predict") or not file.given("dataset"):
        raise InputError(f"{file.file}: it trains nothing: it has no dataset, or do_predict")
    file.move("model_name_or_path", "model")
    file.move("trust_remote_code", "trust_remote_code")
    file.lose("model_revision", "the newest revision is loaded: download this one, and name its folder as model")
    whole = _method(file)
    _data(file, stage == "pt")
    _steps(file)
    _numbers(file, whole)
    if file.given("output_dir"):
        file.put("runs", str(file.take("output_dir")), "output_dir; each run has a folder of its own in it")
    given = file.take("report_to", [])
    names = given if isinstance(given, list) else [given]
    if known := [name for name in names if name in ("tensorboard", "wandb", "trackio", "mlflow")]:
        file.put("report_to", known, "report_to")
    elif names not in ([], ["none"], [False]):
        file.lose("report_to", "tensorboard, wandb, trackio and mlflow are known")
    for key in ("deepspeed", "fsdp", "fsdp_config", "fsdp_transformer_layer_cls_to_wrap"):
        file.lose(key, "a run is not sharded; see docs/devices.md")
    for key in ("image_max_pixels", "video_max_pixels", "video_fps", "video_maxlen", "freeze_vision_tower"):
        file.lose(key, "pictures and films are not read")
    file.mean_nothing(*HOW)
    file.finish()


def _method(file: Carried) -> bool:
    """The method; returns whether it trains all weights."""
    kind = file.take("finetuning_type", "lora")
    bits, whole = file.number("quantization_bit"), kind in ("full", "freeze")
    if bits in (4, 8):
        file.quantised(int(bits), "quantization_bit", whole)
    else:
        file.lose("quantization_bit", "a base is quantised to 8 or 4 bits")
    if file.take("quantization_method", "bnb") not in ("bnb", "bitsandbytes"):
        file.lose("quantization_method", "bitsandbytes is used")
    if file.take("double_quantization") is False:
        file.lose("double_quantization", "4 bits come with double quantisation")
    if whole:
        file.put("method.name", "full-top" if kind == "freeze" else "full", "finetuning_type")
        if (layers := file.number("freeze_trainable_layers", 2)) and kind == "freeze":
            if layers > 0:
                file.put("method.blocks", layers, "freeze_trainable_layers")
            else:
                file.lose("freeze_trainable_layers", "the last blocks train, not the first: method.blocks")
        return True
    if kind != "lora":
        file.lose("finetuning_type", f"{kind} is not known here; LoRA is in its place")
    dora, pissa = bool(file.take("use_dora")), bool(file.take("pissa_init"))
    file.put("method.name", "dora" if dora else "pissa" if pissa else "lora", "use_dora" if dora else "finetuning_type")
    if dora and pissa:
        file.lose("pissa_init", "with DoRA, A starts uniform and B at 0")
    file.lose("pissa_iter", "the singular values are computed exactly")
    rank = file.number("lora_rank", 8)
    alpha = file.number("lora_alpha", 2 * rank)
    file.rank(rank, alpha, bool(file.take("use_rslora")), "lora_rank, lora_alpha" if file.given("lora_rank") else "")
    if dropout := file.number("lora_dropout", 0):
        file.put("method.dropout", float(dropout), "lora_dropout")
    value = str(file.take("lora_target", "all"))
    file.targets(value if value == "all" else [name.strip() for name in value.split(",")], "lora_target")
    file.lose("additional_target", "with a decoder nothing trains besides the adapter; name lm_head at method.targets")
    file.lose("adapter_name_or_path", "training starts with a new adapter; a chain goes on from an earlier run")
    file.lose("loraplus_lr_ratio", "A and B have one learning rate")
    return False


def _data(file: Carried, plain: bool) -> None:
    """The task: the first data set that is given, as `dataset_info.json` describes it."""
    value = file.take("dataset")
    names = [name.strip() for name in (value.split(",") if isinstance(value, str) else map(str, value)) if name.strip()]
    if not names:
        raise InputError(f"{file.file}: dataset = {quoted(value)}: names none")
    if len(names) > 1:
        file.lost[f"dataset: {', '.join(names[1:])}"] = "a task has one data set: put all rows into one file"
    folder, known = _known(file.file, Path(str(file.take("dataset_dir", "data"))))
    about = known.get(names[0])
    if not isinstance(about, Mapping):
        file.lost[f"dataset: {names[0]}"] = (
            f"no {folder}/dataset_info.json says what it is: put file and columns at task"
        )
        about = {"file_name": f"{names[0]}.json"}
    columns, sharegpt = about.get("columns", {}), about.get("formatting") == "sharegpt"
    roles = {"messages": "messages", "system": "system", "tools": "tools"} if sharegpt else ALPACA
    kind = "text" if plain else "chat" if sharegpt else "instruct"
    if plain:
        roles = {"prompt": "text"}
    name = about.get("hf_hub_url") or str(folder / str(about.get("file_name", names[0])))
    file.put("task.type", kind, f"stage {'pt' if plain else 'sft'}")
    file.put("task.dataset", str(name), "dataset")
    usual = {"messages": "conversations"} if sharegpt else {}
    found = {role: str(columns.get(own, usual.get(own, ""))) for own, role in roles.items()}
    if found := {role: column for role, column in found.items() if column}:
        file.put("task.columns", found, "columns of dataset_info.json" if columns else "")
    for own in columns:
        if own not in roles:
            file.lost[f"columns.{own}"] = "there is no such role; a conversation of several turns is a column messages"
    tags = about.get("tags", {})
    usual = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    openai = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    for tag, value in tags.items():
        if value not in (usual.get(tag), openai.get(tag)):
            file.lost[f"tags.{tag}"] = "turns have role and content, or from and value"
    for own in ("subset", "split", "num_samples", "ranking", "folder"):
        if about.get(own):
            file.lost[f"dataset_info.{own}"] = "all rows of train are read; train_rows takes some"
    file.lose("template", "the tokenizer's own template is used; a file of another one at task.template")
    if samples := file.number("max_samples"):
        file.put("train_rows", samples, "max_samples; there the first ones, here some at random")
    file.held_out("val_size")
    file.lose("eval_dataset", "give a folder with train.jsonl and validation.jsonl as the data set")
    for own in ("train_on_prompt", "mask_history"):
        if file.take(own):
            file.lose(own, "all answers are learnt, and nothing else; task.type: text learns all tokens")
    file.lose("default_system", "put it into the rows: a column system, or a first turn")


def _known(file: Path, folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The folder of the data, looked for from here and from where the file is, and what its `dataset_info.json` has."""
    for place in (
        folder,
        *(parent / folder for parent in file.parents),
        *(up / folder for up in file.resolve().parents),
    ):
        if (place / "dataset_info.json").is_file():
            found = read_json(place / "dataset_info.json")
            return place, found if isinstance(found, dict) else {}
    return folder, {}


def _steps(file: Carried) -> None:
    micro, steps = file.number("per_device_train_batch_size", 8), file.number("gradient_accumulation_steps", 1)
    file.batch(micro, steps, "per_device_train_batch_size × gradient_accumulation_steps")
    file.put("epochs", float(file.number("num_train_epochs", 3)), "num_train_epochs")
    if (most := file.number("max_steps", -1)) > 0:
        file.put("max_steps", most, "max_steps")
    file.put("learning_rate", float(file.number("learning_rate", 5e-5)), "learning_rate")
    name = file.schedule("lr_scheduler_type", "linear")
    steps = file.number("warmup_steps") or None
    file.warmup(steps, file.number("warmup_ratio"), 0, name == "constant")
    for key, setting, strategy in (
        ("eval_steps", "eval_every", "eval_strategy"),
        ("save_steps", "checkpoint_every", ""),
    ):
        if isinstance(value := file.number(key), int):
            file.put(setting, value, key)
        else:
            file.lose(key, f"{setting} counts steps, not shares")
        if strategy and file.take(strategy, "steps") not in ("steps", "epoch"):
            file.put(setting, 0, strategy)


def _numbers(file: Carried, whole: bool) -> None:
    file.put("max_length", file.number("cutoff_len", 2048), "cutoff_len")
    if file.take("packing") or file.take("neat_packing"):
        own = "neat_packing" if file.content.get("neat_packing") else "packing"
        file.put("packing", True, f"{own}; batch_size counts rows of the data here, packed ones there")
    bf16, fp16 = file.take("bf16") or file.take("pure_bf16"), file.take("fp16")
    file.precision(bool(bf16), bool(fp16), "bf16" if bf16 else "fp16", whole)
    if file.take("pure_bf16"):
        file.lose("pure_bf16", "what trains is fp32 in any case")
    off = file.take("disable_gradient_checkpointing") or file.take("gradient_checkpointing", True) is False
    file.put("gradient_checkpointing", not off, "" if not off else "disable_gradient_checkpointing")
    if file.given("flash_attn"):
        file.attention(str(file.take("flash_attn")), "flash_attn")
    file.optimizer("optim")
    file.move("label_smoothing_factor", "label_smoothing")
    file.trainer()
    file.compiled()
    file.lean("enable_liger_kernel")
