"""How `shrink` trains a smaller adapter: a cut is trained on, or one of its size is trained from the start."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, set_seed

from rankwise import methods, tasks
from rankwise.adapters import save
from rankwise.adapters.cut import Limit, cut
from rankwise.adapters.stored import StoredAdapter, stored
from rankwise.commands.ready import Ready
from rankwise.errors import InputError
from rankwise.files import ADAPTER
from rankwise.methods.lora import LoRA
from rankwise.named import FARTHEST
from rankwise.processes.stop import Stop
from rankwise.runs.maker import Maker
from rankwise.runs.store import Store
from rankwise.settings import RunConfig, complete
from rankwise.sweep.check import schema
from rankwise.tasks import subset
from rankwise.train import model as models
from rankwise.train.arguments import arguments, computing
from rankwise.train.progress import DivergedError, Plan
from rankwise.train.run import code_for, run
from rankwise.train.trainer import RunTrainer

FASTER = 3.0
"""How many times the rate of a large adapter suits one of less than a unit of rank per layer: 1 to 10 in
docs/findings.md, of which this is about the geometric mean."""
CONFIG, _, WEIGHTS, CARD = ADAPTER[:4]


def heal(adapter: Path, config: RunConfig, stop: Stop) -> None:
    """Train an adapter on, as a run with these settings would, and write its numbers again.

    A warm-up given in steps was meant for a longer training; the default share of the steps is used instead.
    """
    if config.warmup > 1:
        config = config.model_copy(update={"warmup": RunConfig.model_fields["warmup"].default})
    ready = Ready.by(adapter, config)
    model: Any = ready.model
    task, method = ready.task, LoRA()
    model.set_adapter(model.active_adapter)  # which trains it and its head
    models.prepare(model, config)
    examples = task.encode(subset(task.train(), config.train_rows), ready.processor, config.max_length)
    steps = config.max_steps or 1
    plan = Plan(len(examples), config.batch_size, steps, eval_every=steps, checkpoint_every=steps)
    set_seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RunTrainer(
            micro_batch=min(config.batch_size, config.micro_batch or config.batch_size),
            stop=stop,
            method=method,
            model=model,
            args=arguments(Path(folder), config, plan),
            train_dataset=examples,
            data_collator=task.collate(model, ready.processor, config.seed),
        )
        trainer.remove_callback(PrinterCallback)
        if config.activation_memory == "lean":
            with computing(config):
                trainer.keep_less(task)
        trainer.train()
        healed = save(model, Path(folder) / "adapter", layout="compact")
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(healed / name, adapter / name)


def check_retrainable(adapter: StoredAdapter, config: RunConfig) -> None:
    """Raise InputError for an adapter with parts that `retrain` cannot train."""
    if config.after is not None:
        raise InputError(f"{adapter.path}: its run began with another run's weights: it can be cut, not retrained")
    for name, layer in adapter.layers.items():
        if layer.embedding or layer.fixed:
            what = "an embedding" if layer.embedding else layer.fixed
            raise InputError(f"{adapter.path}: {name} is no plain linear layer ({what}): it can be cut, not retrained")


def largest(adapter: StoredAdapter) -> int:
    """The highest rank of any layer, but none that is too high for another one."""
    return min(max(map(adapter.rank, adapter.names)), *map(adapter.limit, adapter.names))


def retraining(adapter: StoredAdapter, config: RunConfig, budget: int) -> RunConfig:
    """The settings of a run that trains an adapter within a budget from the start.

    Its rank is spread evenly over the layers of the given adapter, as in spaced-lora, at the scale of most of these,
    with the settings of `config`. It has FASTER times the rate if it has less than a unit of rank per layer and the
    method of `config` does not.
    """
    given, costs = methods.build(config.method), [adapter.cost(name) for name in adapter.names]
    rank, mean_rank = largest(adapter), budget / sum(costs)
    scale = Counter(adapter.layers[name].scale for name in adapter.names).most_common(1)[0][0]
    faster = FASTER if mean_rank < 1 <= getattr(given, "mean_rank", 1) else 1
    method = {
        "name": "spaced-lora",
        "rank": rank,
        "mean_rank": mean_rank,
        "alpha": scale * rank,
        "targets": [*adapter.names],
        "dropout": getattr(given, "dropout", 0.0),
    }
    changed = {
        "method": method,
        "learning_rate": min(config.learning_rate * faster, FARTHEST),
        "budget": None,
        "eval_every": 0,
        "report_to": [],
    }
    return complete(config.model_copy(update=changed), schema())


def retrain(adapter: StoredAdapter, config: RunConfig, budget: int, folder: Path) -> int:
    """Train an adapter by the settings of `retraining`, write it to `folder/adapter`, and return its parameters.

    The run is in `folder` too, and goes on there if it was stopped. Raises InputError where the layers that were
    trained are not those of the given adapter, and where the training diverges.
    """
    again = retraining(adapter, config, budget)
    place = Store(folder / "runs").create(again, Maker.now(tasks.build(again.task).revision(), code_for(again)))
    try:
        final = run(place)["parameters"]["final"]
    except DivergedError as error:
        times = f", {FASTER:g} times that of the run" if again.learning_rate != config.learning_rate else ""
        raise InputError(
            f"{budget:,} parameters at rate {again.learning_rate:g}{times}: {error}; give a smaller one, "
            f"as in learning_rate={config.learning_rate / 3:.2g}"
        ) from error
    made = stored(place / "adapter")  # with zeros, for programs that expect one rank
    if final > budget or not {*made.names} <= {*adapter.names}:
        raise InputError(
            f"{adapter.path}: names of its layers fit other layers of the model too: it can be cut, not retrained"
        )
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    parameters = cut(made, made, Limit(budget=budget), folder / "adapter").parameters
    shutil.copyfile(place / "adapter" / CARD, folder / "adapter" / CARD)  # its ranks are those of its training
    return parameters
