"""The memory that a run needs, counted before its model is loaded, is what a step then keeps."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import models
import rankwise as rw
import runs
import warm
from rankwise import tasks
from rankwise.nets import recomputed
from rankwise.settings import RunConfig
from rankwise.sweep.check import Checked, memory_note
from rankwise.train import memory_need
from rankwise.train.arguments import Loading
from rankwise.train.memory_need import GIB, _peak, available, kept_by_step, need, weight_bytes
from rankwise.train.model import _skeleton, attached_skeleton, build, quiet
from runs import make, start
from waiting import PATIENCE

LLAMA = {"task": "e2e", "model": "meta-llama/Llama-3.1-8B", "method": {"name": "lora", "rank": 8}}
WRITES, READS, BOTH = AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForSeq2SeqLM
FAMILIES = {
    **dict.fromkeys(("llama", "gpt2", "qwen2", "gemma2", "opt", "phi", "falcon", "bloom", "gpt_neox", "mpt"), WRITES),
    **dict.fromkeys(("bert", "roberta", "electra", "deberta-v2"), READS),
    **dict.fromkeys(("t5", "bart"), BOTH),
}


def adapted(kind: str, method: rw.methods.Method) -> nn.Module:
    config = models.small_config(kind, pad_token_id=0, decoder_start_token_id=0)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.attach(FAMILIES[kind].from_config(config))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param(kind, how, marks=[] if kind == ("bert", "llama")[place % 2] else [pytest.mark.large])
        for kind in FAMILIES
        for place, how in enumerate(("plain", "checkpointing", "bf16", "lean"))
    ],
)
def test_a_count_without_numbers_is_what_a_step_keeps(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputed, "SMALL", 0)
    config = RunConfig(
        task={"name": "e2e"},
        gradient_checkpointing=how in ("checkpointing", "bf16"),
        autocast="bf16" if how == "bf16" else None,
        activation_memory="lean" if how == "lean" else "plain",
    )
    family = "classification" if FAMILIES[kind] is READS else "generation"
    task = SimpleNamespace(family=family, labels=("yes", "no"), target_length=24)
    for method in (rw.LoRA(rank=2), rw.Full()):
        with torch.device("meta"):
            model = adapted(kind, method)
        counted = _peak(model, config, task, 4, 24)
        kept = kept_by_step(adapted(kind, method), config, task, 4, 24)
        # the masks of a decoder with cross-attention are simpler in a step without padding
        assert kept <= counted <= kept * (1.04 if FAMILIES[kind] is BOTH else 1.0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_so_it_is_on_codes_of_which_a_layer_is_dequantised_at_a_time(
    kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    """8-bit layers keep their inputs in spite of checkpointing."""
    pytest.importorskip("bitsandbytes")
    base, task = runs.bert(tmp_path / "bert", dropout=0.0), tasks.build("stdlib-kind")
    loading, one = Loading(quantise=kind), RunConfig(task={"name": "stdlib-kind"}, gradient_checkpointing=checkpointing)
    for method in (rw.LoRA(rank=2), rw.Head()):
        counted = _peak(attached_skeleton(base, task, method, 16, False, loading), one, task, 8, 60)
        model, _, head = build(base, task, 16, loading=loading)
        kept = kept_by_step(method.attach(model, head), one, task, 8, 60)
        assert abs(counted - kept) <= 4 * 4 * 32 * 64, (counted, kept)


@pytest.mark.large
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a stretch of time")
@pytest.mark.parametrize("how", [[], ["checkpointing"]], ids=str)
def test_the_count_is_by_what_a_process_grows(how: list[str]) -> None:
    command = [sys.executable, str(Path(__file__).parent.parent / "scripts" / "step_memory.py"), *how]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted, grown = json.loads(done.stdout)
    assert counted == pytest.approx(grown, rel=0.05)


@pytest.mark.parametrize("kind", ["none", "4bit", "8bit"])
def test_weights_are_counted_before_they_are_loaded(kind: str, tmp_path: Path) -> None:
    if kind != "none":
        pytest.importorskip("bitsandbytes")
    base, task = runs.bert(tmp_path / "bert"), tasks.build("stdlib-kind")
    skeleton, _ = _skeleton(base, task, False, Loading(quantise=kind))
    loaded, _, _ = build(base, task, 16, loading=Loading(quantise=kind))
    states = [part.state.SCB for part in loaded.modules() if hasattr(part, "state")]  # moved there by a first pass
    assert weight_bytes(skeleton) == weight_bytes(loaded) + sum(scales.nbytes for scales in states)


def large(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """As if the machine had so much memory, and everything were worth a note."""
    monkeypatch.setattr(memory_need, "SMALL_FILES", 0)
    monkeypatch.setattr(memory_need, "LARGE", 0)
    monkeypatch.setattr(memory_need, "available", lambda: (int(gib * GIB), "this machine"))


def config(**settings: Any) -> RunConfig:
    return RunConfig(task={"name": "stdlib-kind"}, **settings)


@pytest.mark.large
def test_each_setting_that_saves_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    large(monkeypatch, 1)

    def sizes(**settings: Any) -> tuple[int, int, int]:
        counted = need(config(**settings))
        assert counted is not None and counted.activations is not None
        return counted.weights, counted.activations, counted.optimizer

    weights, activations, optimizer = sizes()
    assert optimizer == 3 * 4 * sum(p.numel() for p in _trained())
    half = sizes(dtype="bf16")
    assert 0.5 <= half[0] / weights < 0.55 and 0.6 < half[1] / activations < 0.9  # what trains stays fp32
    assert sizes(gradient_checkpointing=True)[1] < 0.5 * activations
    assert sizes(micro_batch=16)[1] == pytest.approx(activations / 2, rel=0.01)
    assert sizes(max_length=64)[1] < 0.55 * activations
    whole = sizes(method={"name": "full"})
    assert whole[2] == pytest.approx(3 * whole[0], rel=1e-3)  # positions are no weights


def _trained() -> list[nn.Parameter]:
    model, _, head = build(None, tasks.build("stdlib-kind"), 16)
    return [p for p in rw.LoRA().attach(model, head).parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("gib", "message"),
    [
        (
            0.5,
            r"activations 1.\d \(32 rows of up to 128 tokens at once\); this machine has only 0.5 GiB: use quantise:",
        ),
        (2, r"^training needs about 1.\d GiB of memory: weights 0.1, gradients .*; this machine has 2.0 GiB$"),
    ],
)
def test_the_note_says_whether_it_fits_and_what_would(
    gib: float, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large(monkeypatch, gib)
    [line] = memory_note([config(seed=0), config(seed=1), config(batch_size=4)])
    assert re.search(message, line), line


def test_rows_are_as_long_as_the_task_and_packing_make_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    large(monkeypatch, 1)
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "into": "b"}\n' * 40)
    data = {"dataset": str(tmp_path / "rows.jsonl")}
    write = {"name": "causal", **data, "columns": {"text": "text", "target": "into"}, "target_length": 20}
    lengths = [
        counted.tokens
        for task, more in ((write, {}), (write, {"packing": True}), ({"name": "text", **data}, {}))
        if (counted := need(RunConfig(task=task, model="random-llama", max_length=32, **more))) is not None
    ]
    assert lengths == [32 + 1 + 20, 32, 32]


def test_the_model_as_it_comes_does_not_stand_for_runs_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    large(monkeypatch, 1)
    none, trains = (
        RunConfig(task={"name": "e2e"}, model="random-llama", method={"name": name}) for name in ("none", "lora")
    )
    assert memory_note([none]) == []
    assert memory_note([none, trains]) == memory_note([trains]) != []


def test_a_small_run_is_not_worth_a_note_nor_the_time() -> None:
    assert need(config()) is None
    assert memory_note([config(), config(method={"name": "full"})]) == []


@pytest.mark.large
def test_validate_says_that_a_large_model_will_not_fit_and_what_is_smaller_needs_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_need, "available", lambda: (24 * GIB, "this machine"))
    [line] = memory_note(Checked.of(LLAMA, []).runs)
    assert re.search(r"weights 30.0, .* this machine has only 24.0 GiB: use quantise: 4bit, dtype: bf16, ", line), line
    small = {**LLAMA, "dtype": "bf16", "quantise": "4bit", "gradient_checkpointing": True, "micro_batch": 4}
    [line] = memory_note(Checked.of(small, []).runs)
    assert re.search(r"^training needs about 7.\d GiB of memory: weights 5.4, .* this machine has 24.0 GiB$", line), (
        line
    )


def test_what_cannot_be_counted_is_said_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Experts are chosen by the numbers, which are not there."""
    large(monkeypatch, 1)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(models.small_config("mixtral"))
    monkeypatch.setattr(memory_need.models, "attached_skeleton", lambda *_: model)
    [line] = memory_note([config()])
    assert re.search(
        r"training needs more than 0.0 GiB .*and the activations of 32 rows of up to 128 tokens at once, which cannot "
        r"be counted \(\w+Error in MixtralForSequenceClassification\); this machine has 1.0 GiB",
        line,
    ), line


def test_a_limit_on_the_process_counts() -> None:
    code = """
import resource
from rankwise.train.memory_need import available
resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
print(*available())
"""
    done = warm.run([sys.executable, "-c", code], capture_output=True, text=True)
    size, where = done.stdout.split(maxsplit=1)
    assert int(size) == min(available()[0], 12 * GIB) and where == "this machine\n", done.stderr


@pytest.mark.large
def test_a_run_says_it_before_it_loads_the_model(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", model=None, batch_size=4096, max_length=128, micro_batch=2048, max_steps=1)
    start(folder).wait(PATIENCE)
    assert re.search(r"training needs about \d\d\.\d GiB .*2048 rows of up to 128", (folder / "log.txt").read_text())


@pytest.mark.large
def test_lean_activations_are_advised_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    large(monkeypatch, 0.001)

    def line(**settings: Any) -> str:
        [said] = memory_note([RunConfig(**{"task": {"name": "e2e"}, "model": "random-llama", **settings})])
        return said

    advice = "activation_memory: lean"
    assert advice in line()
    assert advice not in line(activation_memory="lean") and advice not in line(compile=True)
    assert advice not in line(autocast="fp16") and advice in line(task={"name": "stdlib-kind"}, model=None)
