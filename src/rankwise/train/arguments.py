"""The settings of a run as transformers' TrainingArguments, and its autocast."""

import dataclasses
import os
import typing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import SchedulerType, TrainingArguments, get_scheduler

from rankwise import reporters
from rankwise.errors import InputError, nearest
from rankwise.processes import together
from rankwise.settings import RunConfig
from rankwise.settings.run import explain
from rankwise.train.progress import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECOMPUTE = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""The name of gradient checkpointing in this version of transformers."""
HOW = {"use_reentrant": False}  # reentrant checkpointing, once the default, finds no gradient below frozen embeddings
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
    "report_to": "report_to",
}
"""Fields of TrainingArguments, and the settings of a run that take their place."""
_PASSED_ON = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs", "neftune_noise_alpha"),
    *("tf32", "full_determinism", "torch_empty_cache_steps", "dataloader_pin_memory"),
)
"""Fields that `trainer` may have. A run sets the others itself, or they would change nothing in it, or break its exact
resume, its evaluations or its optimizer."""


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: the settings of a run with these names."""

    trust_remote_code: bool = False
    dtype: str = "fp32"
    autocast: str | None = None
    quantise: str = "none"
    attention: str = "auto"

    @classmethod
    def of(cls, config: RunConfig) -> "Loading":
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` and `from_config`."""
        chosen = {} if self.attention == "auto" else {"attn_implementation": self.attention}
        return {"dtype": DTYPES[self.dtype], "trust_remote_code": self.trust_remote_code, **chosen}

    @property
    def computing(self) -> str:
        """What layers compute in, a key of DTYPES; `none` without autocast: fp32."""
        return self.autocast or ("none" if self.dtype == "fp32" else self.dtype)

    @property
    def plain(self) -> bool:
        """Whether weights are fp32, and attention is left to the model."""
        return (self.dtype, self.quantise, self.attention) == ("fp32", "none", "auto")


LOADING = Loading()
"""By default."""


def arguments(folder: Path, config: RunConfig, plan: Plan) -> TrainingArguments:
    """The arguments of transformers' Trainer.

    Raises:
        InputError: `trainer` has a field that does not exist, that a run sets itself, or that has a wrong value, or the
            device does not have the autocast dtype, or what is in `report_to` is not installed.
    """
    _check_names(config)
    reporters.check(config)
    _check_device(config)
    try:
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=plan.steps,
            num_train_epochs=0,  # or with max_steps=0 the Trainer would take three epochs
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
            # to the Trainer 1.0 is one step, here it is all of them
            warmup_steps=plan.steps if config.warmup == 1 else config.warmup,
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip,
            label_smoothing_factor=config.label_smoothing,
            seed=config.seed,
            data_seed=config.seed,
            bf16=Loading.of(config).computing == "bf16",
            fp16=Loading.of(config).computing == "fp16",
            train_sampling_strategy="group_by_length",
            logging_steps=1,  # Progress checks every loss
            logging_nan_inf_filter=False,  # and ends the run at the first that is not finite
            save_strategy="no",  # Progress decides when to save, and what to delete
            use_cpu=not torch.cuda.is_available(),
            ddp_timeout=int(together.PATIENCE.total_seconds()),
            remove_unused_columns=False,  # the task's collate chooses the columns
            disable_tqdm=True,
            report_to=[],  # Progress reports scores too, and goes on if a reporter fails
            **{
                "dataloader_pin_memory": torch.cuda.is_available(),
                **({RECOMPUTE: True, f"{RECOMPUTE}_kwargs": HOW} if config.gradient_checkpointing else {}),
                **config.trainer,
            },
        )
        _check_values(config, args)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error
    # One GPU per process. With several the Trainer would use DataParallel, which copies the model in each step and does
    # not follow rank changes.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _check_values(config: RunConfig, args: TrainingArguments) -> None:
    """Make an optimizer and a schedule of these arguments, which raise what a run would raise at its first step."""
    optimizer = torch.optim.AdamW(
        [torch.zeros(1)], args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon
    )
    if not (options := args.lr_scheduler_kwargs):
        return
    name = args.lr_scheduler_type
    try:
        if name == SchedulerType.CONSTANT_WITH_WARMUP:  # it would ignore them
            raise TypeError("it takes none")
        get_scheduler(name, optimizer, 0, 2, options)  # type: ignore[arg-type]  # computes the first rate
    except Exception as error:
        reason = str(error).partition("() ")[2] or str(error)
        raise InputError(f"trainer.lr_scheduler_kwargs: wrong for schedule = {config.schedule}: {reason}") from error


def check(config: RunConfig) -> None:
    """Raise InputError for anything that `arguments` would refuse, and for `compile` without a compiler."""
    if config.compile and not torch.cuda.is_available():
        from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds

        try:
            get_cpp_compiler()
        except RuntimeError:
            raise InputError("compile: there is no C++ compiler: install g++, or leave it out") from None
    if os.environ.get("WORLD_SIZE") is None:  # else TrainingArguments would join the other processes
        arguments(
            Path("run"), config, Plan(rows=1, batch_size=config.batch_size, steps=1, eval_every=1, checkpoint_every=1)
        )


@contextmanager
def computing(config: RunConfig) -> Iterator[None]:
    """Context for an evaluation, with the autocast of the training. It is not compiled."""
    with ExitStack() as stack:
        if config.compile:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if (kind := Loading.of(config).computing) != "none":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            stack.enter_context(torch.autocast(device, DTYPES[kind]))
        yield


def _check_names(config: RunConfig) -> None:
    hints = typing.get_type_hints(TrainingArguments)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in config.trainer:
        if name in _INSTEAD:
            raise InputError(f"trainer.{name}: set {_INSTEAD[name]} of the run instead")
        if name not in known:
            raise InputError(f"trainer.{name}: TrainingArguments has no such field{nearest(name, known)}")
        if name not in _PASSED_ON:
            raise InputError(f"trainer.{name}: a run decides this itself; leave it out")
        try:
            TypeAdapter(hints[name]).validate_python(config.trainer[name], strict=True)
        except ValidationError as error:
            raise InputError(explain(error, f"trainer.{name}")) from None


def _check_device(config: RunConfig) -> None:
    kind = Loading.of(config).computing
    if kind == "fp16" and not torch.cuda.is_available():
        raise InputError("fp16 needs a GPU; use bf16 or fp32")
    if kind == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise InputError("this GPU has no bf16; use fp16 or fp32")
