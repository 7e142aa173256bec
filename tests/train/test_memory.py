"""Runs that are short of memory: they take fewer rows at once, and learn the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import launched
import rankwise as rw
import short_of_memory
import warm
from launched import assert_equal
from rankwise.processes.stop import Stop
from rankwise.processes.together import out_of_memory
from rankwise.results.rows import summarise
from rankwise.runs.store import MEMORY, Store
from rankwise.train.run import run
from rankwise.train.trainer import RunTrainer
from runs import SIMPLEX, make
from waiting import PATIENCE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return launched.bert(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def alone(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("runs") / "alone", model=base, method=SIMPLEX, train_rows=70)
    run(folder)
    return folder


def hungry(folder: Path, gib: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, short_of_memory.__file__, str(folder), str(gib)]
    return warm.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_a_run_that_runs_out_of_memory_takes_half_as_many_rows_at_once(alone: Path, base: str, tmp_path: Path) -> None:
    """16 rows and then 8 take more than there is; an epoch's last step has 6."""
    folder = make(tmp_path / "run", model=base, method=SIMPLEX, train_rows=70)
    ended = hungry(folder, 2)
    assert ended.returncode == 0, ended.stderr
    told = [line for line in ended.stderr.splitlines() if line.startswith("out of memory")]
    assert told == [
        "out of memory with 16 rows at once; going on from the last checkpoint with 8 at once, 2 times per step; a "
        "step still has 16 rows",
        "out of memory with 8 rows at once; going on from the last checkpoint with 4 at once, 4 times per step; a "
        "step still has 16 rows",
    ]
    assert_equal(folder, alone)
    assert json.loads((folder / "result.json").read_text())["cost"]["micro_batch"] == 4
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    [whole], [row] = (summarise(Store(each.parent).results([each])) for each in (alone, folder))
    said = "seed 0 of simplex-lora rank=4 ran out of memory and took 4 rows at once, 16 a step"
    assert row.remarks == [*whole.remarks, said]


@pytest.mark.large
def test_in_two_processes_both_take_fewer_where_one_is_short(base: str, tmp_path: Path) -> None:
    """Of 15 rows one process has 7, which it could hold, and the other 8."""
    folder = make(tmp_path / "run", model=base, batch_size=15, max_steps=4)
    launcher = launched.start(tmp_path / "log", short_of_memory.__file__, str(folder), "2")
    log = tmp_path / "log"
    assert launcher.wait(PATIENCE) == 0, log.read_text()
    assert log.read_text().count("out of memory with 8 rows at once") == 1
    assert json.loads((folder / "result.json").read_text())["cost"]["micro_batch"] == 4


def test_where_one_row_is_too_much_the_run_fails_in_one_line(base: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", model=base, batch_size=2)
    ended = hungry(folder, 16)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("rankwise: OutOfMemory: out of memory even with one row at a time") and "max_length" in last
    assert "DefaultCPUAllocator" in (folder / "error.txt").read_text().splitlines()[0]


def test_of_two_processes_the_main_one_says_that_one_row_is_too_much(base: str, tmp_path: Path) -> None:
    folder, log = make(tmp_path / "run", model=base, batch_size=2), tmp_path / "log"
    launcher = launched.start(log, short_of_memory.__file__, str(folder), "16")
    assert launcher.wait(PATIENCE) != 0
    [told] = [line for line in log.read_text().splitlines() if line.startswith("rankwise: ")]
    assert told.startswith("rankwise: OutOfMemory: out of memory even with one row at a time")
    assert (folder / "error.txt").read_text().startswith("out of memory even with one row at a time")


def test_what_has_run_out_once_is_remembered(alone: Path, base: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", model=base, method=SIMPLEX, train_rows=70)
    (folder / MEMORY).write_text('{"rows": 5}')
    assert run(folder)["cost"]["micro_batch"] == 5
    assert_equal(folder, alone)


@pytest.mark.parametrize("text", ["", "{", '{"rows": "many"}', "[]"])
def test_a_broken_note_is_none(text: str, base: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", model=base, method={"name": "head"}, max_steps=1)
    (folder / MEMORY).write_text(text)
    assert "micro_batch" not in run(folder)["cost"]


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes do not fit")) and not out_of_memory(None)


def writer(kind: str) -> transformers.PreTrainedModel:
    """A small model that writes text."""
    torch.manual_seed(0)
    if kind == "t5":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        config = transformers.T5Config(vocab_size=64, pad_token_id=0, decoder_start_token_id=0, **shape)
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def sentences(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch in which every row has another number of tokens that count."""
    batch = {name: torch.stack([torch.tensor(row[name]) for row in rows]) for name in ("input_ids", "labels")}
    return {**batch, "decoder_input_ids": batch["input_ids"]} if rows[0]["two"] else batch


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = [p.grad.clone() for p in kwargs["model"].parameters() if p.grad is not None]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss = kwargs["logs"].get("loss", getattr(self, "loss", None))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_each_token_weighs_the_same_in_pieces_and_in_one(kind: str, smoothing: float, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 64, (7, 10), generator=draw).tolist()
    rows = [
        {"input_ids": row, "labels": [-100] * (9 - n) + row[9 - n :], "two": kind == "t5"} for n, row in enumerate(ids)
    ]
    seen = []
    for size in (7, 3):
        method = rw.LoRA(rank=2)
        args = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=7, seed=3, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, max_grad_norm=0.0, remove_unused_columns=False, logging_steps=1,
            dataloader_pin_memory=False, label_smoothing_factor=smoothing,
        )  # fmt: skip
        torch.manual_seed(1)
        gradients = Gradients()
        model = method.attach(writer(kind).double()).double()
        RunTrainer(
            micro_batch=size, stop=Stop(), method=method, model=model, args=args, train_dataset=rows,
            data_collator=sentences, callbacks=[gradients],
        ).train()  # fmt: skip
        seen.append(gradients)
    whole, pieces = seen
    assert whole.loss == pytest.approx(pieces.loss, rel=1e-5)
    for one, many in zip(whole.found, pieces.found, strict=True):
        torch.testing.assert_close(one, many, atol=1e-8, rtol=1e-5)  # both compute norms in fp32
