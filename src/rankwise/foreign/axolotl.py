"""axolotl's YAML, as its schemas in `axolotl/utils/schemas` and its examples have it at its commit 067b021c8."""

from collections.abc import Mapping
from typing import Any

from rankwise.errors import InputError
from rankwise.foreign.carried import NOTHING, Carried

OTHER_AIMS = ("rl", "reward_model", "process_reward_model", "ebft", "diffusion", "qat", "use_eaft")
"""Keys of a training that is not on given answers."""
HOW = (
    *("model_type", "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy", "is_*_derived_model", "device_map"),
    *("dataset_prepared_path", "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory", "dataset_shard_*"),
    *("shuffle_merged_datasets", "shuffle_before_merging_datasets", "skip_prepare_dataset", "remove_unused_columns"),
    *("pad_to_sequence_len", "eval_sample_packing", "sample_packing_*", "multipack_real_batches", "group_by_length"),
    *("gradient_checkpointing_kwargs", "lora_fan_in_fan_out", "lora_on_cpu", "low_cpu_mem_usage", "eval_batch_size"),
    *("logging_steps", "save_total_limit", "save_only_model", "save_safetensors", "save_strategy", "save_first_step"),
    *("auto_resume_from_checkpoints", "strict", "debug", "ddp*", "local_rank", "world_size", "gpu_memory_limit"),
    *("liger_*", "cut_cross_entropy", "lora_*_kernel", "fused_attn_kernel", "flash_attn_*", "use_kernels", "gc_steps"),
    *("dataloader_*", "hf_use_auth_token", "hub_*", "wandb_*", "swanlab_*", "mlflow_*", "comet_*", "loss_watchdog_*"),
    *("chat_template_kwargs", "eot_tokens", "plugins", "torch_compile_*", "experimental_skip_move_to_device"),
    *("tiled_mlp*", "chunked_cross_entropy*", "include_tkps", "include_tokens_per_second", "torch_empty_cache_steps"),
)
"""Keys that say how axolotl works: how fast, with how much memory, what it keeps and where it logs."""
LEAN = (
    *("cut_cross_entropy", "chunked_cross_entropy", "liger_fused_linear_cross_entropy"),
    *("liger_glu_activation", "liger_swiglu", "liger_rms_norm", "liger_layer_norm"),
)
"""Keys by which fewer logits are computed at once, or outputs of activations and norms are not kept."""
SHARDED = "a run is not sharded; see docs/devices.md"


def carry(file: Carried) -> None:
    """Carry an axolotl file over. InputError for a training that is not on given answers."""
    for key in OTHER_AIMS:
        if file.given(key) and file.content[key] is not False:
            raise InputError(f"{file.file}: {key} is set, but rankwise trains on given answers only, not by {key}")
    file.move("base_model", "model")
    file.move("trust_remote_code", "trust_remote_code")
    file.lose("revision_of_model", "the newest revision is loaded: download this one, and name its folder as model")
    file.lose("base_model_config", "the configuration that came with the model is used")
    file.lose("tokenizer_config", "the tokenizer that came with the model is used")
    whole = _method(file)
    _data(file)
    _steps(file)
    _numbers(file, whole)
    _other(file)
    file.mean_nothing(*HOW)
    file.finish()


def _method(file: Carried) -> bool:
    """The method; returns whether it trains all weights."""
    adapter = file.take("adapter")
    bits = 4 if file.take("load_in_4bit") or adapter == "qlora" else 8 if file.take("load_in_8bit") else 0
    whole = adapter is None
    if bits:
        keys = [key for key in ("load_in_4bit", "load_in_8bit") if file.content.get(key)] or ["adapter"]
        file.quantised(bits, ", ".join(keys), whole)
        file.lose("bnb_config_kwargs", "nf4 with double quantisation is used")
    file.lose("gptq", "GPTQ is not known here: quantise with 4bit or 8bit")
    if whole:
        file.put("method.name", "full", "no adapter")
        for key in [key for key in file.content if key.startswith(("lora_", "peft_"))]:
            file.lose(key, "there is no adapter, so it means nothing there either")
        file.lose("unfrozen_parameters", "all weights train; full-top trains the last blocks")
        return True
    dora, start = file.take("peft_use_dora"), file.take("peft_init_lora_weights", True)
    name = "pissa" if start == "pissa" and not dora else "dora" if dora else "lora"
    file.put(
        "method.name", name, "adapter" if name == "lora" else "peft_use_dora" if dora else "peft_init_lora_weights"
    )
    if adapter not in ("lora", "qlora"):
        file.lose("adapter", f"{adapter} is not known here; LoRA is in its place")
    if start == "gaussian":
        file.put("method.init", "normal", "peft_init_lora_weights")
    elif start not in (True, "pissa") or (dora and start != True):  # noqa: E712 - a name is true, too
        file.lose("peft_init_lora_weights", "A starts uniform, B at 0")
    rank = file.number("lora_r", 8)
    file.rank(rank, file.number("lora_alpha", 8), bool(file.take("peft_use_rslora")), "lora_r, lora_alpha")
    if dropout := file.number("lora_dropout", 0):
        file.put("method.dropout", dropout, "lora_dropout")
    if file.take("lora_target_linear"):
        file.put("method.targets", "all-linear", "lora_target_linear")
        file.lose("lora_target_modules", "lora_target_linear adapts all linear layers; others must be named")
    elif file.given("lora_target_modules"):
        file.targets(file.take("lora_target_modules"), "lora_target_modules")
    else:
        file.put("method.targets", "all-linear", "PEFT's own choice for the model there: name modules to have the same")
    file.lose(
        "lora_modules_to_save", "with a decoder nothing trains besides the adapter; name lm_head at method.targets"
    )
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        file.lose(key, "all layers start at one rank and alpha; simplex-lora learns where rank belongs")
    file.lose("lora_model_dir", "training starts with a new adapter; a chain goes on from an earlier run")
    for key in ("peft_layers_to_transform", "peft_layers_pattern", "lora_target_parameters", "lora_target_experts"):
        file.lose(key, "layers are chosen by name; name them at method.targets")
    file.lose("loraplus_lr_ratio", "A and B have one learning rate")
    return False


def _data(file: Carried) -> None:
    """The task: the first data set that is given."""
    key = "pretraining_dataset" if file.given("pretraining_dataset") else "datasets"
    entries = file.take(key, [])
    entries = [entries] if isinstance(entries, str | dict) else entries
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{file.file}: it has no datasets, so there is nothing to train on")
    entry = {"path": entries[0]} if isinstance(entries[0], str) else entries[0]
    if not isinstance(entry, dict):
        raise InputError(f"{file.file}: {key}: expected a list of data sets, each with a path and a type")
    for number in range(1, len(entries)):
        file.lost[f"{key}[{number}]"] = "a task has one data set: put all rows into one file"
    if key == "pretraining_dataset":
        file.lose("datasets", "pretraining_dataset is given, and comes first there too")
    part = Carried(file.source, file.file, entry)
    _of_one(part, key)
    part.mean_nothing("ds_type", "shards*", "preprocess_shards", "message_field_*", "trust_remote_code")
    part.finish()
    file.settings |= part.settings
    file.sources |= part.sources
    file.lost |= {f"{key}[0].{own}": reason for own, reason in part.lost.items()}
    file.meaningless += [f"{key}[0].{own}" for own in part.meaningless]
    if file.take("chat_template", "tokenizer_default") not in ("tokenizer_default", "jinja"):
        file.lose("chat_template", "the tokenizer's own template is used; a file of another one at task.template")
    file.lose("chat_template_jinja", "the tokenizer's own template is used; put this one in a file: task.template")
    file.lose("test_datasets", "give a folder with train.jsonl and validation.jsonl as the data set")
    file.held_out("val_set_size")
    if file.take("train_on_inputs"):
        file.lose("train_on_inputs", "only answers are learnt; task.type: text learns all tokens")
    file.lose("default_system_message", "put it into the rows: a column system, or a first turn")


def _of_one(part: Carried, key: str) -> None:
    path, kind = part.take("path", ""), part.take("type", "completion" if key == "pretraining_dataset" else "")
    files = part.take("data_files")
    if files:  # path is then the kind of file
        names = files if isinstance(files, list) else [files]
        path = str(names[0])
        if len(names) > 1:
            part.lose("data_files", "a task has one data set: put all rows into one file")
    name = kind if isinstance(kind, str) else "columns"
    family = name.partition(".")[0].partition(":")[0]
    columns: dict[str, str] = {}
    if isinstance(kind, Mapping):
        task = "instruct"
        columns = _columns(part, kind)
    elif family == "chat_template" or family == "sharegpt":
        task = "chat"
        if field := part.take("field_messages"):
            columns["messages"] = str(field)
        elif family == "sharegpt":
            columns["messages"] = "conversations"
    elif family in ("completion", "pretrain"):
        task = "text"
        if field := part.take("field") or part.take("text_column"):
            columns["text"] = str(field)
    elif family.startswith("alpaca"):
        task = "instruct"
        part.lost["type"] = "the columns are read, in the tokenizer's template instead of Alpaca's words"
    else:
        task = "chat"
        part.lost["type"] = f"{name or 'none'} is not known here; write conversations in a column messages"
    part.put("task.type", task, f"type: {name}" if name else "")
    part.put("task.dataset", str(path), "data_files" if files else "path")
    if columns:
        part.put("task.columns", columns, f"columns of {key}")
    if part.take("split", "train") != "train":
        part.lose("split", "all rows of train are read; train_rows takes some")
    if part.take("roles_to_train", ["assistant"]) not in (
        ["assistant"],
        ["gpt"],
        ["assistant", "gpt"],
        ["gpt", "assistant"],
    ):
        part.lose("roles_to_train", "the assistant's turns are learnt")
    if part.take("train_on_eos", "turn") not in ("turn", "all"):
        part.lose("train_on_eos", "the end of each answer is learnt")
    for own in ("name", "revision", "roles", "system_prompt"):
        part.lose(own, {"name": "no part of a data set on the hub can be named: download it"}.get(own, NOTHING))


def _columns(part: Carried, kind: Mapping[str, Any]) -> dict[str, str]:
    """Columns that the file names by their role in a prompt of its own."""
    roles = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
    roles["field_system"] = "system"
    for key, value in kind.items():
        if key not in roles and value:
            part.lost[f"type.{key}"] = "the tokenizer's template has the words around the columns"
    return {role: str(kind[key]) for key, role in roles.items() if kind.get(key)}


def _steps(file: Carried) -> None:
    micro, steps = file.number("micro_batch_size", 1), file.number("gradient_accumulation_steps", 0)
    if total := file.number("batch_size"):
        steps = steps or max(1, total // (micro or 1))
    file.batch(micro, steps or 1, "micro_batch_size × gradient_accumulation_steps")
    file.put("epochs", float(file.number("num_epochs", 1)), "num_epochs" if file.given("num_epochs") else "")
    file.move("max_steps", "max_steps")
    file.put("learning_rate", float(file.number("learning_rate", 2e-4)), "learning_rate")
    name = file.schedule("lr_scheduler", "cosine")
    steps, ratio = file.number("warmup_steps"), file.number("warmup_ratio")
    file.warmup(steps, ratio, 0.03, name == "constant")
    if not file.given("evals_per_epoch") or file.content["evals_per_epoch"] in (1, 0):
        if file.take("evals_per_epoch") == 0:
            file.put("eval_every", 0, "evals_per_epoch: 0")
    else:
        file.lose("evals_per_epoch", "eval_every counts steps; once an epoch when it is left out")
    if file.take("saves_per_epoch", 1) != 1:
        file.lose("saves_per_epoch", "checkpoint_every counts steps; once an epoch when it is left out")
    for key, setting in (("eval_steps", "eval_every"), ("save_steps", "checkpoint_every")):
        if isinstance(value := file.number(key), int):
            file.put(setting, value, key)
        else:
            file.lose(key, f"{setting} counts steps, not shares")


def _numbers(file: Carried, whole: bool) -> None:
    file.put("max_length", file.number("sequence_len", 512), "sequence_len; longer rows are cut")
    if file.take("excess_length_strategy", "drop") != "truncate":
        file.lost["excess_length_strategy"] = "rows that are too long are cut, not dropped; rankwise data counts them"
    if file.take("sample_packing"):
        file.put("packing", True, "sample_packing; batch_size counts rows of the data here, packed ones there")
    bf16, fp16 = file.take("bf16", "auto"), file.take("fp16")
    if file.take("bfloat16") or file.take("float16"):
        bf16, fp16 = file.content.get("bfloat16"), file.content.get("float16")
    file.precision(bool(bf16) and not fp16, bool(fp16), "bf16" if bf16 and not fp16 else "fp16", whole)
    if file.take("tf32", "auto") is True:
        file.lose("tf32", "put `trainer: {tf32: true}` where the GPU has it")
    if file.take("gradient_checkpointing"):
        file.put("gradient_checkpointing", True, "gradient_checkpointing")
        if isinstance(file.content["gradient_checkpointing"], str):
            file.lose("gradient_checkpointing", "activations are computed again, not moved to other memory")
    for key, name in (
        ("flash_attention", "flash_attention_2"),
        ("sdp_attention", "sdpa"),
        ("eager_attention", "eager"),
    ):
        if file.take(key):
            file.attention(name, key)
    if file.given("attn_implementation"):
        file.attention(str(file.take("attn_implementation")), "attn_implementation")
    file.optimizer("optimizer")
    file.trainer(file.number("adam_eps"))


def _other(file: Carried) -> None:
    if file.given("output_dir"):
        file.put("runs", str(file.take("output_dir")), "output_dir; each run has a folder of its own in it")
    trackers = {
        "wandb_project": "wandb",
        "use_wandb": "wandb",
        "use_mlflow": "mlflow",
        "use_tensorboard": "tensorboard",
    }
    if names := sorted({name for key, name in trackers.items() if file.given(key) and file.take(key)}):
        file.put("report_to", names, ", ".join(key for key in trackers if file.given(key)))
    tokens = file.take("special_tokens", {})
    if not isinstance(tokens, Mapping) or tokens.keys() - {"pad_token"}:
        file.lose("special_tokens", "the tokenizer's own special tokens are used")
    for key in ("fsdp", "fsdp_config", "fsdp_version", "deepspeed", "dp_shard_size", "dp_replicate_size"):
        file.lose(key, SHARDED)
    for key in ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "expert_parallel_size"):
        file.lose(key, SHARDED)
    file.lose("tokens", "no tokens are added to the vocabulary")
    file.lose("processor_type", "pictures and sound are not read")
    if file.take("liger_use_token_scaling"):
        file.lose("liger_use_token_scaling", "all tokens count the same in the loss")
    file.compiled()
    file.lean(*LEAN)
