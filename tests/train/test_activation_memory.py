"""Runs with `activation_memory: lean` come to what they come to without it."""

from pathlib import Path
from typing import Any

import pytest

from asserts import refused
from rankwise.nets import chunked_loss, recomputed
from rankwise.settings.run import run_config
from rankwise.sweep.check import Checked
from rankwise.train.run import run
from runs import lines, make

SMALL: dict[str, Any] = {
    **{"task": {"name": "stdlib-signature"}, "model": "random-llama", "max_length": 64, "batch_size": 8},
    **{"train_rows": 24, "eval_rows": 4, "max_steps": 4, "method": {"name": "simplex-lora", "rank": 2}},
}


@pytest.mark.large
@pytest.mark.parametrize(
    "more",
    [
        {"packing": True, "micro_batch": 1},
        {"label_smoothing": 0.1, "micro_batch": 3},
        {"method": {"name": "full"}, "gradient_checkpointing": True},
        {"model": "random-t5", "task": {"name": "e2e"}, "label_smoothing": 0.1},
        {"autocast": "bf16", "fast": True},
    ],
    ids=str,
)
def test_a_lean_run_has_the_losses_of_a_plain_one(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[chunked_loss.Chunked] = []
    untried = chunked_loss.untried
    monkeypatch.setattr(chunked_loss, "untried", lambda model: made.append(untried(model)) or made[-1])
    folders = [make(tmp_path / how, **{**SMALL, **more}, activation_memory=how) for how in ("plain", "lean")]
    for folder in folders:
        run(folder)
    for one, other in zip(*(lines(folder / "metrics.jsonl") for folder in folders), strict=True):
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-3)
    assert made and made[-1].whole_logits == 0 and made[-1].losses > 4


@pytest.mark.parametrize(
    "more",
    [{"fast": False}, pytest.param({"micro_batch": 3, "gradient_checkpointing": True}, marks=pytest.mark.large)],
    ids=str,
)
def test_a_lean_run_of_a_classifier_is_the_plain_one(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: norms and activations that are computed again are the same numbers."""
    monkeypatch.setattr(recomputed, "SMALL", 0)
    again: list[Any] = []
    value = recomputed.Recipe.value
    monkeypatch.setattr(
        recomputed.Recipe, "value", lambda recipe, *args: again.append(recipe.func) or value(recipe, *args)
    )
    own = {"method": {"name": "simplex-lora", "rank": 2, "every": 2, "times": 2}, **more}
    folders = [make(tmp_path / how, **own, activation_memory=how) for how in ("plain", "lean")]
    for folder in folders:
        assert not again
        run(folder)
    assert again
    one, other = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert one == other


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"compile": True}, "activation_memory: a compiled step decides what it keeps; leave out compile or lean"),
        (
            {"dtype": "fp16"},
            "activation_memory: lean computes gradients before fp16 scales the loss up; use bf16, or leave it out",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(more: dict[str, Any], message: str) -> None:
    assert refused(lambda: run_config({**SMALL, **more, "activation_memory": "lean"})) == message


@pytest.mark.parametrize("task", ["stdlib-kind", "e2e"])
def test_a_torch_that_is_too_old_is_refused_before_anything_starts(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputed, "_hooks_of_others", None)
    config = {"task": task, "model": "random-bert" if task == "stdlib-kind" else "random-gpt2"}
    Checked.of(config, [])
    message = "activation_memory: lean needs torch 2.8 or newer"
    assert refused(lambda: Checked.of({**config, "activation_memory": "lean"}, [])) == message
