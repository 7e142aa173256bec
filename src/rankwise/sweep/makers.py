"""What would make runs now, their code and their data, next to what made those that are there."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rankwise import tasks
from rankwise.errors import InputError
from rankwise.named import load_plugin
from rankwise.runs.maker import Maker, in_words
from rankwise.runs.store import Store
from rankwise.settings import RunConfig
from rankwise.train.run import code_for


def _data(config: RunConfig) -> tuple[str, bool]:
    """What the data of a run depend on: the task, and whether rows to choose a rate by are read."""
    return json.dumps(config.task, sort_keys=True), config.tuning is not None


def _revisions(configs: Sequence[RunConfig]) -> dict[tuple[str, bool], str]:
    """The revisions of the data of `configs`, by `_data`; each task is read once.

    Raises InputError if there are too few rows to train on and to choose a rate by.
    """
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(_data(config)[0], []).append(config)
    found = {}
    for name, group in groups.items():
        task = tasks.build(group[0].task)
        splits = [task.train(), *task.evaluation()]
        for rows, part in {(each.train_rows, each.tuning) for each in group}:
            if part is not None:
                task.tuning(splits[0], part, rows)
        for tuning in {each.tuning is not None for each in group}:
            found[name, tuning] = task.revision(splits, tuning=tuning)
    return found


def makers(store: Store, configs: Sequence[RunConfig]) -> Callable[[RunConfig], Maker]:
    """What would make each of `configs` now, or another run of their tasks. Raises InputError as `_revisions` does."""
    for file in {file: None for config in configs for file in config.plugins}:
        load_plugin(file)
    revisions = _revisions(configs)
    known = {config.id: config for config in configs}

    def maker(config: RunConfig) -> Maker:
        before = ""
        if config.after is not None:
            first = known.get(config.after)
            before = maker(first).name if first else store.named(config.after)
        return Maker.now(revisions[_data(config)], code_for(config), before)

    return maker


def settle(store: Store, wanted: Mapping[Path, Maker], reuse: bool, repeat: bool) -> None:
    """Refuse runs that were started by other makers than `wanted`, unless the user says what to do with them."""
    if reuse and repeat:
        raise InputError("--reuse and --repeat: choose one")
    others = store.others(wanted)
    if others and not (reuse or repeat):
        raise InputError(f"{made_by_others(store, others)}; --reuse keeps them, --repeat carries them out again")
    for folder in others:
        if repeat:
            store.clear(folder)
        elif store.result(folder) is None:
            store.take_over(folder, wanted[folder])


def settle_begun(store: Store, folders: Sequence[Path], reuse: bool, repeat: bool) -> None:
    """`settle` for those of the runs in `folders` that have been started."""
    begun = {folder: store.config(folder) for folder in folders if store.begun(folder) and store.maker(folder)}
    maker = makers(store, list(begun.values()))
    settle(store, {folder: maker(config) for folder, config in begun.items()}, reuse, repeat)


def made_by_others(store: Store, others: Mapping[Path, list[str]]) -> str:
    """How many runs were made with other code or data, and what differs."""
    done = sum(store.result(folder) is not None for folder in others)
    counts = [f"{count} {what}" for count, what in ((done, "finished"), (len(others) - done, "unfinished")) if count]
    runs = "run was" if len(others) == 1 else "runs were"
    return f"{' and '.join(counts)} {runs} made with {in_words(each for found in others.values() for each in found)}"
