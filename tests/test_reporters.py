"""What TensorBoard, W&B, trackio and MLflow get of a run, and that none of them can change or end it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import launched
import rankwise as rw
import runs
from asserts import refused
from rankwise.files import EVENTS, checkpoints, remove_checkpoint, written
from rankwise.runs.store import Store
from rankwise.settings import RunConfig
from rankwise.sweep.clean import remove
from rankwise.train.run import run
from runs import SIMPLEX, lines, make, start
from waiting import PATIENCE, reached, wait_for

Scalars = dict[str, list[tuple[int, float]]]


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / EVENTS), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(folder: Path) -> Scalars:
    """Tag -> (step, value) in the order in which TensorBoard shows them."""
    found = events(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def told(folder: Path) -> Scalars:
    """The same, from what the run itself writes: losses, rates, scores and ranks."""
    expected: Scalars = {}
    for line in lines(folder / "metrics.jsonl"):
        values = {f"train/{name}": line[name] for name in ("loss", "learning_rate") if name in line}
        values |= {f"eval/{name}": value for name, value in line.get("eval", {}).items()}
        for tag, value in values.items():
            expected.setdefault(tag, []).append(
                (line["step"], pytest.approx(value, rel=1e-6))
            )  # TensorBoard's are fp32
    for line in lines(folder / "ranks.jsonl"):
        for site, rank in line["ranks"].items():
            expected.setdefault(f"ranks/{site}", []).append((line["step"], rank))
    return expected


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("runs") / "run", method=SIMPLEX, report_to=["tensorboard"])
    run(folder)
    return folder


def test_tensorboard_gets_what_the_run_writes_and_a_picture_of_the_ranks(reported: Path) -> None:
    found = scalars(reported)
    assert len(found["train/loss"]) == len(found["train/grad_norm"]) == 12
    expected = told(reported)
    changed = {step for step, _ in found["ranks/total"]}
    assert len(changed) > 1  # had the ranks stood still, this would prove little
    for tag, values in expected.items():
        values = [each for each in values if each[0] in changed] if tag.startswith("ranks/") else values
        assert found.pop(tag) == values, tag
    assert found.keys() == {"train/grad_norm", "ranks/total", "ranks/empty"}
    pictures = events(reported).Images("ranks/picture")
    assert [event.step for event in pictures] == [5, 10]  # evaluations after a change; at the end there was no other
    pixels = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
    assert pixels.shape[2] == 3 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    assert "method.rank: 4" in events(reported).Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert EVENTS in written(reported)


def test_a_run_that_reports_has_the_id_and_the_result_of_one_that_does_not(reported: Path, tmp_path: Path) -> None:
    silent = make(tmp_path / "run", method=SIMPLEX)
    run(silent)
    assert not (silent / EVENTS).exists()
    assert (silent / "metrics.jsonl").read_bytes() == (reported / "metrics.jsonl").read_bytes()
    settings: dict[str, Any] = {"task": "cola", "method": SIMPLEX}
    config, other = RunConfig(**settings), RunConfig(**settings, report_to=["wandb"])
    assert config.id == other.id
    store = Store(tmp_path / "store")
    folder = store.create(config, runs.REVISION)
    assert store.create(other, runs.REVISION) == folder and store.config(folder).report_to == ["wandb"]


LONG = {"method": {**SIMPLEX, "every": 10}, "max_steps": 40, "checkpoint_every": 1000, "report_to": ["tensorboard"]}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("runs") / "uncut", **LONG)
    run(folder)
    return folder


@pytest.mark.large
@pytest.mark.parametrize("begun", [True, False])
def test_a_run_that_was_killed_and_resumed_shows_each_step_once(begun: bool, uncut: Path, tmp_path: Path) -> None:
    """Killed by -9 after two checkpoints, of which the newer is lost, or (`begun` false) before its first."""
    folder = make(tmp_path / "run", **{**LONG, "checkpoint_every": 12 if begun else 1000})
    process = start(folder)
    wait_for(lambda: reached(folder, 25) or process.poll() is not None)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    seen = scalars(folder)["train/loss"][-1][0]
    assert seen > 20
    if begun:
        remove_checkpoint(checkpoints(folder)[0])  # so steps are repeated that TensorBoard has
    run(folder)
    assert len([*(folder / EVENTS).iterdir()]) == (2 if begun else 1)
    found = scalars(folder)
    assert found == scalars(uncut)
    for tag, values in found.items():
        assert all(before < after for (before, _), (after, _) in pairwise(values)), tag
    resumed, whole = ([event.step for event in events(each).Images("ranks/picture")] for each in (folder, uncut))
    assert resumed == sorted({*resumed, *whole}) and len(whole) > 1  # a resumed run draws once more than it would


@pytest.mark.large
def test_repeat_starts_the_event_files_again(tmp_path: Path) -> None:
    settings = {**runs.SETTINGS, "model": runs._small_bert(), "method": "lora", "report_to": ["tensorboard"]}
    del settings["id"]
    folder = rw.train(settings, runs=tmp_path / "runs").folder
    mine = folder / EVENTS / "notes.txt"
    mine.touch()
    rw.train(settings, runs=tmp_path / "runs", repeat=True)
    assert [step for step, _ in scalars(folder)["train/loss"]] == [*range(1, 13)]
    assert len([*(folder / EVENTS).glob("events*")]) == 1 and mine.exists()
    assert remove(folder) == [EVENTS] and [*folder.rglob("*.txt")] == [mine]
    mine.unlink()
    assert not [*folder.rglob("events*")]


def test_a_folder_of_others_is_not_written_into(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", report_to=["tensorboard"])
    (folder / EVENTS).mkdir()
    assert refused(lambda: run(folder)) == (
        f"{folder / EVENTS} was not written by this run, which needs the name: move it away"
    )
    assert not [*(folder / EVENTS).iterdir()]


@pytest.mark.parametrize(
    "broken",
    ["add_scalar", *(pytest.param(name, marks=pytest.mark.large) for name in ("__init__", "add_image", "close"))],
)
def test_a_reporter_that_fails_is_told_of_once_and_the_run_goes_on(
    broken: str, reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left\non device")

    monkeypatch.setattr(SummaryWriter, broken, fail)
    folder = make(tmp_path / "run", method=SIMPLEX, report_to=["tensorboard"])
    run(folder)
    said = capsys.readouterr().err
    line = "report_to: tensorboard has failed, and the run goes on without it: no space left on device\n"
    assert said.count(line) == said.count("no space left") == 1
    assert (folder / "metrics.jsonl").read_bytes() == (reported / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_what_is_not_installed_is_refused_before_anything_is_made(
    name: str, cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "tensorboard":
        monkeypatch.setitem(sys.modules, name, None)
    elif find_spec(name):
        pytest.skip(f"{name} is installed")
    else:  # W&B leaves a folder of its own name, which Python takes for a package
        (tmp_path / name).mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    for command in ("train", "validate"):
        given = [f"report_to=[{name}]"]
        if command == "validate":
            (tmp_path / "run.yaml").write_text(f"task: stdlib-kind\nreport_to: [{name}]\n")
            given = ["run.yaml"]
        code, _, err = cli(command, *(["task=stdlib-kind"] if command == "train" else []), *given)
        assert code == 2 and err.endswith(f"report_to: {name} is not installed: pip install {name}\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.large
def test_two_processes_report_once(tmp_path: Path) -> None:
    base = launched.bert(tmp_path / "bert")
    folder = make(tmp_path / "run", model=base, method=SIMPLEX, report_to=["tensorboard"])
    launcher = launched.start(tmp_path / "log", "-m", "rankwise", "train", str(folder))
    assert launcher.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    assert len([*(folder / EVENTS).iterdir()]) == 1
    assert [step for step, _ in scalars(folder)["train/loss"]] == [*range(1, 13)]


# --- what others get, where they are installed ------------------------------------------------------------------------


def carried_out(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The run in a fresh process, in its folder of runs."""
    return subprocess.run(
        [sys.executable, "-m", "rankwise", "train", str(folder)],
        **{"cwd": folder.parent, "env": {**os.environ, "OMP_NUM_THREADS": "1", **env}},
        **{"capture_output": True, "text": True, "timeout": PATIENCE, "stdin": subprocess.DEVNULL},
    )  # fmt: skip


def stopped_and_resumed(folder: Path, **env: str) -> str:
    """Carry out a run that is stopped by SIGTERM after 5 steps; returns what is printed to stdout when it resumes."""
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rankwise", "train", str(folder)],
            **{"cwd": folder.parent, "env": {**os.environ, "OMP_NUM_THREADS": "1", **env}},
            **{"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL},
        )  # fmt: skip
        wait_for(lambda: reached(folder, 5) or process.poll() is not None)
        process.terminate()
        assert process.wait(PATIENCE) == 75, (folder / "log.txt").read_text()
    resumed = carried_out(folder, **env)
    assert resumed.returncode == 0 and "has failed" not in resumed.stderr, resumed.stderr
    return resumed.stdout


def assert_told(folder: Path, parts: list[Scalars]) -> None:
    """The attempts at a run were sent what it has written: the first up to some step, the second all after it."""
    first, second = parts
    step = first["train/loss"][-1][0]
    assert first["train/loss"] + second["train/loss"] == told(folder)["train/loss"]
    assert second["train/loss"][0][0] == step + 1
    assert second["eval/accuracy"][-1] == told(folder)["eval/accuracy"][-1]
    assert second["ranks/total"][0] == (step, first["ranks/total"][-1][1])
    last = lines(folder / "ranks.jsonl")[-1]["ranks"]
    assert {name: second[f"ranks/{name}"][-1][1] for name in last} == last


SLOW = {"method": {**SIMPLEX, "every": 10}, "max_steps": 60, "checkpoint_every": 1000}


def read(script: str, **env: str) -> Any:
    """What a fresh process prints as JSON, where warnings of others are no errors."""
    command = [sys.executable, "-c", script]
    return json.loads(subprocess.run(command, env={**os.environ, **env}, capture_output=True, check=True).stdout)


MLFLOW = """
import json, mlflow
client = mlflow.MlflowClient()
told = []
for run in client.search_runs([client.get_experiment_by_name("runs").experiment_id], order_by=["start_time"]):
    name, key = run.info.run_id, {}
    for tag in run.data.metrics:
        key[tag] = sorted((point.step, point.value) for point in client.get_metric_history(name, tag))
    images = [each.path for each in client.list_artifacts(name, "images")]
    told.append([run.info.run_name, run.info.status, run.data.params["method.rank"], images, key])
print(json.dumps(told))
"""


def test_mlflow_gets_a_run_for_each_attempt_and_how_it_ended(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    folder = make(tmp_path / "runs" / "run", report_to=["mlflow"], **SLOW)
    uri = f"sqlite:///{tmp_path}/mlflow.db" if find_spec("sqlalchemy") else f"file://{tmp_path}/store"
    env = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    stopped_and_resumed(folder, **env)
    names, states, ranks, images, parts = zip(*read(MLFLOW, **env), strict=True)
    parts = [{tag: [(step, value) for step, value in values] for tag, values in part.items()} for part in parts]
    assert names == ("run", f"run from step {parts[0]['train/loss'][-1][0]}")
    assert (states, ranks) == (("KILLED", "FINISHED"), ("4", "4"))
    assert_told(folder, parts)
    assert any("picture" in path for path in images[1])

    away = make(tmp_path / "runs" / "away", report_to=["mlflow"])
    unreachable = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    ended = carried_out(away, **env | unreachable)
    assert ended.returncode == 0 and ended.stderr.count("report_to: mlflow has failed, and the run goes on") == 1


def test_runs_that_start_at_once_make_one_database_of_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    folders = [make(tmp_path / "runs" / name, report_to=["mlflow"]) for name in ("one", "two")]
    with ThreadPoolExecutor() as pool:
        ended = [*pool.map(lambda folder: carried_out(folder, **env), folders)]
    assert [(each.returncode, "has failed" in each.stderr) for each in ended] == [(0, False)] * 2, ended
    assert sorted((name, state) for name, state, *_ in read(MLFLOW, **env)) == [
        ("one", "FINISHED"),
        ("two", "FINISHED"),
    ]


def records(file: Path) -> Iterator[bytes]:
    """The records of a file of W&B: after 7 bytes, blocks of 32 KiB as in the log of LevelDB."""
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield whole
            whole = b""


def test_wandb_gets_a_run_for_each_attempt_offline(tmp_path: Path) -> None:
    record_of = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record.FromString
    folder = make(tmp_path / "runs" / "run", report_to=["wandb"], **SLOW)
    home = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)}
    assert stopped_and_resumed(folder, WANDB_MODE="offline", **home).count("\n") > 0
    parts, names, exits = [], [], []
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        found: Scalars = {}
        for record in map(record_of, records(file)):
            if record.HasField("run"):
                names.append((record.run.project, record.run.run_group, record.run.display_name))
            if record.HasField("exit"):
                exits.append(record.exit.exit_code)
            step = record.history.step.num
            for item in record.history.item:
                value = json.loads(item.value_json)
                if isinstance(value, int | float):
                    found.setdefault(item.key or "/".join(item.nested_key), []).append((step, value))
        parts.append(found)
    step = parts[0]["train/loss"][-1][0]
    assert [*dict.fromkeys(names)] == [("runs", "run", "run"), ("runs", "run", f"run from step {step}")]
    assert exits == [1, 0]
    assert_told(folder, parts)
    assert [*(tmp_path / "wandb").glob("offline-run-*/files/media/images/ranks/picture*.png")]

    new = make(tmp_path / "runs" / "new", report_to=["wandb"])
    for key, words in (
        ("", " has no login: run `wandb login`, or set WANDB_MODE=offline"),
        ("mine", ": .* API key must"),
    ):
        ended = carried_out(new, WANDB_MODE="online", WANDB_API_KEY=key, **home)
        assert ended.returncode == 2
        assert re.search(f"^rankwise: report_to: W&B{words}", ended.stderr, re.MULTILINE), ended.stderr


TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps({name: SQLiteStorage.get_logs("runs", name) for name in SQLiteStorage.get_runs("runs")}))
"""


def test_trackio_gets_a_run_for_each_attempt(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    folder = make(tmp_path / "runs" / "run", report_to=["trackio"], **SLOW)
    env = {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    printed = stopped_and_resumed(folder, **env)
    assert printed == carried_out(folder).stdout  # what a finished run prints, and nothing of trackio's
    logs = read(TRACKIO, **env)
    parts = []
    for name in sorted(logs, key=len):
        found: Scalars = {}
        for line in logs[name]:
            for tag, value in line.items():
                if isinstance(value, int | float) and "/" in tag:
                    found.setdefault(tag, []).append((line["step"], value))
        parts.append(found)
    assert sorted(logs, key=len) == ["run", f"run from step {parts[0]['train/loss'][-1][0]}"]
    assert_told(folder, parts)
    assert [*(tmp_path / "trackio" / "media").rglob("*.png")]
