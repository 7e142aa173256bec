"""An adapter, the folder of a run or a model, loaded and ready to answer."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from rankwise import adapters, tasks
from rankwise.adapters.beside import base_digest
from rankwise.errors import InputError
from rankwise.files import ADAPTER, TOKENIZER, read_json, similar
from rankwise.named import load_plugin
from rankwise.nets.new_weights import new_weights
from rankwise.runs import run_file, use
from rankwise.runs.answers import listed
from rankwise.runs.use import Use
from rankwise.settings import DECODER, RunConfig
from rankwise.settings.load import override
from rankwise.settings.run import named, put
from rankwise.sweep.check import load_run
from rankwise.tasks import Evaluation, Scored, Split, Task
from rankwise.tasks.chat import Conversations
from rankwise.tasks.custom import Custom, Labelled
from rankwise.train import model as models
from rankwise.train.arguments import Loading, computing
from rankwise.train.gguf import is_gguf

CONFIG, DESCRIPTION = ADAPTER[:2]
KINDS = ("adapter", "model")
"""Folders of a run of which one has what was learnt."""
AS_IN = "as in task=mrpc or task='{type: classification, columns: {text: body}}'"
"""How a task is given, for messages."""


@dataclass(frozen=True)
class Found:
    """What a user has named, before anything is loaded.

    Attributes:
        name: as it was given.
        folder: that of an adapter; None for a model.
        model: name or folder of a model; "" for an adapter.
        use: what must be known to use it; None if nothing says so.
        run: settings of its run; None without one.
    """

    name: str
    folder: Path | None
    model: str
    use: Use | None
    run: RunConfig | None

    @classmethod
    def of(cls, source: str | Path) -> "Found":
        """InputError for a folder that holds neither an adapter nor a model."""
        path = Path(source).expanduser()
        run = path if (path / run_file.NAME).is_file() else None
        if run is not None:
            path = next((run / name for name in KINDS if (run / name).is_dir()), run)
            if path == run:
                raise InputError(f"{source}: this run has no adapter yet; `rankwise train {source}` finishes it")
        elif path.name in KINDS and (path.parent / run_file.NAME).is_file():
            run = path.parent
        gguf = is_gguf(str(source))
        if gguf and str(source) != DECODER and not path.is_file():
            raise InputError(f"{source}: there is no such file{similar(path)}")
        if not gguf and path.exists() and not path.is_dir():
            raise InputError(f"{source}: is a file; give the folder of an adapter, of a run or of a model")
        if not gguf and not path.exists() and (len(path.parts) > 2 or str(source).startswith((".", "/", "~"))):
            raise InputError(f"{source}: there is no such folder{similar(path)}")
        adapter = any((path / name).is_file() for name in (CONFIG, DESCRIPTION))
        if path.is_dir() and not adapter and not (path / "config.json").is_file():
            raise InputError(f"{source}: holds neither an adapter ({CONFIG}) nor a model (config.json)")
        noted = use.read(path) if path.is_dir() else None
        config = None if run is None else run_file.load(run).config
        model = "" if adapter else str(path) if path.is_dir() else str(source)
        return cls(str(source), path if adapter else None, model, noted, config)

    def settings(self) -> dict[str, Any]:
        """What is known of the settings, as in a configuration file."""
        if self.use is not None:
            found = dict(self.use.settings)
        elif self.run is not None:
            found = self.run.model_dump(mode="json", include={*use.SETTINGS}, exclude_defaults=True)
        else:
            found = {"model": self._base() if self.folder else ""}
        if self.model:  # its own place counts, not that of what it was trained from
            found["model"] = self.model
        if self.run is not None:
            if self.use is not None and self.run.task["name"] == found["task"]["name"]:
                found["task"] = self.run.task  # which has the paths of its files
            found["plugins"] = self.run.plugins
        return found

    def _base(self) -> str:
        """The base model that PEFT's configuration names."""
        content = read_json(self.folder / CONFIG) if self.folder and (self.folder / CONFIG).is_file() else {}
        name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        if not isinstance(name, str) or not name:
            raise InputError(f"{self.name}: does not say what its base model is: give it, as in model=roberta-base")
        return name


@dataclass(frozen=True)
class Ready:
    """A loaded model with its task.

    Attributes:
        name: as the user has named it.
        config: its settings.
        task: with the classes that its outputs stand for.
        model: in evaluation mode, on the device.
        processor: its tokenizer; None for segmentation.
        folder: that of an adapter; None for a model.
    """

    name: str
    config: RunConfig
    task: Task
    model: nn.Module
    processor: Any
    folder: Path | None

    @classmethod
    def of(cls, source: str | Path, settings: Sequence[str] = (), dataset: str = "") -> "Ready":
        """Load what `source` names: an adapter, the folder of a run, or a model.

        Args:
            settings: `key=value`, which win over what is saved next to the adapter; `task=…` where nothing does.
            dataset: of a task with rows of the user's, where nothing says where they are.

        Raises:
            InputError: nothing says what the task is, the base weights are not those that the adapter was trained on, a
                model without a trained head, or anything that a run would refuse.
        """
        with redirect_stdout(sys.stderr):
            found = Found.of(source)
            return _loaded(found, *_settled(found, settings, dataset))

    @classmethod
    def by(cls, source: str | Path, config: RunConfig) -> "Ready":
        """The same with the settings of a run, whatever is saved next to the adapter."""
        with redirect_stdout(sys.stderr):
            return _loaded(Found.of(source), config)

    def encoded(self, split: Split) -> Evaluation:
        """A split, encoded for the model. InputError for rows that it cannot take."""
        evaluation = Evaluation(split, self.task.encode(split, self.processor, self.config.max_length))
        self.task.check(self.model, self.processor, evaluation.examples, split.name)
        return evaluation

    def score(self, evaluation: Evaluation, final: bool) -> Scored:
        """What the model answers to rows, and how it scores, as at the end of its run."""
        with computing(self.config):
            return self.task.evaluate(self.model, evaluation, self.processor, self.config.batch_size, final)


def config_of(source: str | Path, settings: Sequence[str], dataset: str = "") -> RunConfig:
    """The settings by which `Ready.of` would load it, with nothing loaded yet; arguments and errors as there."""
    return _settled(Found.of(source), settings, dataset)[0]


def trained_by(source: str | Path, settings: Sequence[str]) -> RunConfig:
    """The settings that a run was trained with, changed by `settings`. Raises InputError if there is no run."""
    found = Found.of(source)
    if found.run is None:
        raise InputError(f"{source}: nothing says how it was trained: give its run's folder, or --data CONFIG.yaml")
    # A budget has become a size of the method, and a scale the numbers of rows and steps.
    more = {"runs", "report_to", "budget", "tuned", "followed", "scale"}
    own = found.run.model_dump(mode="json", exclude=more, exclude_defaults=True)
    at_once = found.settings().get("batch_size", found.run.batch_size)  # as many as there was room for
    own |= {"batch_size": found.run.batch_size, "micro_batch": min(at_once, found.run.micro_batch or at_once)}
    return _settled(found, settings, "", own)[0]


def _settled(
    found: Found, settings: Sequence[str], dataset: str, own: Mapping[str, Any] | None = None
) -> tuple[RunConfig, bool]:
    """The settings, where `own` wins, and whether `dataset`, with rows to be answered, stands in for the task's own."""
    data = {**found.settings(), **(own or {})}
    for text in settings:
        put(data, *override(text))
    if "task" not in data:
        path = Path(found.name).expanduser()
        if not path.exists() and not is_gguf(found.name):
            raise InputError(
                f"{found.name}: there is no such folder{similar(path)}; if it is a model on the hub, give its task, "
                f"{AS_IN}"
            )
        raise InputError(f"{found.name}: nothing next to it says what its task is: give it, {AS_IN}")
    for file in data.get("plugins", ()):
        load_plugin(file)
    task = named("task", data["task"])
    kind = tasks.registry().get(str(task.get("name")))
    if kind is not None and issubclass(kind, Custom) and not task.get("dataset"):
        if not dataset:
            raise InputError(
                f"{found.name}: nothing next to it says where its rows are: give a file, --in FILE (shrink takes "
                "--data CONFIG.yaml)"
            )
        data["task"] = {**task, "dataset": dataset}
        return load_run(data, []), True
    return load_run(data, []), False


def _loaded(found: Found, config: RunConfig, stands_in: bool = False) -> Ready:
    task, loading, own = tasks.build(config.task), Loading.of(config), None
    if found.folder is not None and (found.folder / TOKENIZER[0]).is_file():
        own = str(found.folder)
        if isinstance(task, Conversations):
            task = replace(task, template="")  # the tokenizer has its text
    if found.use and (found.use.form in ("class", "value")) != (task.family == "classification"):
        raise InputError(f"{found.name}: was not trained to give answers of the kind of {task.name}: leave task out")
    labels = found.use.labels if found.use else ()
    if task.family == "classification":
        if not found.use and found.folder is None:
            labels = models.labels_of(config.model, task, loading.trust_remote_code)
        task = _of_classes(found, task, labels, stands_in)
    set_seed(config.seed)  # for models with random weights
    with models.quiet():
        model, processor, head = models.build(config.model, task, config.max_length, None, loading, own)
        if found.folder is None:
            if new := new_weights(model):
                raise InputError(
                    f"{found.name}: {new[0]} is not in its checkpoint, so that its answers would be random: give an "
                    "adapter, or a model that was trained for the task"
                )
        else:
            if found.use and found.use.base not in ("", base_digest(model, head)):
                raise InputError(
                    f"{found.name}: {models.label(config.model, task)} has other weights than the model that it was "
                    "trained on: give that one, as in model=FOLDER"
                )
            for part in head:
                model.get_submodule(part).float()  # as in training, whatever the dtype of the frozen weights
            model = adapters.load(model, found.folder)
    if config.quantise == "none" and torch.cuda.is_available():
        model = model.to("cuda")
    return Ready(found.name, config, task, model.eval(), processor, found.folder)


def _of_classes(found: Found, task: Task, labels: Sequence[str], stands_in: bool) -> Task:
    """`task` with the classes that the outputs stand for, which a task of the user's would read from training rows."""
    if not isinstance(task, Labelled) or (found.use and not labels):
        own = () if isinstance(task, Labelled) else task.labels
        if (found.use or labels) and own != tuple(labels):
            words = [listed([*names]) if names else "none" for names in (labels, own)]
            raise InputError(
                f"{found.name}: its classes are {words[0]}, those of {task.name} are {words[1]}: leave task out"
            )
        return task
    if not labels:
        if stands_in:
            raise InputError(
                f"{found.name}: nothing says which classes its outputs stand for: give its training rows, "
                "task.dataset=FILE"
            )
        return task
    task = copy(task)
    vars(task)["labels"] = tuple(labels)  # in the place of what the cached property would find
    return task
