"""The run that this one begins with, in a chain of runs, and what it has learnt."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rankwise.errors import InputError
from rankwise.files import disk_errors, unfinished
from rankwise.runs.store import WEIGHTS, Store
from rankwise.train.bare_loop import learnt_state, load_learnt
from rankwise.train.checkpoint_files import file_digest


@dataclass(frozen=True)
class Before:
    """The run that this one begins with: its folder, whether it was of the same method, and what it has learnt.

    If so its weights go into the model with the method attached, else, being those of the whole model, into the base.
    """

    folder: Path
    same: bool
    weights: str
    """SHA-256 of its weights, as it noted it at its end."""


def before(folder: Path) -> Before | None:
    """The run before this one in its chain, if there is one; InputError for one that is not done."""
    store = Store(folder.parent)
    before = store.before(folder)
    if before is None:
        return None
    result = store.result(before)
    if result is None:
        raise InputError(f"the run that this one begins with is not done; first: rankwise train {before}")
    same = store.config(before).method["name"] == store.config(folder).method["name"]
    return Before(before, same, result.weights)


def begin_with(model: nn.Module, before: Before) -> None:
    """Load what the run before this one in its chain has learnt."""
    file = before.folder / WEIGHTS
    try:
        if file_digest(file) != before.weights:
            raise ValueError("not what the run before has written")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else "is damaged"
        raise InputError(f"{file} {what}; delete {before.folder} and run the whole chain again") from error
    try:
        strange = load_learnt(model, state)
    except RuntimeError as error:
        raise InputError(f"{file} does not fit this stage's model: {' '.join(str(error).split())[:300]}") from error
    if strange:
        raise InputError(
            f"{strange} is on one side only: the stages of a chain have to train the same parts of the model, so "
            "targets and sizes must not differ"
        )


def keep_weights(folder: Path, model: nn.Module) -> None:
    with unfinished(folder / WEIGHTS) as made, disk_errors(folder):
        torch.save(learnt_state(model), made)
        made.replace(folder / WEIGHTS)
