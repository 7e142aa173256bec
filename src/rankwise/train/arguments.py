"""The settings of a run as transformers' TrainingArguments, and the numbers that its layers compute with."""

import dataclasses
import os
import typing
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import SchedulerType, TrainingArguments, get_scheduler

from rankwise.errors import InputError, nearest
from rankwise.processes import together
from rankwise.settings import RunConfig
from rankwise.settings.run import explain
from rankwise.train.progress import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INSTEAD = {
    **{name: name for name in ("max_steps", "learning_rate", "weight_decay", "seed")},
    "gradient_checkpointing": "gradient_checkpointing",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "micro_batch",
    "auto_find_batch_size": "micro_batch",
    "per_device_eval_batch_size": "micro_batch",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "label_smoothing_factor": "label_smoothing",
    "data_seed": "seed",
    "bf16": "autocast",
    "fp16": "autocast",
    "eval_strategy": "eval_every",
    "eval_steps": "eval_every",
    "save_strategy": "checkpoint_every",
    "save_steps": "checkpoint_every",
}
"""Fields of TrainingArguments that settings of a run stand for."""
_OURS = """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs average_tokens_across_devices
    batch_eval_metrics bf16_full_eval dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval
    do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start
    eval_use_gather_object fp16_full_eval fsdp fsdp_config gradient_checkpointing_kwargs greater_is_better
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
    include_for_metrics include_num_input_tokens_seen label_names length_column_name liger_kernel_config
    load_best_model_at_end local_rank log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy metric_for_best_model optim optim_args optim_target_modules
    output_dir parallelism_config prediction_loss_only project push_to_hub remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node save_only_model
    save_total_limit skip_memory_metrics torch_compile torch_compile_backend torch_compile_mode trackio_bucket_id
    trackio_space_id trackio_static_space_id train_sampling_strategy use_cache use_cpu use_liger_kernel
"""
"""Fields that a run sets itself, that would change nothing in it, or break its exact resume, evaluations or optimizer.
"""


def arguments(folder: Path, config: RunConfig, plan: Plan) -> TrainingArguments:
    """The arguments of transformers' Trainer.

    Raises:
        InputError: a field in `trainer` that there is not, that is ours, or that has a wrong value, and numbers that
            the device cannot compute with.
    """
    _check_names(config)
    _check_device(config)
    try:
        made = TrainingArguments(
            output_dir=str(folder),
            max_steps=plan.steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
            # the Trainer takes 1.0 for one step, here it means all of them
            warmup_steps=plan.steps if config.warmup == 1 else config.warmup,
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip,
            label_smoothing_factor=config.label_smoothing,
            seed=config.seed,
            data_seed=config.seed,
            bf16=autocast_of(config) == "bf16",
            fp16=autocast_of(config) == "fp16",
            train_sampling_strategy="group_by_length",
            logging_steps=1,  # Progress checks every loss
            logging_nan_inf_filter=False,  # and ends the run at the first that is not finite
            save_strategy="no",  # Progress decides when to save, and what to delete
            use_cpu=not torch.cuda.is_available(),
            ddp_timeout=int(together.PATIENCE.total_seconds()),
            remove_unused_columns=False,  # the task's collate chooses the columns
            disable_tqdm=True,
            report_to=[],
            **{
                "dataloader_pin_memory": torch.cuda.is_available(),
                **(_checkpointing() if config.gradient_checkpointing else {}),
                **config.trainer,
            },
        )
        _check_values(config, made)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error
    # One GPU per process. With several the Trainer would use DataParallel, which copies the model in each step and does
    # not follow rank changes.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def _check_values(config: RunConfig, made: TrainingArguments) -> None:
    """Make an optimizer and a schedule of these arguments, which raise what a run would raise at its first step."""
    optimizer = torch.optim.AdamW(
        [torch.zeros(1)], made.learning_rate, (made.adam_beta1, made.adam_beta2), made.adam_epsilon
    )
    if not (options := made.lr_scheduler_kwargs):
        return
    name = made.lr_scheduler_type
    try:
        if name == SchedulerType.CONSTANT_WITH_WARMUP:  # which would ignore them
            raise TypeError("it has none")
        get_scheduler(name, optimizer, 0, 2, options)  # type: ignore[arg-type]  # which asks for its first rate
    except Exception as error:
        reason = str(error).partition("() ")[2] or str(error)
        raise InputError(f"trainer.lr_scheduler_kwargs: not for schedule = {config.schedule}: {reason}") from error


def _checkpointing() -> dict[str, Any]:
    """Gradient checkpointing, by the name that this version of transformers has for it."""
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    # the other way, the default of old, finds no gradient below frozen embeddings
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}


def check(config: RunConfig) -> None:
    """Raise InputError for all that `arguments` would refuse."""
    if os.environ.get("WORLD_SIZE") is None:  # else it joins the other processes
        arguments(
            Path("run"), config, Plan(rows=1, batch_size=config.batch_size, steps=1, eval_every=1, checkpoint_every=1)
        )


def autocast_of(config: RunConfig) -> str:
    """The numbers that layers compute with, one of DTYPES or `none`."""
    return config.autocast or ("none" if config.dtype == "fp32" else config.dtype)


def computing(config: RunConfig) -> AbstractContextManager[Any]:
    """Around an evaluation: layers compute with the numbers that they are trained with."""
    if (kind := autocast_of(config)) == "none":
        return nullcontext()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", DTYPES[kind])


def _check_names(config: RunConfig) -> None:
    hints = typing.get_type_hints(TrainingArguments)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in config.trainer:
        if name in _INSTEAD:
            raise InputError(f"trainer.{name}: a setting of the run does this: {_INSTEAD[name]}")
        if name in _OURS.split():
            raise InputError(f"trainer.{name}: a run decides this itself; leave it out")
        if name not in known:
            raise InputError(f"trainer.{name}: TrainingArguments has no such field{nearest(name, known)}")
        try:
            TypeAdapter(hints[name]).validate_python(config.trainer[name], strict=True)
        except ValidationError as error:
            raise InputError(explain(error, f"trainer.{name}")) from None


def _check_device(config: RunConfig) -> None:
    kind = autocast_of(config)
    if kind == "fp16" and not torch.cuda.is_available():
        raise InputError("fp16 needs a GPU; take bf16 or fp32")
    if kind == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise InputError("this GPU has no bf16; take fp16 or fp32")
