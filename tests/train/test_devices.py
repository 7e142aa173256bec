"""Two processes that share a training: they end where one does. Real launches, on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import launched
import on_cpus
import rankwise as rw
import runs
import sharded_trainer
import side_by_side
import warm
from launched import assert_equal
from rankwise.adapters.stored import stored
from rankwise.errors import InputError
from rankwise.methods import registry
from rankwise.processes import together
from rankwise.train.checkpoint_files import cut_back
from rankwise.train.model import build
from rankwise.train.run import run
from runs import LORA, SIMPLEX, lines
from waiting import PATIENCE, alive, reached, wait_for, writers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return launched.bert(tmp_path_factory.mktemp("base") / "bert")


def make(folder: Path, base: str, **settings: Any) -> Path:
    """Batches of 15 rows do not split evenly; the last of an epoch is one row, of which one process has none."""
    given = {"model": base, "method": SIMPLEX, "batch_size": 15, "train_rows": 61, **settings}
    return runs.make(folder, **given)


@pytest.fixture(scope="module")
def alone(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("runs") / "alone", base)
    run(folder)
    return folder


@pytest.mark.large
def test_a_run_that_two_processes_share_ends_as_that_of_one(alone: Path, base: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", base)
    launcher = launched.start(tmp_path / "log", "-m", "rankwise", "train", str(folder), out=subprocess.PIPE, fresh=True)
    printed = launcher.communicate(timeout=PATIENCE)[0].decode()
    assert launcher.returncode == 0, (tmp_path / "log").read_text()
    assert_equal(folder, alone)
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    assert printed.count(f"run: {folder}") == 1
    assert json.loads((folder / "result.json").read_text())["cost"]["processes"] == 2
    assert json.loads((folder / "env.json").read_text())["processes"] == 2
    found = [line["ranks"] for line in lines(folder / "ranks.jsonl")]
    assert found[0] != found[1]  # had the ranks stood still, this would prove little


@pytest.mark.large
def test_it_goes_on_after_a_kill_and_a_stop_also_in_one_process(base: str, tmp_path: Path) -> None:
    """One of the two is killed by -9; started again, the launcher is told to stop; one process alone ends the run."""
    steps = 90
    settings = {"max_steps": steps, "checkpoint_every": 10, "method": {**SIMPLEX, "every": 10}}  # a search of 30 steps
    alone, folder = (make(tmp_path / name, base, **settings) for name in ("alone", "run"))
    launcher = launched.start(tmp_path / "log", "-m", "rankwise", "train", str(folder))
    wait_for(lambda: reached(folder, 11) or launcher.poll() is not None)
    os.kill(launched.workers(launcher, tmp_path / "log")[1], signal.SIGKILL)
    assert launcher.wait(PATIENCE) != 0
    done = newest(folder)
    assert 10 <= done < steps and not (folder / "error.txt").exists()

    cut_back(folder, folder / f"checkpoint-{done}")
    launcher = launched.start(tmp_path / "log", "-m", "rankwise", "train", str(folder))
    wait_for(lambda: reached(folder, done + 2) or launcher.poll() is not None)
    launcher.terminate()
    launcher.wait(PATIENCE)
    step = newest(folder)
    assert f"stopped after step {step}; the same command goes on from there" in (tmp_path / "log").read_text()
    assert done + 2 <= step < steps

    run(folder)
    run(alone)
    assert_equal(folder, alone)
    first, *_, last = lines(folder / "ranks.jsonl")
    assert first["ranks"] != last["ranks"] and last["step"] == 30  # had the ranks stood still, this would prove little


def newest(folder: Path) -> int:
    """The step of the newest complete checkpoint, -1 for none."""
    steps = [int(path.parent.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*/complete.json")]
    return max(steps, default=-1)


@pytest.mark.parametrize(
    ("settings", "code", "line"),
    [
        ({"method": {"name": "lora", "rank": 1000}}, 2, "rankwise: .*rank.*1000"),
        ({"method": LORA, "learning_rate": 1e30, "warmup": 2}, 1, "rankwise: DivergedError: loss is"),
    ],
)
def test_an_error_ends_both_processes_in_one_line(
    settings: dict[str, Any], code: int, line: str, base: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "run", base, **settings)
    launcher = launched.start(tmp_path / "log", "-m", "rankwise", "train", str(folder))
    assert launcher.wait(PATIENCE) != 0
    log = (tmp_path / "log").read_text()
    [told] = re.findall("^rankwise: .*$", log, re.MULTILINE)
    assert re.match(line, told)
    assert re.search(rf"Root Cause.*exitcode  : {code} ", log, re.DOTALL)
    assert (folder / "error.txt").exists() and not (folder / "result.json").exists()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found in `side_by_side.py`."""
    folder = tmp_path_factory.mktemp("both")
    launcher = launched.start(folder / "log", side_by_side.__file__, str(folder))
    assert launcher.wait(PATIENCE) == 0, (folder / "log").read_text()
    return torch.load(folder / "found.pt", weights_only=True)


def unpadded(adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter in the layout compact, written to `out`."""
    return load_file(rw.export_adapter(adapter, out, "peft").path / "adapter_model.safetensors")


def assert_alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of sums, in float64."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-10, rtol=0, msg=name)


@pytest.mark.large
def test_every_method_learns_in_two_processes_and_in_pieces_what_it_learns_in_one(
    both: dict[str, Any], tmp_path: Path
) -> None:
    found = side_by_side.every_one(tmp_path, micro_batch=7)
    assert found.keys() == both["methods"].keys() == registry().keys() - {"none"}
    for name, state in found.items():
        if name != "fourierft":  # whose transforms PEFT computes in fp32
            assert_alike(both["methods"][name], state)


@pytest.mark.large
def test_what_emptied_sites_have_learnt_is_merged_alike(both: dict[str, Any], tmp_path: Path) -> None:
    assert_alike(both["merged"], side_by_side.merging(tmp_path, micro_batch=7))


@pytest.mark.large
def test_ranks_and_fresh_factors_are_alike_where_dropout_parts_the_random_streams(both: dict[str, Any]) -> None:
    assert both["alike"]
    assert max(both["ranks"].values()) > 2  # sites have grown, by factors drawn at random


def test_a_bare_loop_averages_gradients_or_wraps_the_model_anew(both: dict[str, Any]) -> None:
    alone = side_by_side.learnt(side_by_side.by_hand(lambda model: model, average=False, rewrap=False))
    assert_alike(both["averaged"], alone)
    assert_alike(both["wrapped anew"], alone)
    assert both["wrapped once"].startswith("RuntimeError: gradients differ between the processes since ranks")


@pytest.mark.parametrize(
    ("name", "then"),
    [
        pytest.param(*names, marks=[] if names[0] == "simplex-lora" else [pytest.mark.large])
        for names in side_by_side.FOUND.items()
    ],
)
def test_a_found_adapter_trains_sharded_as_it_does_whole(
    name: str, then: str, both: dict[str, Any], tmp_path: Path
) -> None:
    side_by_side.found_adapter(tmp_path / "found", name)
    learnt, logits = side_by_side.sharded(tmp_path / "found", tmp_path / "adapter", then, shard=False)
    ours, theirs = both["sharded"][name]
    assert_alike(ours, learnt)
    torch.testing.assert_close(theirs, logits, atol=1e-6, rtol=0)


def test_a_search_on_a_sharded_model_is_refused(both: dict[str, Any]) -> None:
    assert both["sharded search"].startswith("InputError: ranks cannot be learnt on a model that is sharded")


SHARDED = (
    "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_transformer_layer_cls_to_wrap",
)  # fmt: skip


@pytest.fixture(scope="module")
def by_fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have carried out `sharded_trainer.py`."""
    folder = tmp_path_factory.mktemp("fsdp")
    side_by_side.found_adapter(folder / "found", "lora")
    script = (on_cpus.__file__, sharded_trainer.__file__)
    launcher = launched.start(folder / "log", *script, str(folder), how=(*SHARDED, "BertLayer"))
    assert launcher.wait(PATIENCE) == 0, (folder / "log").read_text()
    return folder


@pytest.mark.parametrize("kind", sharded_trainer.KINDS)
def test_a_trainer_under_fsdp_trains_a_found_adapter_on_as_one_process_does(
    kind: str, by_fsdp: Path, tmp_path: Path
) -> None:
    sharded_trainer.train_on(by_fsdp / "found", tmp_path / "whole", kind, rows=8, use_cpu=True)
    assert_alike(
        *(unpadded(folder, tmp_path / f"{folder.name} again") for folder in (by_fsdp / kind, tmp_path / "whole"))
    )
    found, after = (
        {name: layer.rank for name, layer in stored(by_fsdp / folder).layers.items()} for folder in ("found", kind)
    )
    assert found == after and len(set(found.values())) > 1


@pytest.mark.large
@pytest.mark.parametrize("weights", [{"dtype": "bf16"}, {"quantise": "4bit"}], ids=["bf16", "4bit"])
def test_what_two_processes_have_found_trains_on_sharded_as_the_page_says(
    weights: dict[str, str], tmp_path: Path
) -> None:
    """Both commands of docs/devices.md, on a small decoder, next to the same in one process."""
    if "quantise" in weights:
        pytest.importorskip("bitsandbytes")
    foods = ("thai", "french", "indian")
    rows = [
        f"name: place {row} | food: {foods[row % 3]},Place {row} serves {foods[row % 3]} food." for row in range(80)
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,answer", *rows]))
    columns = {"text": "prompt", "target": "answer"}
    task = {"type": "causal", "dataset": str(tmp_path / "rows.csv"), "columns": columns}
    torch.manual_seed(5)  # with other weights, rounding in bf16 may decide where the last unit of rank goes
    model, tokenizer, _ = build("random-llama", rw.task(task), 48)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    settings = {"task": task, "max_steps": 6, "train_rows": None, "max_length": 48, **weights}
    settings |= {"gradient_checkpointing": True, "micro_batch": 4, "method": {**SIMPLEX, "every": 2, "times": 2}}
    found, alone = (make(tmp_path / "runs" / name, str(tmp_path / "base"), **settings) for name in ("found", "alone"))
    launcher = launched.start(tmp_path / "log", "-m", "rankwise", "train", str(found))
    assert launcher.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    run(alone)
    for one, other in zip(lines(found / "metrics.jsonl"), lines(alone / "metrics.jsonl"), strict=True):
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=2e-3)
    assert [line["ranks"] for line in lines(found / "ranks.jsonl")] == [
        line["ranks"] for line in lines(alone / "ranks.jsonl")
    ]

    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    [script] = re.findall(r"^```python\n(\"\"\"continue.py .*?)^```", page, re.MULTILINE | re.DOTALL)
    shorter = script.replace("max_steps=1000", "max_steps=4").replace("warmup_steps=50", "warmup_steps=1")
    whole = shorter.replace("per_device_train_batch_size=2", "per_device_train_batch_size=4, use_cpu=True")
    assert len({script, shorter, whole}) == 3
    (tmp_path / "continue.py").write_text(shorter)
    (tmp_path / "whole.py").write_text(whole)
    rw.export_adapter(found, tmp_path / "compact", "peft")
    source = (str(found), str(tmp_path / "compact"))
    given = (str(tmp_path / "continue.py"), *source, str(tmp_path / "sharded"))
    launcher = launched.start(tmp_path / "log", on_cpus.__file__, *given, how=(*SHARDED, "LlamaDecoderLayer"))
    assert launcher.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    warm.run([sys.executable, str(tmp_path / "whole.py"), *source, str(tmp_path / "whole")], check=True)
    names = ("compact", "sharded", "whole")
    before, ours, theirs = (unpadded(tmp_path / name, tmp_path / f"{name} again") for name in names)
    assert before.keys() == ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=3e-4, rtol=0, msg=name)  # measured: 1e-5
    moved = max(float((ours[name] - before[name]).abs().max()) for name in ours)
    assert 2e-4 < moved < 2e-3  # by the learning rate in some of the steps
    assert len({len(value) for name, value in ours.items() if "lora_A" in name}) > 1  # uneven ranks


def test_a_sharded_launch_is_refused(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="a run cannot be sharded"):
        run(make(tmp_path / "run", base))


SOMEWHERE_ELSE = {"PMI_RANK": "1", "PMI_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "RANK": "1", "LOCAL_RANK": "1"}  # fmt: skip


def test_ranks_that_no_launcher_of_ours_has_set_leave_a_run_alone(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As within a step of a SLURM job, or with what such a step has left behind."""
    for name, value in SOMEWHERE_ELSE.items():
        monkeypatch.setenv(name, value)
    assert "processes" not in run(make(tmp_path / "run", base, method=LORA, max_steps=2))["cost"]


@pytest.mark.parametrize("half", [{"RANK": "1"}, {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}])
def test_an_environment_that_is_half_a_launch_is_told_in_one_line(
    half: dict[str, str], base: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "run", base)
    command = [sys.executable, "-m", "rankwise", "train", str(folder)]
    environment = {**os.environ, **half, "WORLD_SIZE": "2"}
    done = warm.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("rankwise: WORLD_SIZE=2 in the environment says") and "MASTER_ADDR" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]
    command = [*command[:-1], "task=stdlib-kind", f"runs={tmp_path / 'made'}"]
    done = warm.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and not (tmp_path / "made").exists()


def test_an_error_of_torchs_own_exchange_with_one_that_is_gone_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "count", lambda: 2)
    gone = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:8902: Connection reset"
    assert together.lost(RuntimeError(gone)) and together.lost(torch.distributed.DistBackendError("NCCL error"))
    assert not together.lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    monkeypatch.undo()
    assert not together.lost(RuntimeError(gone))  # a single process has no other to lose


def test_a_process_that_waits_for_others_says_so(base: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", base)
    complete = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    soon = "from rankwise.processes import together; together.TELL_AFTER = 0.5; from rankwise.cli import main; main()"
    process = warm.Popen(
        [sys.executable, "-c", soon, "train", str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **complete},
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("waiting for the other processes of this run, because")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.large
def test_a_sweep_of_launched_runs_that_is_killed_leaves_none_and_goes_on(base: str, tmp_path: Path) -> None:
    """Killed by -9: a worker's parent, the launcher, lives on and tells it nothing."""
    settings = {**runs.SETTINGS, "model": base, "method": SIMPLEX, "train_rows": 61, "max_steps": 40}
    del settings["id"]
    file, folder_of_runs = tmp_path / "sweep.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump({**settings, "checkpoint_every": 40, "eval_every": 0, "vary": {"seed": [0]}}))
    train = [*launched.launcher(), "-m", "rankwise", "train"]
    command = [sys.executable, "-m", "rankwise", "compare", str(file), f"runs={folder_of_runs}", "--jobs", "1"]
    command += ["--runner-option", f"command={json.dumps(train)}"]

    def sweep() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            return warm.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    first = sweep()
    wait_for(lambda: any(reached(folder, 2) for folder in folder_of_runs.glob("*/")) or first.poll() is not None)
    [folder] = (path.parent for path in folder_of_runs.glob("*/run.yaml"))
    started = writers(folder)
    assert len(started) == 3  # the launcher and two that train
    first.kill()
    first.wait()
    wait_for(lambda: not any(map(alive, started)))
    assert 2 <= newest(folder) < 40, (folder / "log.txt").read_text()

    assert sweep().wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    alone = tmp_path / "alone" / folder.name
    alone.mkdir(parents=True)
    (alone / "run.yaml").write_bytes((folder / "run.yaml").read_bytes())
    run(alone)
    assert_equal(folder, alone)
    assert json.loads((folder / "result.json").read_text())["cost"]["processes"] == 2
