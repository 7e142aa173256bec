"""Two processes on this machine, as `accelerate launch` starts them, and what they need to come to where one does."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
import warm
from runs import lines
from waiting import writers


def launcher(*how: str) -> list[str]:
    """The command that starts two processes, which share no port with other tests."""
    processes = ("--num_processes", "2", "--main_process_port", "0")
    return [sys.executable, "-m", "accelerate.commands.launch", *(how or ("--multi_gpu",)), *processes]


def start(
    log: Path, *command: str, how: Sequence[str] = (), out: int | None = None, fresh: bool = False
) -> subprocess.Popen[bytes]:
    """The launcher of two processes that carry out `command`, forked unless `fresh`; what they print goes to `log`."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("ab") as file:
        return (subprocess.Popen if fresh else warm.Popen)(
            [*launcher(*how), *command],
            stdout=out or file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )


def workers(launcher: subprocess.Popen[bytes], log: Path) -> list[int]:
    """The processes that the launcher has started, which print to its log as it does."""
    return sorted({*writers(log)} - {launcher.pid})


def bert(folder: Path) -> str:
    """A small BERT without dropout, whose random masks would differ between two processes and one."""
    return runs.bert(folder, dropout=0.0)


def assert_equal(folder: Path, other: Path) -> None:
    """Two runs came to the same, up to the order of sums."""
    found = [json.loads((each / "result.json").read_text()) for each in (folder, other)]
    for result in found:
        del result["cost"]
    moved = [(result.get("search") or {}).pop("moved", None) for result in found]
    assert moved[0] == (None if moved[1] is None else pytest.approx(moved[1], rel=1e-5))  # measured: up to 2e-6
    assert found[0] == found[1]
    for name in ("metrics.jsonl", "ranks.jsonl"):
        for one, two in zip(lines(folder / name), lines(other / name), strict=True):
            assert (one["step"], one.get("ranks")) == (two["step"], two.get("ranks"))
            assert one.get("loss", 0.0) == pytest.approx(two.get("loss", 0.0), rel=1e-3)
    ours, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=5e-3, rtol=1e-2, msg=name)
