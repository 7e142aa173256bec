"""Sweeps in processes of their own, and the stand-in workers that they start; see scripts/worker.py. All are forked."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import warm
from rankwise.runs.store import Store
from runs import REVISION, config

SUPPORT = Path(__file__).parent
SCRIPTS = SUPPORT.with_name("scripts")
WORKER = [sys.executable, str(SCRIPTS / "worker.py")]


def runs(store: Store, *kinds: int | None) -> list[Path]:
    """One run for each entry, which says what becomes of it; see scripts/worker.py."""
    return [store.create(config(seed=seed, max_steps=5, train_rows=kind), REVISION) for seed, kind in enumerate(kinds)]


def chain(store: Store, *kinds: int | None) -> list[Path]:
    """Runs of which each begins with the one before."""
    folders: list[Path] = []
    before = None
    for place, kind in enumerate(kinds):
        before = config(max_steps=5 + place, train_rows=kind, after=before and before.id)
        folders.append(store.create(before, REVISION))
    return folders


def slurm_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the commands of a stand-in for SLURM on the PATH, which keeps its jobs in `folder`."""
    commands = folder.with_name("bin")
    folder.mkdir()
    commands.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel", "srun"):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {SCRIPTS / "slurm_stand_in.py"} {name} "$@"\n')
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    return folder


def start(store: Store, runner: str = "local", *options: str) -> subprocess.Popen[str]:
    """A sweep over the runs of the store in a process of its own; see scripts/sweep.py."""
    return _start("sweep.py", str(store.folder), runner, *options)


def tuned(experiment: Mapping[str, Any], runner: str, *options: str) -> subprocess.Popen[str]:
    """A tuned experiment in a process of its own; see scripts/tuning.py."""
    return _start("tuning.py", json.dumps(experiment), runner, *options)


def _start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return warm.Popen(
        [sys.executable, str(SCRIPTS / program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started(folder: Path) -> list[int]:
    """Process ids of the workers that were started on a run, one after another."""
    path = folder / "started"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def check_told(store: Store, folders: Sequence[Path]) -> None:
    """Whether of four runs of the kinds None, 2, 3 and 4 the last three have failed and say why, each begun once."""
    errors = [store.standing(folder).error for folder in folders[1:]]
    assert errors[0] == "the loss is not finite"
    assert errors[1].startswith("the process was killed by signal 9, as the kernel does when memory runs out")
    assert errors[2] == "the process ended with exit code 1; the last line of its log: something broke"
    assert [len(started(folder)) for folder in folders] == [1] * 4
