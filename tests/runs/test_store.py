import fcntl
import json
from pathlib import Path

import filelock
import pytest
import yaml

import rankwise
from rankwise.config import Experiment
from rankwise.errors import InputError
from rankwise.runs.store import State, Store, answers, progress
from runs_made_up import REVISION, config, finish, predict, result


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_a_run_has_a_readable_folder_with_its_resolved_settings(store: Store) -> None:
    folder = store.create(config(seed=3), REVISION)
    assert folder == store.place(config(seed=3), REVISION)
    assert folder.name.startswith("cola-lora-3-")
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    assert settings.pop("id") == folder.name.rpartition("-")[2]
    assert settings.pop("made_with") == {"rankwise": rankwise.__version__, "data": REVISION}
    assert settings == config(seed=3).model_dump(mode="json", exclude={"runs"})
    assert store.folders() == [folder]
    assert store.config(folder) == config(seed=3)


def test_settings_that_were_cut_off_anywhere_are_no_settings(store: Store) -> None:
    """A part of them is a valid file, too: what is missing would be filled in by defaults."""
    settings = config(seed=3, max_steps=7, scale="smoke")
    folder = finish(store, settings, 0.5)
    whole, cuts = (folder / "run.yaml").read_text(), 0
    for end in range(len(whole)):
        (folder / "run.yaml").write_text(whole[:end])
        if store.state(folder) == "done":  # without what is a default anyway
            assert store.config(folder) == settings
            continue
        cuts += 1
        assert "the same rankwise compare" in store.standing(folder).error
        with pytest.raises(InputError, match="not what was written there"):
            store.config(folder)
    assert cuts > len(whole) / 2
    (folder / "run.yaml").write_text(whole[:50])
    assert store.create(settings, REVISION) == folder
    assert (folder / "run.yaml").read_text() == whole and store.state(folder) == "done"


def test_settings_that_were_changed_are_another_runs(store: Store) -> None:
    folder = store.create(config(max_steps=7), REVISION)
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text().replace("max_steps: 7", "max_steps: 8"))
    with pytest.raises(InputError, match="not what was written there"):
        store.config(folder)


def test_a_damaged_experiment_is_named(store: Store) -> None:
    store.note(Experiment(name="x", base={"task": "cola"}, vary={"seed": [0]}, runs="r"))
    (store.folder / "experiment.yaml").write_text("name: [x")
    with pytest.raises(InputError, match="experiment.yaml is damaged .*; the same rankwise compare writes it again"):
        store.experiment()


def test_a_run_begins_with_one_of_its_own_version_and_data(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = config(followed=True), config(after=config(followed=True).digest())
    monkeypatch.setattr(rankwise, "__version__", "0.0.1")
    store.create(first, REVISION)
    monkeypatch.undo()
    store.create(first, "of other data")
    folder = store.create(second, REVISION)
    with pytest.raises(InputError, match="the run that it begins with is not in"):
        store.before(folder)
    wanted = store.create(first, REVISION)
    assert store.before(folder) == wanted and store.before(wanted) is None


def test_making_a_run_again_changes_nothing_and_a_damaged_one_is_mended(store: Store) -> None:
    folder = finish(store, config(), 0.5)
    before = (folder / "run.yaml").read_bytes()
    assert store.create(config(runs="elsewhere"), REVISION) == folder
    assert store.state(folder) == "done"
    (folder / "run.yaml").write_text("id: [")
    assert store.state(folder) == "pending"
    with pytest.raises(InputError, match="its run.yaml is not what was written there"):
        store.config(folder)
    store.create(config(), REVISION)
    assert (folder / "run.yaml").read_bytes() == before
    assert not list(folder.glob(".run.yaml*"))


def test_the_states_a_run_goes_through(store: Store) -> None:
    folder = store.create(config(), REVISION)
    assert store.state(folder) == "pending"
    with filelock.FileLock(folder / "run.lock"):
        assert store.state(folder) == "running"
    assert store.state(folder) == "pending"
    (folder / "metrics.jsonl").write_text('{"step": 0, "steps": 30}\n{"step": 7, "loss": 0.1}\n{"step": 8, "lo')
    assert store.state(folder) == "stopped"
    (folder / "error.txt").write_text("\nno more memory\n\nTraceback\n")
    standing = store.standing(folder)
    assert (standing.state, standing.step, standing.steps, standing.error) == ("failed", 7, 30, "no more memory")
    store.forget_error(folder)
    assert store.state(folder) == "stopped"
    finish(store, config(), 0.5)
    assert store.state(folder) == "done"


class BegunAgain(Store):
    """Each failed run is begun again in the moment after somebody has asked how it stands."""

    def state(self, folder: Path) -> State:
        found = super().state(folder)
        self.forget_error(folder)
        return found


def test_a_run_that_is_begun_again_while_somebody_looks_is_no_error(tmp_path: Path) -> None:
    store = BegunAgain(tmp_path / "runs")
    folder = store.create(config(), REVISION)
    for look in (store.standing, store.diverged):
        (folder / "error.txt").write_text("broken\n")
        look(folder)
        assert not (folder / "error.txt").exists()


def test_two_that_look_at_once_do_not_take_each_other_for_the_run(store: Store) -> None:
    folder = store.create(config(), REVISION)
    with filelock.FileLock(folder / "run.lock"):
        pass
    (folder / "error.txt").write_text("broken\n")
    with (folder / "run.lock").open("rb") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        assert store.state(folder) == "failed"


@pytest.mark.parametrize("name", ["half", "foreign", "list", "another", "no cost", "empty", "binary"])
def test_only_a_whole_result_of_this_very_run_counts(name: str, store: Store) -> None:
    folder = store.create(config(), REVISION)
    whole = result(folder, config(), 0.5)
    text = {
        "half": json.dumps(whole)[:-20],
        "foreign": '{"hello": "world"}',
        "list": "[1, 2]",
        "another": json.dumps({**whole, "run": "000000000000"}),
        "no cost": json.dumps({key: value for key, value in whole.items() if key != "cost"}),
        "empty": "",
        "binary": "\0",
    }[name]
    (folder / "result.json").write_text(text)
    assert store.result(folder) is None
    assert store.state(folder) == "pending"
    assert store.results() == []


def test_results_come_with_their_folder_and_settings(store: Store) -> None:
    first = finish(store, config(), 0.5)
    second = finish(store, config(seed=1), 0.6)
    store.create(config(seed=2), REVISION)
    assert {each["folder"]: each["metrics"]["accuracy"] for each in store.results()} == {first: 0.5, second: 0.6}
    (only,) = store.results([second])
    assert only["config"]["seed"] == 1
    assert "runs" not in only["config"]


def test_what_else_lies_in_the_folder_is_no_run(store: Store) -> None:
    folder = store.create(config(), REVISION)
    (store.folder / "notes").mkdir()
    (store.folder / "report.html").write_text("")
    assert store.folders() == [folder]


def test_the_experiment_is_kept_beside_its_runs(store: Store) -> None:
    assert store.experiment() == {}
    store.note(Experiment(name="x", base={"task": "cola"}, vary={"seed": [0]}, report={"title": "ω"}, runs="r"))
    assert store.experiment() == {"name": "x", "task": "cola", "vary": {"seed": [0]}, "report": {"title": "ω"}}
    assert store.folders() == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing: there is no such folder of runs"):
        Store(tmp_path / "missing").folders()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "runs")
    with pytest.raises(InputError, match="cannot be written to: not a directory; choose another folder with runs=DIR"):
        store.create(config(), REVISION)
    with pytest.raises(InputError, match="cannot be written to"):
        store.note(Experiment(name="x", base={}, vary={"seed": [0]}, runs="r"))


def test_progress_before_the_first_line(tmp_path: Path) -> None:
    assert progress(tmp_path) == (0, None)
    (tmp_path / "metrics.jsonl").write_text('{"ste')
    assert progress(tmp_path) == (0, None)


def test_answers_are_those_of_the_main_split(store: Store) -> None:
    folder = store.create(config(), REVISION)
    assert answers(folder) is None
    predict(folder, [1, 0, 1], [1, 1, 1])
    found = answers(folder)
    assert found is not None and found.kind == "prediction"
    assert (found.values.tolist(), found.labels.tolist()) == ([1, 0, 1], [1, 1, 1])
    predict(folder, [1, 0, 1], [-1, -1, -1])
    assert answers(folder) is None
    (folder / "predictions.parquet").write_bytes(b"PAR1")
    assert answers(folder) is None


def test_answers_with_a_score_each_are_these_scores(store: Store) -> None:
    folder = store.create(config(), REVISION)
    predict(folder, [0, 0, 0], [-1, -1, -1], scores=[0.5, 0.25, 1.0])
    found = answers(folder)
    assert found is not None and found.kind == "score"
    assert (found.values.tolist(), found.labels.tolist()) == ([0.5, 0.25, 1.0], [0, 1, 2])


def test_answers_with_statistics_are_these_row_by_row(store: Store) -> None:
    folder = store.create(config(), REVISION)
    predict(folder, [0, 0], [-1, -1], statistics=[[1, 2, 3], [4, 5, 6]], idx=[7, 3])
    found = answers(folder)
    assert found is not None and found.kind == "statistics"
    assert (found.values.tolist(), found.labels.tolist()) == ([[1, 2, 3], [4, 5, 6]], [7, 3])
    predict(folder, [0, 0], [-1, -1], statistics=[[1, 2, 3], [4, 5]])
    assert answers(folder) is None
