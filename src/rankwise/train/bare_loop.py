"""Checkpoints for a bare training loop; a Trainer writes its own."""

import os
from os import PathLike
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from rankwise.errors import InputError
from rankwise.files import check_regular, check_replaceable, disk_errors, replace_folder, unfinished
from rankwise.nets.new_weights import buffers
from rankwise.optim import SimplexAdam
from rankwise.optim.projected_adam import ProjectedAdam
from rankwise.ranks import sites

FILE = "checkpoint.pt"

Stepper = SimplexAdam | ProjectedAdam


def save_checkpoint(
    folder: str | PathLike[str], model: nn.Module, optimizer: Stepper, scheduler: LRScheduler | None = None
) -> Path:
    """Write all that an exact resume needs: what trains, frozen factors, optimizer, schedule, torch's random streams.

    Base weights are not included. The folder is replaced completely or not at all.

    Raises:
        InputError: the folder holds something other than a checkpoint, which would be lost.
    """
    folder = Path(folder)
    check_replaceable(folder, {FILE}, "a checkpoint")
    state = {
        "model": learnt_state(model),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "random": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder, folder=True) as temporary:
        with disk_errors(temporary), (temporary / FILE).open("wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        replace_folder(folder, temporary)
    return folder


def load_checkpoint(
    folder: str | PathLike[str], model: nn.Module, optimizer: Stepper, scheduler: LRScheduler | None = None
) -> int:
    """Restore model, optimizer, schedule and random streams from a folder that `save_checkpoint` wrote.

    First attach the method to a fresh base model and make its optimizer; the checkpoint sets the ranks.

    Returns:
        The steps taken so far.
    Raises:
        InputError: no checkpoint, one that cannot be read, or one of another method, head or model.
        RuntimeError: shapes that do not fit the model.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no checkpoint: it has no file {FILE}")
    try:
        state = torch.load(check_regular(path), map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} cannot be read and may be incomplete ({error}): use another checkpoint") from error
    if unmatched := load_learnt(model, state["model"]):
        raise InputError(
            f"{path} is of another method, head or model, since {unmatched} is in only one of checkpoint and model: "
            "attach the method that wrote it, with the same options"
        )
    optimizer.load_state_dict(state["optimizer"])
    if scheduler is not None and state["scheduler"] is not None:
        scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    return optimizer.steps


def learnt_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is learnt, and all buffers. Loading it (`strict=False`) sets ranks and scales too.

    The state of quantised weights, which belongs to the base, is excluded.
    """
    names = _learnt(model) | buffers(model).keys()
    return {name: value for name, value in model.state_dict().items() if name in names}


def load_learnt(model: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """Load a result of `learnt_state`; returns the name of a tensor that only one of state and model has, or ""."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    return min({*unexpected, *_learnt(model).intersection(missing)}, default="")


def _learnt(model: nn.Module) -> set[str]:
    """All names of the parameters that train and of an adapter's factors, which may be frozen (LoRA-FA's A)."""
    factors = {id(p) for site in sites(model) if site.present for p in (site.A, site.B)}
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if p.requires_grad or id(p) in factors}
