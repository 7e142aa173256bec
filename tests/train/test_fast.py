"""A run with the fast layer learns what it learns without it."""

from pathlib import Path

import pytest
import torch

import runs
from rankwise.nets.lora_linear import LoraLinearFunction
from rankwise.settings import RunConfig
from rankwise.train.run import run
from runs import SIMPLEX, lines, make


@pytest.mark.large
def test_a_fast_run_learns_the_same_by_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    forward = LoraLinearFunction.forward

    def noted(*given: object) -> torch.Tensor:
        used.append(True)
        return forward(*given)

    monkeypatch.setattr(LoraLinearFunction, "forward", noted)
    base = runs.bert(tmp_path / "bert", dropout=0.0)
    slow, fast = (make(tmp_path / str(on), model=base, method=SIMPLEX, fast=on) for on in (False, True))
    run(slow)
    assert not used
    run(fast)
    assert used
    losses = [[line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line] for folder in (slow, fast)]
    assert losses[0] and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert lines(slow / "ranks.jsonl")[-1]["ranks"] == lines(fast / "ranks.jsonl")[-1]["ranks"]


def test_the_setting_is_in_the_id() -> None:
    task = {"name": "stdlib-kind"}
    assert RunConfig(task=task).id == RunConfig(task=task, fast=True).id != RunConfig(task=task, fast=False).id
