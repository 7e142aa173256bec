"""Runs of other versions than this one: their ids, and whether they are found and read."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankwise import methods, tasks
from rankwise.runs import run_file
from rankwise.runs.grid import expand
from rankwise.runs.store import Store
from rankwise.settings import Experiment, RunConfig, Schema, load
from rankwise.settings import run as run_settings
from runs import REVISION, config, finish, result

OLDER = Path(__file__).parent / "before_format_1"
"""Runs as they were written before ids left out defaults: a chain of two stages, and a tuned rate of two."""
CHAIN = {"method": {"name": "sora", "rank": 4}, "chain": [{"method.sparsity": 0.1}, {"method.sparsity": 0.0}]}
TUNED = {"method": {"name": "lora", "rank": 4}, "tune": {"learning_rate": [1e-3, 1e-2]}}


def experiment(**settings: Any) -> Experiment:
    given = {"task": "stdlib-kind", "max_steps": 4, "fast": False, "vary": {"seed": [0]}, **settings}
    found = load(given, [], Schema(methods.registry(), tasks.registry()))
    assert isinstance(found, Experiment)
    return found


@pytest.fixture
def older(tmp_path: Path) -> Store:
    shutil.copytree(OLDER, tmp_path / "runs")
    store = Store(tmp_path / "runs")
    for folder in store.folders():
        (folder / "result.json").write_text(json.dumps(result(folder, store.config(folder), 0.5)))
    return store


def test_runs_from_before_format_1_are_found_and_read(older: Store) -> None:
    (contest,) = experiment(**TUNED).contests
    trials, chain = [*contest.tried(1e-3), *contest.tried(1e-2)], expand(experiment(**CHAIN))
    reported = contest.reported(1e-3)
    assert sorted(map(older.place, [*trials, *chain, *reported])) == older.folders()
    for folder in older.folders():
        assert older.state(folder) == "done" and not older.standing(folder).error
        assert older.create(older.config(folder), REVISION) in older.folders()
    assert all(older.tries(older.place(each)) for each in trials)
    assert [older.before(older.place(each)) for each in chain] == [None, older.place(chain[0])]
    assert [each.folder for each in older.results() if each.tuned] == [older.place(reported[0])]
    assert sorted(each.kind for each in older.results()) == ["run", "stage", "stage", "trial", "trial"]


def test_a_chain_goes_on_from_a_stage_of_before_format_1(older: Store) -> None:
    first, second = expand(experiment(**CHAIN))
    shutil.rmtree(older.place(second))
    again = Store(older.folder)
    folder = again.create(second, REVISION)
    assert folder.name.endswith(second.id)
    assert again.before(folder) == again.place(first) and again.place(first).name not in ("", first.id)


def test_a_setting_added_with_a_default_orphans_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NewRunConfig(RunConfig):
        patience: int = 5

    @dataclasses.dataclass(frozen=True)
    class NewLoRA(methods.registry()["lora"]):  # type: ignore[misc]
        warmth: float = 1.0

    store, lora = Store(tmp_path / "runs"), {"name": "lora", "rank": 4, "dropout": 0.5}
    folder = finish(store, config(method=lora, seed=3), 0.5)
    monkeypatch.setattr(run_file, "RunConfig", NewRunConfig)
    monkeypatch.setitem(methods.Method.known, "lora", NewLoRA)

    store = Store(tmp_path / "runs")
    (kept,) = store.results()
    assert kept.folder == folder and kept.config["patience"] == 5
    assert store.standing(folder).state == "done"
    asked = NewRunConfig(task="cola", seed=3, method={**lora, "warmth": 1.0})
    assert store.place(asked) == folder == store.create(asked, REVISION)
    for other in ({"patience": 6}, {"method": {**lora, "warmth": 2.0}}):
        assert store.place(asked.model_copy(update=other)) != folder


def test_a_default_that_is_written_out_is_the_same_run() -> None:
    full = load({"task": "cola"}, [], Schema(methods.registry(), tasks.registry()))
    assert isinstance(full, RunConfig)
    assert "alpha" in full.method and full.id == RunConfig(task="cola").id


def test_runs_are_found_after_the_format_has_risen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the default of `clip` has changed: who asks for the former value is given the run that had it."""
    before, clip = Store(tmp_path / "runs"), RunConfig.model_fields["clip"]
    folder = finish(before, config(), 0.5)

    class Changed(RunConfig):
        clip: float = 7.0

    for place in (run_settings, run_file):
        monkeypatch.setattr(place, "FORMAT", run_file.FORMAT + 1)
    monkeypatch.setattr("rankwise.runs.store.FORMAT", run_file.FORMAT)
    monkeypatch.setattr(run_file, "RunConfig", Changed)
    settings = config().model_dump(exclude={"clip"})
    store = Store(tmp_path / "runs")
    assert store.place(Changed(**settings, clip=clip.default)) == folder
    assert store.place(Changed(**settings)) != folder
    assert store.config(folder).clip == clip.default and store.state(folder) == "done"


def test_a_run_from_before_the_fast_layer_was_computed_by_peft(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    folder = finish(store, config(fast=False), 0.5)
    lines = (folder / "run.yaml").read_text().replace(f"format: {run_settings.FORMAT}", "format: 1").splitlines()[:-1]
    assert lines.count("fast: false") == lines.count("format: 1") == 1
    (folder / "run.yaml").write_text(run_file.signed("".join(f"{line}\n" for line in lines if line != "fast: false")))
    store = Store(tmp_path / "runs")
    assert store.config(folder).fast is False and store.state(folder) == "done"
    assert store.place(config(fast=False)) == folder != store.place(config())


def test_any_change_of_the_text_is_seen_and_a_file_by_hand_has_no_digest(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    folder = store.create(config(), REVISION)
    text = (folder / "run.yaml").read_text()
    for changed in (text + "#\n", text.replace("clip: 1.0", "clip: 2.0"), text.replace("kind: run", "kind: stage")):
        (folder / "run.yaml").write_text(changed)
        assert run_file.read(folder) is None
    (folder / "run.yaml").write_text(yaml.safe_dump({"id": "0123456789ab", "task": "cola"}))
    kept = run_file.read(folder)
    assert kept is not None and (kept.id, kept.maker, kept.kind) == ("0123456789ab", None, "run")


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({}, "run"), ({"tuning": 0.1}, "trial"), ({"followed": True}, "stage"), ({"after": "0123456789ab"}, "stage")],
)
def test_what_a_run_is_stands_in_its_file(settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    folder = Store(tmp_path / "runs").create(config(**settings), REVISION)
    assert yaml.safe_load((folder / "run.yaml").read_text())["kind"] == kind


def test_a_run_that_tuning_takes_over_is_noted_as_tuned(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    folder = finish(store, config(eval_every=0), 0.5)
    assert not store.config(folder).tuned
    assert store.create(config(eval_every=0, tuned=True), REVISION) == folder
    assert store.config(folder).tuned and store.state(folder) == "done"


def test_runs_are_read_without_torch(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    finish(store, config(), 0.5)
    shutil.copytree(OLDER, tmp_path / "runs", dirs_exist_ok=True)
    program = (
        "import sys; from rankwise.runs.store import Store; s = Store(sys.argv[1]);"
        "assert len(s.results()) == 1 and all(s.config(f) and s.standing(f) for f in s.folders());"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "runs")], check=True)


def test_a_failure_says_whether_it_would_come_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    folder = store.create(config(), REVISION)
    assert not store.failure(folder).lasting
    for facts, lasting in (({}, False), ({"diverged": True}, True), ({"refused": True}, True)):
        store.note_error(folder, "loss is nan\n\nTraceback\n", **facts)
        found = json.loads((folder / "error.json").read_text())
        assert found == {"error": "loss is nan", "diverged": False, "refused": False, **facts}
        assert store.failure(folder).lasting == lasting and store.state(folder) == "failed"
    (folder / "error.json").write_text("{")
    assert not store.failure(folder).lasting and store.standing(folder).error == "loss is nan"
    store.forget_error(folder)
    assert store.state(folder) == "pending" and not (folder / "error.json").exists()
