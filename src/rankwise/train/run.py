"""The whole life of one run, inside its folder.

The folder is the state. It starts with `run.yaml`; the run adds `env.json`, `metrics.jsonl`, `ranks.jsonl` and
checkpoints on the way, and at the end `predictions.parquet`, `adapter/` and, last of all, `result.json`, upon which the
checkpoints go. Killed at any moment and started again, it goes on from the newest complete checkpoint and ends with the
same files, byte for byte, as a run that was never cut, `env.json` and the `cost` in `result.json` apart.
"""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

import rankwise
from rankwise import methods, tasks
from rankwise.config import InputError, RunConfig, Schema, load, need, read_yaml
from rankwise.export import save
from rankwise.methods import Method
from rankwise.ranks.resize import merged
from rankwise.runs.files import read_lines, unwritable, write_whole
from rankwise.runs.store import Store
from rankwise.tasks import Split, Task, encode, subset
from rankwise.train import model as models
from rankwise.train.checkpoint import learnt_state, load_learnt
from rankwise.train.evaluate import Evaluation, predict, score, table
from rankwise.train.files import last_complete
from rankwise.train.progress import Carried, DivergedError, Plan, Progress
from rankwise.train.stop import Stop, follow_parent, stoppable
from rankwise.train.trainer import RankTrainer

if TYPE_CHECKING:
    from datasets import Dataset


WEIGHTS = "weights.pt"
"""All that was learnt, unfolded, where another run begins with it."""


def run(folder: Path) -> dict[str, Any]:
    """Train, evaluate and save the run whose `run.yaml` lies in `folder`, and return what `result.json` then holds.

    A finished run is returned untouched; an unfinished one goes on from its newest complete checkpoint, if it
    has one. Whatever goes wrong is written to `error.txt` and raised: InputError for what the user
    gave, DivergedError for a loss that is not finite, OSError for a full disk. After a SIGTERM or Ctrl-C the step is
    finished and a checkpoint written, then SystemExit(75 or 130).
    """
    folder = Path(folder)
    if not (folder / "run.yaml").is_file():
        raise InputError(f"{folder}: there is no run.yaml in it; give the folder of a run")
    finished = Store(folder.parent).result
    if result := finished(folder):  # also in a folder that cannot be written to
        return result
    with _locked(folder):
        try:
            name, config = _read(folder)
            return finished(folder) or _live(folder, name, config)
        except Exception as error:
            with suppress(OSError):  # on a full disk the error itself is worth more than the note of it
                write_whole(folder / "error.txt", f"{_first_line(error)}\n\n{traceback.format_exc()}")
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / "run.lock", timeout=2)  # seconds: a look at its state holds it for a moment
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{folder}: another process is at work on this run; wait for it or end it") from None
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        yield
    finally:
        lock.release()


def _read(folder: Path) -> tuple[str, RunConfig]:
    settings = read_yaml(folder / "run.yaml")
    name = str(settings.pop("id", ""))
    settings.pop("made_with", None)
    config = load(settings, [], Schema(methods.registry(), set(tasks.registry())))
    if not isinstance(config, RunConfig):
        raise InputError(f"{folder / 'run.yaml'}: has `vary:`, so it is an experiment and not one run")
    if not name:
        raise InputError(f"{folder / 'run.yaml'}: has no `id:`; `rankwise train CONFIG.yaml` makes such folders")
    return name, config


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _live(folder: Path, name: str, config: RunConfig) -> dict[str, Any]:
    follow_parent()
    with stoppable() as stop, models.quiet():
        (folder / "error.txt").unlink(missing_ok=True)  # of an earlier try
        write_whole(folder / "env.json", json.dumps(_environment(), indent=1) + "\n")
        parts = _prepare(config)
        checkpoint, carried = _start(folder)
        if checkpoint is None:
            _begin_with(parts.model, Store(folder.parent), folder)
        progress = Progress(folder, parts.plan, parts.method, lambda: parts.scores(parts.logits()), carried, stop)
        _train(folder, parts, checkpoint, progress, stop)
        return _finish(folder, name, parts, progress)


@dataclass(frozen=True)
class Parts:
    """What a run is made of, ready to train."""

    config: RunConfig
    task: Task
    train: Split
    tokens: "Dataset"
    evaluations: list[Evaluation]
    method: Method
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    head: list[str]
    head_parameters: int
    budget: int
    """Parameters of the adapters as they were attached."""
    plan: Plan

    def logits(self) -> list[np.ndarray]:
        """What the model says now about each evaluation split."""
        return [predict(self.model, each.tokens, self.tokenizer, self.config.batch_size) for each in self.evaluations]

    def scores(self, logits: list[np.ndarray]) -> dict[str, float]:
        """Loss and metrics of all evaluation splits together."""
        if not all(np.isfinite(outputs).all() for outputs in logits):
            raise DivergedError("the model's outputs are not finite at an evaluation")
        scored = [score(self.task, each, outputs) for each, outputs in zip(self.evaluations, logits, strict=True)]
        found = {name: value for scores in scored for name, value in scores.items()}
        if not all(map(math.isfinite, found.values())):  # the square of a finite output need not be finite
            raise DivergedError(f"the model's scores are not finite at an evaluation: {found}")
        return found


def _prepare(config: RunConfig) -> Parts:
    task = tasks.load(config.task)
    train = subset(task.train(), config.train_rows)
    splits = [subset(split, config.eval_rows) for split in task.evaluation()]
    set_seed(config.seed)  # before the model, whose head and adapters are drawn at random
    base, tokenizer, head = models.build(config.model, task.labels, config.max_length)
    head_parameters = sum(p.numel() for name in head for p in base.get_submodule(name).parameters())
    method = methods.build(config.method)
    model = method.attach(base, head=head)
    tokens = encode(train, task, tokenizer, config.max_length)
    return Parts(
        config=config,
        task=task,
        train=train,
        tokens=tokens,
        evaluations=[Evaluation(split, encode(split, task, tokenizer, config.max_length)) for split in splits],
        method=method,
        model=model,
        tokenizer=tokenizer,
        head=head,
        head_parameters=head_parameters,
        budget=method.budget(model),
        plan=_plan(config, len(tokens)),
    )


def _plan(config: RunConfig, rows: int) -> Plan:
    per_epoch = math.ceil(rows / config.batch_size)
    return Plan(
        rows=rows,
        batch_size=config.batch_size,
        steps=config.max_steps or math.ceil(config.epochs * per_epoch),
        eval_every=config.eval_every or per_epoch,
        checkpoint_every=config.checkpoint_every or per_epoch,
    )


def _start(folder: Path) -> tuple[Path | None, Carried]:
    """The checkpoint to go on from, None for the beginning, and what it carries."""
    found = last_complete(folder)
    return (found[0], Carried(**found[1])) if found else (None, Carried())


def _begin_with(model: nn.Module, store: Store, folder: Path) -> None:
    """Load what the run before this one in its chain has learnt, if there is one."""
    before = store.before(folder)
    if before is None:
        return
    if store.result(before) is None:
        raise InputError(f"the run that this one begins with is not done; first: rankwise train {before}")
    try:
        state = torch.load(before / WEIGHTS, map_location="cpu", weights_only=True)
    except Exception as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else "is damaged"
        raise InputError(f"{before / WEIGHTS} {what}; delete {before} and run the whole chain again") from error
    if strange := load_learnt(model, state):
        raise InputError(
            f"{strange} is on one side only: the stages of a chain have to train the same parts of the model, so "
            "targets and sizes must not differ"
        )


def _keep_weights(folder: Path, model: nn.Module) -> None:
    made = folder / f".{WEIGHTS}"
    torch.save(learnt_state(model), made)
    made.replace(folder / WEIGHTS)


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _train(folder: Path, parts: Parts, checkpoint: Path | None, progress: Progress, stop: Stop) -> None:
    trainer = RankTrainer(
        method=parts.method,
        model=parts.model,
        args=_arguments(folder, parts.config, parts.plan),
        train_dataset=parts.tokens,
        data_collator=DataCollatorWithPadding(parts.tokenizer),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    with stop.patient():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < parts.plan.steps:
        print(f"stopped after step {trainer.state.global_step}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(stop.code)


def _arguments(folder: Path, config: RunConfig, plan: Plan) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        # the Trainer reads 1.0 as one step, we as all of them
        warmup_steps=plan.steps if config.warmup == 1 else config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        seed=config.seed,
        data_seed=config.seed,
        train_sampling_strategy="group_by_length",
        logging_steps=1,  # Progress looks at each loss
        logging_nan_inf_filter=False,  # and ends the run at the first that is not finite
        save_strategy="no",  # Progress says when
        save_total_limit=2,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
    )
    # One run has one GPU. With several in sight the Trainer would split each batch by DataParallel, which copies the
    # model in each step and knows nothing of rank changes.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _finish(folder: Path, name: str, parts: Parts, progress: Progress) -> dict[str, Any]:
    if parts.config.followed:
        _keep_weights(folder, parts.model)
    parts = replace(parts, model=parts.method.fold(parts.model))  # what is scored is what is saved
    progress.rank_line(parts.model, parts.plan.steps)
    logits = parts.logits()
    scores = parts.scores(logits)
    progress.evaluation_line(parts.plan.steps, parts.plan.steps / parts.plan.per_epoch, scores)
    _write_predictions(folder / "predictions.parquet", table(parts.task, parts.evaluations, logits))
    parameters = _parameters(folder, parts)
    cost = _cost(progress, parts.plan, _save_model(folder, parts))
    result = {
        "run": name,
        "task": parts.config.task,
        "method": parts.method.name,
        "options": asdict(parts.method),
        "model": models.label(parts.config.model),
        "seed": parts.config.seed,
        "learning_rate": parts.config.learning_rate,
        "score": parts.task.main,
        "metrics": {key: value for key, value in scores.items() if not key.startswith("loss")},
        "splits": {
            "train": _split(parts.train),
            "evaluation": [_split(each.split) for each in parts.evaluations],
        },
        "parameters": parameters,
        "cost": cost,
    }
    write_whole(folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    _remove_checkpoints(folder)
    return result


def _write_predictions(path: Path, rows: Any) -> None:
    made = path.with_name(f".{path.name}")
    need("pyarrow.parquet", "bench").write_table(rows, made)
    made.replace(path)


def _save_model(folder: Path, parts: Parts) -> int:
    """Save what was learnt and return its size in bytes: an adapter, or the whole model where products were merged."""
    kept = folder / "adapter"
    if isinstance(parts.model, PeftModel) and merged(parts.model):
        kept = folder / "model"
        parts.model.merge_and_unload().save_pretrained(kept)
    else:
        save(parts.model, kept, parts.method, parts.head)
    return sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())


def _parameters(folder: Path, parts: Parts) -> dict[str, int]:
    """Trainable parameters: the most there were at once, those at the end, the budget; the head's apart."""
    counts = [line["parameters"] - parts.head_parameters for line in read_lines(folder / "ranks.jsonl")]
    return {"trainable": max(counts), "final": counts[-1], "budget": parts.budget, "head": parts.head_parameters}


def _cost(progress: Progress, plan: Plan, adapter_bytes: int) -> dict[str, float]:
    return {
        "seconds": round(progress.carried.seconds, 3),
        "peak_memory_bytes": progress.carried.peak_memory_bytes,
        "examples_per_second": round(plan.examples(plan.steps) / progress.carried.step_seconds, 3),
        "adapter_bytes": adapter_bytes,
    }


def _split(split: Split) -> dict[str, Any]:
    return {"name": split.name, "rows": len(split.data), "official": split.official, "note": split.note}


def _environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "rankwise": rankwise.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
