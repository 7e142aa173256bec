"""One run, from start to end, in its folder.

The folder is the state. It starts with `run.yaml`; the run adds `env.json`, `metrics.jsonl`, `ranks.jsonl` and
checkpoints, at the end `predictions.parquet` and `adapter/`, and last `result.json`, after which checkpoints are
deleted. Killed at any moment and started again, it resumes from the newest complete checkpoint and ends with the same
files, byte for byte, as a run that was never interrupted, except `env.json`, the `cost` in `result.json`, and what it
has reported to TensorBoard.

Several processes may share a run (`accelerate launch`, `torchrun`): all train; the main one evaluates, writes and holds
the lock. If memory runs out, the run resumes from the newest checkpoint and takes half as many rows at once.
"""

import gc
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, set_seed

import rankwise
from rankwise import methods, tasks
from rankwise import seen as sight
from rankwise.adapters.beside import base_digest
from rankwise.errors import InputError, NotFiniteError
from rankwise.files import (
    ADAPTER,
    CHECKPOINT,
    check_regular,
    check_replaceable,
    disk_errors,
    tidy,
    unwritable,
    write_whole,
    written,
)
from rankwise.metrics import METRICS
from rankwise.named import load_plugin
from rankwise.processes import together
from rankwise.processes.launched import LostError, is_main
from rankwise.processes.stop import Stop, follow_parent, stoppable
from rankwise.reporters import Reporters
from rankwise.runs import run_file
from rankwise.runs.code import Code, code_of
from rankwise.runs.data import FILE as DATA
from rankwise.runs.maker import Maker
from rankwise.runs.result import Result
from rankwise.runs.search import Search
from rankwise.runs.store import FILES, Store
from rankwise.settings import RunConfig, Schema, complete
from rankwise.tasks import Evaluation, subset
from rankwise.train import chain
from rankwise.train import model as models
from rankwise.train.arguments import Loading, arguments, computing
from rankwise.train.callback import unwrapped
from rankwise.train.checkpoint_files import last_complete
from rankwise.train.memory import halve, rows_at_once
from rankwise.train.memory_need import note
from rankwise.train.packing import Packing
from rankwise.train.parts import Parts
from rankwise.train.progress import MOVED, Carried, DivergedError, Plan, Progress
from rankwise.train.result import finish
from rankwise.train.trainer import RunTrainer


def run(folder: Path) -> dict[str, Any]:
    """Train, evaluate and save the run whose `run.yaml` is in `folder`, and return the content of `result.json`.

    A finished run is not changed; an unfinished one resumes from its newest complete checkpoint. Any error is written
    to `error.txt` and `error.json`, and raised: InputError for wrong input, DivergedError for a loss that is not
    finite, OSError for a full disk, OutOfMemory if one row at a time is too much. After a SIGTERM or Ctrl-C the run
    finishes its step, writes a checkpoint and raises SystemExit(75 or 130).

    Processes of one launch (`accelerate launch`) share the run, and each returns the result.
    """
    folder = Path(folder)
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(variable, "").lower() == "true":
            raise InputError(
                "a run cannot be sharded (FSDP, DeepSpeed): launch it without sharding; after a search its adapter can "
                "be trained sharded in Python, see docs/devices.md"
            )
    together.join()
    if result := together.on_first(lambda: _finished(folder)):  # before the lock: the folder may be read-only
        return result.as_json()
    with _locked(folder) if is_main() else nullcontext():
        try:
            if is_main():
                _check_files(folder)
            noted = run_file.load(folder)
            for file in noted.config.plugins:
                load_plugin(file)
            config = complete(noted.config, Schema(methods.registry(), tasks.registry()))
            result = together.on_first(lambda: _finished(folder)) or _until_done(folder, noted.id, config)
        except LostError:
            raise
        except Exception as error:
            if not os.path.lexists(folder / "run.yaml"):
                raise InputError(f"{folder} {MOVED}") from error
            if not (folder / "result.json").exists():  # else the run was done, and its settings were damaged later
                Store(folder.parent).note_error(
                    folder,
                    f"{_first_line(error)}\n\n{traceback.format_exc()}",
                    diverged=isinstance(error, DivergedError),
                    refused=isinstance(error, InputError),
                )
            raise
    together.leave()
    return result.as_json()


def _finished(folder: Path) -> Result | None:
    try:
        check_regular(folder / "run.yaml")
    except FileNotFoundError:
        raise InputError(f"{folder}: there is no run.yaml in it; give the folder of a run") from None
    store = Store(folder.parent)
    if (result := store.result(folder)) is not None:
        store.tidy([folder])
    return result


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / "run.lock", timeout=2)  # seconds: reading a run's state holds it for a moment
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{folder}: another process is at work on this run; wait for it, or stop it") from None
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        yield
    finally:
        lock.release()


def _check_files(folder: Path) -> None:
    """Raise InputError, before any training, if the folder has something else under a name that the run writes."""
    for name in FILES:
        with suppress(FileNotFoundError):
            check_regular(folder / name)
    check_replaceable(folder / "adapter", {*ADAPTER}, "an adapter")
    for path in sorted(folder.iterdir()):
        if (path.name == "model" or CHECKPOINT.fullmatch(path.name)) and path.name not in written(folder):
            raise InputError(f"{path} was not written by this run, which needs the name: move it away")
    tidy(folder)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _until_done(folder: Path, name: str, config: RunConfig) -> Result:
    """Carry out the run, again with fewer rows at once when memory runs out."""
    follow_parent()
    if is_main():
        with suppress(Exception):  # what is wrong with a model is said when it is loaded
            if line := note([config]):
                print(line, file=sys.stderr)
    with stoppable() as stop, models.quiet():
        if is_main():
            Store(folder.parent).forget_error(folder)  # of an earlier attempt
            write_whole(folder / "env.json", json.dumps(_environment(), indent=1) + "\n")
        most = math.ceil(config.batch_size / together.count())
        most = min(most, config.micro_batch or most)
        while True:
            rows = together.on_first(lambda: rows_at_once(folder, most))
            parts = _prepare(folder, config, rows)
            try:
                return _carry_out(folder, name, parts, stop)
            except Exception as error:
                # ShortError: raised in all processes when memory runs out in one of them
                alone = together.count() == 1 and together.out_of_memory(error)
                if not (alone or isinstance(error, together.ShortError)):
                    raise
                reason = _first_line(error)
            # outside of `except`, where the error keeps tensors alive
            del parts
            gc.collect()
            torch.cuda.empty_cache()
            together.on_first(lambda: halve(folder, config, rows, reason))  # noqa: B023 - called at once


def _carry_out(folder: Path, name: str, parts: Parts, stop: Stop) -> Result:
    """The run from its last checkpoint to its end."""
    checkpoint, carried = together.on_first(lambda: _start(folder))
    before = parts.before
    if checkpoint is None and before is not None and before.same:
        chain.load_weights(parts.model, before)
    evaluate = lambda: together.on_first(parts.metrics)  # noqa: E731
    with Reporters(folder, parts.config) as reporters:
        progress = Progress(folder, parts.plan, parts.method, evaluate, carried, stop, reporters)
        search = _train(folder, parts, checkpoint, progress, stop)
        return together.on_first(lambda: finish(folder, name, parts, progress, search))


def code_for(config: RunConfig) -> Code:
    """The code that decides the result of a run with these settings."""
    metrics = [METRICS[name] for name in config.task.get("metrics", ()) if name in METRICS]
    functions = [each for metric in metrics for each in (metric.statistics, metric.value) if each is not None]
    return code_of(run, methods.registry()[config.method["name"]], tasks.registry()[config.task["name"]], *functions)


def _prepare(folder: Path, config: RunConfig, rows: int) -> Parts:
    task = tasks.build(config.task)
    all_splits = [task.train(), *task.evaluation()]
    maker = Maker.now(task.revision(all_splits, tuning=config.tuning is not None), code_for(config))
    together.on_first(lambda: Store(folder.parent).claim(folder, maker))
    before = chain.before(folder)
    whole, *splits = all_splits
    if config.tuning is None:
        train = subset(whole, config.train_rows)
    else:
        train, *splits = task.tuning(whole, config.tuning, config.train_rows)
    if config.tuning is None or config.tuning < 1:  # else their number was asked for
        splits = [subset(split, config.eval_rows) for split in splits]
    set_seed(config.seed)  # before the model, whose head and adapters start at random
    base, processor, head = models.build(config.model, task, config.max_length, train, Loading.of(config))
    if before is not None and not before.same:
        chain.load_weights(base, before)
    digest = base_digest(base, head)
    head_parameters = sum(p.numel() for name in head for p in base.get_submodule(name).parameters())
    method = methods.build(config.method)
    model = method.attach(base, head=head)
    models.prepare(model, config)
    examples = task.encode(train, processor, config.max_length)
    evaluations = [Evaluation(split, task.encode(split, processor, config.max_length)) for split in splits]
    train_rows = Evaluation(train, examples)
    for encoded in (train_rows, *evaluations):
        task.check(base, processor, encoded.examples, encoded.split.name)
    if config.tuning is None and processor is not None:
        reader = sight.Reader.of(base, processor, config.max_length)
        seen = lambda: sight.few(task, models.label(config.model, task), [train_rows, *evaluations], reader)  # noqa: E731
        together.on_first(lambda: write_whole(folder / DATA, json.dumps(asdict(seen()), ensure_ascii=False) + "\n"))
    return Parts(
        config=config,
        task=task,
        train=train,
        examples=examples,
        evaluations=evaluations,
        method=method,
        model=model,
        processor=processor,
        head=head,
        head_parameters=head_parameters,
        budget=method.budget(model),
        plan=_plan(config, len(examples), any(p.requires_grad for p in model.parameters())),
        rows=rows,
        before=before,
        base=digest,
    )


def _plan(config: RunConfig, rows: int, trains: bool) -> Plan:
    per_epoch = math.ceil(rows / config.batch_size)
    steps = (config.max_steps or math.ceil(config.epochs * per_epoch)) if trains else 0
    return Plan(
        rows=rows,
        batch_size=config.batch_size,
        steps=steps,
        eval_every=per_epoch if config.eval_every is None else config.eval_every or steps,
        checkpoint_every=config.checkpoint_every or per_epoch,
    )


def _start(folder: Path) -> tuple[Path | None, Carried]:
    """The checkpoint to resume from, None for a fresh start, and what it carries."""
    newest = last_complete(folder)
    try:
        return (newest[0], Carried(**newest[1])) if newest else (None, Carried())
    except TypeError:
        raise InputError(f"{newest[0] if newest else folder} was not written by a run: delete it") from None


def _train(folder: Path, parts: Parts, checkpoint: Path | None, progress: Progress, stop: Stop) -> Search | None:
    """Carry out the remaining steps; returns the result of the search for ranks, None if the method learns none."""
    with together.by_itself():
        args = arguments(folder, parts.config, parts.plan)
    with computing(parts.config):  # it asks the model what it does with padding
        collate = parts.task.collate(parts.model, parts.processor, parts.config.seed)
    joined = parts.config.attention == "flash_attention_2"
    packing = Packing(parts.config.max_length, joined) if parts.config.packing else None
    trainer = RunTrainer(
        micro_batch=parts.rows,
        packing=packing,
        stop=stop,
        method=parts.method,
        model=parts.model,
        args=args,
        train_dataset=parts.examples,
        data_collator=collate,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    if packing is not None:
        with computing(parts.config):
            packing.check(parts.model, [*itertools.chain(*parts.examples[:100]["input_ids"])], parts.rows)
    if parts.config.activation_memory == "lean":
        with computing(parts.config):
            trainer.keep_less(parts.task)
    if parts.task.family == "segmentation" and parts.rows < parts.config.batch_size and is_main():
        print(
            f"Dice loss and batch norms are computed over {parts.rows} images at a time, not {parts.config.batch_size}",
            file=sys.stderr,
        )
    if parts.config.compile:
        # One program for rows of all lengths, whichever came first; but another one after each rank change.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = sys.maxsize
        parts.model.compile(dynamic=True)
    with stop.patient():
        try:
            with disk_errors(folder):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (pickle.UnpicklingError, SafetensorError) as error:
            if checkpoint is None or (progress.loaded and isinstance(error, SafetensorError)):  # when writing
                raise
            raise InputError(
                f"{checkpoint} cannot be loaded, since it was not written by a run ({_first_line(error)[:200]}): "
                "delete it, and the same command resumes from the checkpoint before it"
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            raise InputError(
                f"compile: {type(parts.model).__name__} cannot be compiled ({_first_line(error)})"
            ) from error
        except NotFiniteError as error:  # gates or ω; `Parts.evaluate` catches those of evaluations
            raise DivergedError(str(error)) from error
        except RuntimeError as error:  # when the Trainer exchanges losses between processes
            if together.lost(error):
                raise LostError("another process of this run has ended") from error
            raise
    if trainer.state.global_step < parts.plan.steps:
        if is_main():
            step = trainer.state.global_step
            print(f"stopped after step {step}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(stop.code)
    return unwrapped(trainer.optimizer).search() if parts.method.check_every else None


def _environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "rankwise": rankwise.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
        "threads": torch.get_num_threads(),
        "processes": together.count(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
