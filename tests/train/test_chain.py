"""Runs that begin with what another run has learnt."""

import json
from pathlib import Path

import pytest
import torch

from rankwise.errors import InputError
from rankwise.runs.store import Store
from rankwise.train.run import run
from runs import lines, make

HEAD = {"name": "head"}
SORA = {"name": "sora", "rank": 2, "gate_rate": 0.1, "sparsity": 1.0}


def test_a_run_begins_with_what_the_one_before_has_learnt(tmp_path: Path) -> None:
    settings = {"method": SORA, "max_steps": 4, "followed": True}
    first = make(tmp_path / "runs" / "first", **settings)
    run(first)
    kept = torch.load(first / "weights.pt", weights_only=True)
    gates = {name: value for name, value in kept.items() if name.endswith("gates")}
    assert gates and all((value < 1).all() for value in gates.values())
    digest = Store(tmp_path / "runs").config(first).id
    for name in ("second", "third"):
        second = make(tmp_path / "runs" / name, method={**SORA, "sparsity": 0.0}, after=digest, max_steps=4)
        run(second)
        assert not (second / "weights.pt").exists()
    again = [json.loads((tmp_path / "runs" / name / "result.json").read_text()) for name in ("second", "third")]
    assert again[0]["metrics"] == again[1]["metrics"]
    losses = [line["loss"] for line in lines(second / "metrics.jsonl") if "loss" in line]
    fresh = make(tmp_path / "runs" / "fresh", method={**SORA, "sparsity": 0.0}, max_steps=4)
    run(fresh)
    assert losses != [line["loss"] for line in lines(fresh / "metrics.jsonl") if "loss" in line]


def test_damaged_weights_of_the_run_before_are_named(tmp_path: Path) -> None:
    first = make(tmp_path / "runs" / "first", method=HEAD, max_steps=1, followed=True)
    run(first)
    kept = (first / "weights.pt").read_bytes()
    digest = Store(first.parent).config(first).id
    second = make(tmp_path / "runs" / "second", method=HEAD, max_steps=1, after=digest)
    middle = len(kept) // 2
    for damaged in (b"half", kept[:middle] + bytes([kept[middle] ^ 1]) + kept[middle + 1 :]):
        (first / "weights.pt").write_bytes(damaged)
        with pytest.raises(InputError, match="weights.pt is damaged; delete .*first and run the whole chain again$"):
            run(second)


def test_a_run_that_cannot_begin_says_what_to_do(tmp_path: Path) -> None:
    lora = {"name": "lora", "rank": 2, "targets": ["query"]}
    first = make(tmp_path / "runs" / "first", method=lora, max_steps=1, followed=True)
    digest = Store(first.parent).config(first).id
    second = make(tmp_path / "runs" / "second", method={**lora, "targets": ["value"]}, max_steps=1, after=digest)
    with pytest.raises(InputError, match="is not done; first: rankwise train .*first$"):
        run(second)
    run(first)
    with pytest.raises(
        InputError, match="only one of two stages of the chain has .*: all stages must train the same parts"
    ):
        run(second)
    (first / "weights.pt").unlink()
    with pytest.raises(InputError, match="weights.pt is missing; delete .*first and run the whole chain again"):
        run(second)
