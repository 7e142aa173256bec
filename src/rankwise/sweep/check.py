"""The settings of a command, read, expanded into runs and checked: all that can be refused before a folder is made."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rankwise import methods, published, tasks
from rankwise.errors import InputError
from rankwise.methods import Method
from rankwise.named import check_reachable
from rankwise.runs import grid, run_file
from rankwise.settings import Experiment, RunConfig, Schema, complete, load
from rankwise.sweep.progress import counted
from rankwise.train import arguments, budget, memory_need, model

Source = str | Path | Mapping[str, Any]
"""A YAML file, or its content as a mapping."""


def schema() -> Schema:
    """All methods and tasks that there are."""
    return Schema(methods.registry(), tasks.registry())


def load_run(source: Source | None, settings: Sequence[str]) -> RunConfig:
    """The settings of one run. Raises InputError for an experiment, and for everything that is wrong with them."""
    config = load(source, settings, schema())
    if not isinstance(config, RunConfig):
        name = _named(source)
        raise InputError(f"{name}: has `vary:`, so it is an experiment: rankwise compare {name}")
    return config


def load_one(source: Source | None, settings: Sequence[str]) -> RunConfig:
    """The settings of one run: those of `load_run`, or of the folder of a run. Raises as `load_run` does."""
    if not isinstance(source, str | Path) or not Path(source).is_dir():
        return load_run(source, settings)
    if settings:
        raise InputError(f"{settings[0]}: the settings of a run are in its run.yaml and stay as they are")
    config = run_file.load(Path(source)).config.model_copy(update={"runs": str(Path(source).parent)})
    return complete(config, schema())


def load_experiment(source: Source, settings: Sequence[str]) -> Experiment:
    """An experiment. Raises InputError for the settings of one run, and for everything that is wrong with them."""
    config = load(source, settings, schema())
    if isinstance(config, RunConfig):
        name = _named(source)
        raise InputError(f"{name}: has no `vary:`, so it is one run: rankwise train {name}")
    check_tables(config)
    return config


def _named(source: Source | None) -> str:
    return str(source) if isinstance(source, str | Path) else "these settings"


def check_tables(experiment: Experiment) -> None:
    """Refuse the name of a table that no paper has, before hours of training."""
    for table in experiment.published.tables if experiment.published else ():
        published.find(table)


def check_models(configs: Sequence[RunConfig], shipped: bool) -> None:
    """Refuse what does not fit its model, a rank, a target or a prefix, before anything is written.

    `shipped` does not ask the hub for what `rankwise archs` lists: nothing is to be trained.
    """
    loading = [field.name for field in fields(arguments.Loading)]
    settings = ("model", "task", "max_length", "label_smoothing", "gradient_checkpointing", "packing", *loading)
    settings += ("activation_memory",)
    wanted: dict[str, dict[str, Method]] = {}
    method_of = {config.id: config.method["name"] for config in configs}
    for config in configs:
        arguments.check(config)
        if config.quantise != "none" and config.after in method_of and method_of[config.after] != config.method["name"]:
            raise InputError(
                f"quantise: a stage of a chain that starts from the weights of {method_of[config.after]} reads them as "
                "numbers; leave it out of that stage"
            )
        given = json.dumps({key: getattr(config, key) for key in settings}, sort_keys=True)
        option = json.dumps(config.method, sort_keys=True)
        if option not in (known := wanted.setdefault(given, {})):
            known[option] = methods.build(config.method)
    with redirect_stdout(sys.stderr):
        for given, known in sorted(wanted.items()):
            own = json.loads(given)
            task = tasks.build(own.pop("task"))
            how = arguments.Loading(**{name: own.pop(name) for name in loading})
            model.check(own.pop("model"), task, [*known.values()], shipped=shipped, loading=how, **own)


def memory_note(configs: Sequence[RunConfig]) -> list[str]:
    """A line about the memory that these runs need, if that is much; see `train.memory_need`."""
    with redirect_stdout(sys.stderr):
        line = memory_need.note(configs, shipped=True)
    return [line] if line else []


def fit(config: RunConfig) -> RunConfig:
    """`config` as its `run.yaml` has it: complete, at the size that its budget allows."""
    with redirect_stdout(sys.stderr):
        return budget.fit(complete(config, schema()))


def alone(config: RunConfig, tries: bool = False) -> RunConfig:
    """A run without an experiment around it, at the size that its budget allows; `tries` if it may try a rate."""
    if config.tuning is not None and not tries:
        raise InputError("tuning: only the runs of an experiment with `tune:` hold rows out; leave it out")
    fitted = fit(config)
    if fitted.budget != config.budget:
        raise InputError(f"budget: {config.method['name']} has no size to choose; leave it out")
    return fitted


def expand(experiment: Experiment) -> list[RunConfig]:
    """The runs of an experiment, at the sizes that their budgets allow."""
    configs = grid.expand(experiment, fit)
    for config in configs:
        check_reachable(methods.registry()[config.method["name"]], config.plugins)
        check_reachable(tasks.registry()[config.task["name"]], config.plugins)
    budgeted = experiment.base.get("budget") or "budget" in experiment.vary
    if budgeted and all(config.budget is None for config in configs):
        raise InputError("budget: none of the methods has a size to choose; leave it out")
    return configs


@dataclass(frozen=True)
class Checked:
    """Settings in which nothing is wrong, and the runs that they mean."""

    config: RunConfig | Experiment
    runs: Sequence[RunConfig]

    @classmethod
    def of(cls, source: Source, settings: Sequence[str]) -> "Checked":
        """Raises InputError for all that a run would refuse before it reads weights."""
        config = load(source, settings, schema())
        if isinstance(config, RunConfig):
            config = alone(config)
            runs = [config]
        else:
            check_tables(config)
            runs = expand(config)
        check_models(runs, shipped=True)
        return cls(config, runs)

    def __str__(self) -> str:
        if isinstance(self.config, RunConfig):
            return "one run"
        tuned = ", after those that choose their learning rates" if self.config.tune else ""
        return f"an experiment of {counted(len(self.runs))}{tuned}"
