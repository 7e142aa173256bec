"""Compiled training: the same within rounding, exact when it resumes, and refused where it cannot be."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import runs
import warm
from asserts import refused
from launched import assert_equal
from rankwise.settings import RunConfig
from rankwise.sweep.check import Checked
from runs import lines, make, start
from waiting import PATIENCE, reached, wait_for

# Two of the three sites are removed after step 4.
SEARCH = {"name": "weight-lora", "rank": 2, "keep": 1, "start": 2, "every": 4, "targets": ["query", "output.dense"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One layer, so that compiling does not take minutes, without dropout."""
    folder = runs.bert(tmp_path_factory.mktemp("base") / "bert", dropout=0.0)
    config = transformers.BertConfig.from_pretrained(folder, num_hidden_layers=1)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.large
@pytest.mark.timeout(1800)
def test_a_search_that_is_compiled_learns_the_same_and_resumes_exactly(base: str, tmp_path: Path) -> None:
    """The cut is after the rank change, so what resumes has compiled fewer programs."""
    settings: dict[str, Any] = {"model": base, "method": SEARCH, "max_steps": 10, "eval_every": 5}
    eager, alone, folder = (make(tmp_path / name, compile=name != "eager", **settings) for name in ("eager", "a", "b"))
    assert start(eager).wait(PATIENCE) == 0
    assert start(alone).wait(1500) == 0, (alone / "log.txt").read_text()
    assert_equal(alone, eager)
    process = start(folder)
    wait_for(lambda: reached(folder, 6) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert start(folder).wait(1500) == 0, (folder / "log.txt").read_text()
    for name in ("metrics.jsonl", "ranks.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
    ranks = [line["ranks"] for line in lines(alone / "ranks.jsonl")]
    assert ranks[0] != ranks[-1]
    assert lines(alone / "metrics.jsonl") != lines(eager / "metrics.jsonl")  # else nothing was compiled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": True, "quantise": "4bit"}, "compile: not for quantised weights; leave out compile or quantise"),
        ({"compile": "yes"}, "compile = 'yes': expected boolean"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    said = refused(lambda: Checked.of({"task": "stdlib-kind", **settings}, []))
    assert re.search(message, said), said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no C++ compiler")
def test_without_a_compiler_one_line_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rankwise", "train", "task=stdlib-kind", "compile=true", "--dry-run"]
    environment = {**{key: value for key, value in os.environ.items() if key != "CXX"}, "PATH": str(tmp_path)}
    done = warm.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "rankwise: compile: there is no C++ compiler: install g++, or leave it out\n"


def test_the_setting_is_in_the_id() -> None:
    task = {"name": "stdlib-kind"}
    assert RunConfig(task=task).id == RunConfig(task=task, compile=False).id != RunConfig(task=task, compile=True).id
