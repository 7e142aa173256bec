"""Rows that share a sequence: all are there, none is cut, and each is read as if it were alone."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import launched
import models
from asserts import refused
from rankwise.errors import InputError
from rankwise.results.rows import summarise
from rankwise.runs.store import Store
from rankwise.sweep.check import Checked
from rankwise.tasks.generation import IGNORE
from rankwise.train.checkpoint_files import last_complete
from rankwise.train.packing import Packing, best_fit
from rankwise.train.run import run
from rankwise.train.trainer import RunTrainer, items
from runs import SIMPLEX, lines, make
from waiting import PATIENCE, reached, wait_for

TOKENS = range(10, 50)
LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=12)
SMALL = settings(max_examples=5)


def batch(lengths: list[int]) -> dict[str, Tensor]:
    """Rows of these lengths, padded on the right; the last token has a label, and about half of the others."""
    draw = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(2, models.VOCABULARY, (length,), generator=draw) for length in lengths]
    labels = [torch.where(torch.rand(len(row), generator=draw) < 0.5, row, IGNORE) for row in rows]
    for row, own in zip(rows, labels, strict=True):
        own[-1] = row[-1]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def family(kind: str, attention: str) -> nn.Module:
    [(_, model)] = models.every_model(AutoModelForCausalLM, [kind], attn_implementation=attention)
    return model


def learnt(model: nn.Module, batches: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """The loss per token and its gradients, summed over the batches."""
    model.zero_grad()
    counts = [int((each["labels"][:, 1:] != IGNORE).sum()) for each in batches]
    losses = [model(**each).loss * count / sum(counts) for each, count in zip(batches, counts, strict=True)]
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@given(LENGTHS, st.integers(1, 40))
def test_each_row_is_in_one_pack_which_is_not_too_long_and_could_not_join_another(
    lengths: list[int], most: int
) -> None:
    packs = best_fit(lengths, most)
    assert sorted(row for pack in packs for row in pack) == [*range(len(lengths))]
    sizes = [sum(lengths[row] for row in pack) for pack in packs]
    assert all(size <= most or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    assert all(one + other > most for place, one in enumerate(sizes) for other in sizes[:place])


@given(LENGTHS, st.integers(4, 40), st.booleans())
def test_a_batch_of_packs_has_every_row_once_and_beside_them_only_padding(
    lengths: list[int], most: int, joined: bool
) -> None:
    single, packing = batch(lengths), Packing(most, joined)
    joint = packing.join(packing.packs(single))
    assert len(joint["input_ids"]) == 1 or not joined
    starts = (joint["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    parts = [part.tolist() for part in joint["input_ids"].flatten().tensor_split(starts[1:])]
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(single["input_ids"], single["attention_mask"], strict=True)]
    assert sorted(part for part in parts if part != [0]) == sorted(rows)  # no row has the token 0
    assert items(joint) == int((single["labels"][:, 1:] != IGNORE).sum())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma"])
def test_loss_and_gradients_are_those_of_rows_alone(kind: str, attention: str) -> None:
    """Up to the order of sums, in packs that are longer than what GPT-2 reads, too."""
    model = family(kind, attention)
    Packing(models.POSITIONS).check(model, TOKENS)

    @SMALL
    @given(LENGTHS, st.integers(12, 60), st.integers(1, 3), st.booleans())
    def same(lengths: list[int], most: int, at_once: int, joined: bool) -> None:
        single, packing = batch(lengths), Packing(most, joined)
        packs = packing.packs(single)
        pieces = [packing.join(packs[start : start + at_once]) for start in range(0, len(packs), at_once)]
        expected, gradients = learnt(model, [single])
        loss, found = learnt(model, pieces)
        assert loss == pytest.approx(expected, rel=1e-5) and gradients.keys() == found.keys()
        most_of_all = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * most_of_all), name

    same()


@pytest.mark.parametrize(
    ("kind", "more", "right"),
    [
        ("mistral", {"sliding_window": 5}, True),
        ("gemma3_text", {"sliding_window": 5}, True),
        ("llama4_text", {"attention_chunk_size": 8}, True),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, False),
        ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}, False),
        ("jamba", {"attn_layer_offset": 1, "attn_layer_period": 2}, False),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
    ],
)
def test_windows_are_packed_and_states_that_are_carried_on_are_refused(
    kind: str, more: dict[str, Any], right: bool
) -> None:
    """Other trainers have packed rows of models with linear attention, whose state went from row to row unseen."""
    [(_, model)] = models.every_model(AutoModelForCausalLM, [kind], **more)
    if right:
        Packing(24).check(model, TOKENS)
    else:
        assert "does not keep rows apart" in refused(lambda: Packing(24).check(model, TOKENS))


@pytest.mark.large
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_family_is_right_or_refused(attention: str) -> None:
    right, single, packing = [], batch([7, 11, 5, 12, 3]), Packing(24)
    for kind, model in models.every_model(AutoModelForCausalLM, models.WRITERS, attn_implementation=attention):
        try:
            packing.check(model, TOKENS)
        except InputError as error:
            assert str(error).startswith("packing: ") and "\n" not in str(error)
            continue
        right.append(kind)
        expected, _ = learnt(model, [single])
        loss, _ = learnt(model, [packing.join(packing.packs(single))])
        assert loss == pytest.approx(expected, rel=1e-4), kind
    assert {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "olmo2", "gpt2", "gpt_neox"} <= {*right}


class Masked(nn.Module):
    """A model that is given a mask of ones with packed rows, which tells transformers that the rows are one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        return self.model(input_ids, attention_mask=torch.ones_like(input_ids), **more)


class Cached(Masked):
    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        return self.model(input_ids, **{**more, "use_cache": True})


class Lost(Masked):
    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        output = self.model(input_ids, **more)
        output.logits[:, -1] = torch.nan
        return output


class Counting(Masked):
    """It knows only how long a sequence is."""

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Masked, "packing: Masked does not keep rows apart"),
        (Cached, "packing: Cached does not keep rows apart"),
        (Lost, "packing: Lost does not keep rows apart"),
        (Counting, "packing: Counting cannot read packed rows (.*unexpected keyword argument"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_kept_apart_is_found(kind: type[nn.Module], message: str, dtype: torch.dtype) -> None:
    [(_, model)] = models.every_model(AutoModelForCausalLM, ["llama"])
    Packing(24).check(model.to(dtype), TOKENS)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        Packing(24).check(kind(model), TOKENS)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rows of a prompt and an answer of 2 to 20 words."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("data")
    for name, count in (("train", 40), ("validation", 6)):
        answers = [" ".join(draw.choices(["ash", "oak", "elm"], k=draw.randint(2, 20))) for _ in range(count)]
        rows = [{"text": f"tree {place}", "target": answer} for place, answer in enumerate(answers)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "causal", "dataset": str(folder), "target_length": 24, "beams": 1}


def prepared(folder: Path, task: dict[str, Any], **more: Any) -> Path:
    usual = {"model": "random-llama", "max_length": 64, "batch_size": 16, "method": SIMPLEX, "max_steps": 10}
    return make(folder, task=task, train_rows=40, eval_rows=6, **{**usual, **more})


def assert_alike(folder: Path, other: Path) -> None:
    """Two runs have the same losses, up to the order of sums, and the same ranks."""
    for name in ("metrics.jsonl", "ranks.jsonl"):
        for one, two in zip(lines(folder / name), lines(other / name), strict=True):
            assert (one["step"], one.get("ranks")) == (two["step"], two.get("ranks"))
            assert one.get("loss", 0.0) == pytest.approx(two.get("loss", 0.0), rel=1e-3)


@pytest.mark.large
def test_a_packed_run_comes_to_what_it_comes_to_unpacked(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many steps, epochs, rows in a step, and the same ranks."""
    seen: list[torch.Size] = []
    pieces = RunTrainer._pieces

    def noted(*args: Any) -> Any:
        found = pieces(*args)
        seen.extend(piece.batch["input_ids"].shape for piece in found)
        return found

    monkeypatch.setattr(RunTrainer, "_pieces", noted)
    plain, packed = prepared(tmp_path / "plain", task), prepared(tmp_path / "packed", task, packing=True, micro_batch=2)
    run(plain)
    rows, seen[:] = len(seen), []
    run(packed)
    assert_alike(packed, plain)
    assert len(seen) > rows and all(len(shape) == 2 and shape[0] <= 2 and shape[1] <= 64 for shape in seen)
    assert any(shape[1] > 50 for shape in seen)
    settings = {row.setting for each in (plain, packed) for row in summarise(Store(tmp_path).results([each]))}
    assert len(settings) == 1  # they may be compared


@pytest.mark.large
@pytest.mark.parametrize(
    "more",
    [
        {"dtype": "bf16"},
        {"autocast": "bf16"},
        {"quantise": "4bit"},
        {"quantise": "8bit"},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_packing_with_the_settings_that_save_memory(more: dict[str, Any], task: dict[str, Any], tmp_path: Path) -> None:
    if "quantise" in more:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[dev]'")
    tokenizer = models.tokenizer("ash", "oak", "elm", "tree", pad_token="</s>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    more = {"model": str(tmp_path / "base"), "max_steps": 4, "method": "lora", **more}
    found = []
    for packing in (False, True):
        folder = prepared(tmp_path / str(packing), task, packing=packing, **more)
        run(folder)
        found.append([line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line])
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.large
def test_a_packed_run_that_is_cut_goes_on_bit_for_bit(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (prepared(tmp_path / name, task, packing=True, micro_batch=1) for name in ("whole", "cut"))
    run(whole)
    step = RunTrainer.training_step

    class Cut(BaseException):
        pass

    def stop(trainer: RunTrainer, *args: Any, **more: Any) -> Any:
        if trainer.state.global_step == 5:
            raise Cut
        return step(trainer, *args, **more)

    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(RunTrainer, "training_step", stop)
        run(cut)
    run(cut)
    for name in ("metrics.jsonl", "ranks.jsonl", "adapter/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.large
def test_two_processes_pack_their_shares_and_one_goes_on_where_they_were_killed(
    task: dict[str, Any], tmp_path: Path
) -> None:
    alone, folder = (prepared(tmp_path / name, task, packing=True) for name in ("alone", "run"))
    launcher = launched.start(tmp_path / "log", "-m", "rankwise", "train", str(folder))
    wait_for(lambda: reached(folder, 5) or launcher.poll() is not None)
    os.kill(launched.workers(launcher, tmp_path / "log")[1], signal.SIGKILL)
    assert launcher.wait(PATIENCE) != 0
    assert last_complete(folder) is not None and not (folder / "result.json").exists()
    run(folder)
    run(alone)
    assert_alike(folder, alone)


@pytest.mark.large
def test_memory_that_runs_out_halves_the_packs(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said of packs, and what is learnt stays as it is."""
    folder, whole = (prepared(tmp_path / name, task, packing=True, micro_batch=4) for name in ("run", "whole"))
    step = RunTrainer.training_step

    def short(trainer: RunTrainer, model: nn.Module, inputs: Any, *more: Any) -> Any:
        if any(len(piece.batch["input_ids"]) > 2 for piece in inputs):
            raise torch.OutOfMemoryError("no memory")
        return step(trainer, model, inputs, *more)

    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "training_step", short)
        run(folder)
    assert (
        "out of memory with 4 packs at once; going on from the last checkpoint with 2 at once; a step still has 16"
        in (capsys.readouterr().err)
    )
    [row] = summarise(Store(tmp_path).results([folder]))
    assert "ran out of memory and took 2 packs at once, 16 rows a step" in " ".join(row.remarks)
    run(whole)
    assert_alike(folder, whole)


@pytest.mark.large
@pytest.mark.skipif("RANKWISE_DATA" not in os.environ, reason="needs the rows of E2E")
def test_the_benchmark_of_the_documents_runs() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "packing.py"
    options = ["--model", "random-llama", "--rows", "16", "--at-once", "2", "--max-length", "512", "--times", "1"]
    done = subprocess.run([sys.executable, script, "e2e", *options], capture_output=True, text=True, check=True)
    unpacked, packed, ratio = done.stdout.splitlines()
    passes = [int(line.split()[1]) for line in (unpacked, packed)]
    assert passes[0] > passes[1] and re.fullmatch(r"packed is \d+\.\d\d times as fast", ratio)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "stdlib-kind"}, "packing: only a decoder that writes text"),
        ({"model": "random-t5"}, "packing: only a decoder that writes text"),
        ({"method": {"name": "pre-embed", "prefix": 2, "infix": 0}}, "packing: pre-embed puts virtual tokens"),
        ({"trainer": {"neftune_noise_alpha": 5.0}}, "trainer.neftune_noise_alpha: its noise is scaled by the length"),
        ({"packing": "yes"}, "packing = 'yes': expected boolean"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_a_run_begins(
    given: dict[str, Any], message: str, task: dict[str, Any]
) -> None:
    said = refused(lambda: Checked.of({"task": task, "model": "random-llama", "packing": True, **given}, []))
    assert message in said


def test_a_run_of_a_model_that_reads_on_is_refused_before_its_first_step(task: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "mamba"
    tokenizer = models.tokenizer(*{*["ash", "oak", "elm", "tree"]}, pad_token="</s>")
    config = models.small_config("mamba")
    config.vocab_size = len(tokenizer)
    transformers.MambaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    method = {"name": "lora", "rank": 2, "targets": ["in_proj"]}
    folder = prepared(tmp_path / "run", task, model=str(base), method=method, packing=True)
    said = refused(lambda: run(folder))
    assert said.startswith("packing: MambaForCausalLM does not keep rows apart")
    assert not (folder / "metrics.jsonl").exists()
