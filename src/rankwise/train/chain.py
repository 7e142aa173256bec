"""In a chain of runs, the previous run and its weights."""

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
    """The previous run of a chain: its folder, and whether it has the same method.

    If it has, its weights are loaded after the method is attached; else they are those of the whole model, and are
    loaded into the base.
    """

    folder: Path
    same: bool
    weights: str
    """SHA-256 of its weights, from its result."""


def before(folder: Path) -> Before | None:
    """The previous run of the chain, None without one; InputError if it is not done."""
    store = Store(folder.parent)
    before = store.before(folder)
    if before is None:
        return None
    result = store.result(before)
    if result is None:
        raise InputError(f"the previous run of this chain is not done; first: rankwise train {before}")
    same = store.config(before).method["name"] == store.config(folder).method["name"]
    return Before(before, same, result.weights)


def load_weights(model: nn.Module, before: Before) -> None:
    """Load the weights of the previous run of a chain."""
    file = before.folder / WEIGHTS
    try:
        if file_digest(file) != before.weights:
            raise ValueError("its digest is not that in the result")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        raise InputError(f"{file} {what}; delete {before.folder} and run the whole chain again") from error
    try:
        unmatched = load_learnt(model, state)
    except RuntimeError as error:
        raise InputError(f"{file} does not fit this stage's model: {' '.join(str(error).split())[:300]}") from error
    if unmatched:
        raise InputError(
            f"only one of two stages of the chain has {unmatched}: all stages must train the same parts of the model, "
            "so give them the same targets and sizes"
        )


def keep_weights(folder: Path, model: nn.Module) -> None:
    """Write what was learnt, for the next run of the chain."""
    with unfinished(folder / WEIGHTS) as temporary, disk_errors(folder):
        torch.save(learnt_state(model), temporary)
        temporary.replace(folder / WEIGHTS)
