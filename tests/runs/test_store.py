import fcntl
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import yaml

import rankwise
from rankwise.errors import InputError
from rankwise.files import claim
from rankwise.results.summary import Summary
from rankwise.runs import maker
from rankwise.runs.code import Code
from rankwise.runs.maker import Maker
from rankwise.runs.record import progress
from rankwise.runs.standing import State
from rankwise.runs.store import Store
from rankwise.settings import FORMAT, Experiment, RunConfig, as_yaml
from runs import REVISION, config, finish, result


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_a_run_has_a_readable_folder_with_its_resolved_settings(store: Store) -> None:
    folder = store.create(config(seed=3), REVISION)
    assert folder == store.place(config(seed=3))
    assert folder.name.startswith("cola-lora-3-")
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    assert settings.pop("id") == folder.name.rpartition("-")[2]
    assert settings.pop("made_with") == {"rankwise": rankwise.__version__, "data": REVISION}
    assert [settings.pop(key) for key in ("format", "kind")] == [FORMAT, "run"] and len(settings.pop("digest")) == 64
    assert settings == config(seed=3).model_dump(mode="json", exclude={"runs"})
    assert store.folders() == [folder]
    assert store.config(folder) == config(seed=3)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.large)])
def test_settings_that_were_cut_off_anywhere_are_no_settings(step: int, store: Store) -> None:
    """A part of them is a valid file, too: what is missing would be filled in by defaults."""
    settings = config(seed=3, max_steps=7, scale="smoke")
    folder = finish(store, settings, 0.5)
    whole, cuts = (folder / "run.yaml").read_text(), 0
    ends = range(0, len(whole), step)
    for end in ends:
        (folder / "run.yaml").write_text(whole[:end])
        if store.state(folder) == "done":  # without what is a default anyway
            assert store.config(folder) == settings
            continue
        cuts += 1
        assert "the same rankwise compare" in store.standing(folder).error
        with pytest.raises(InputError, match="not what was written there"):
            store.config(folder)
    assert cuts > len(ends) / 2
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


LORA_FILE, SHARED_FILE = {"LoRA": "1"}, {"run": "1"}
CODE = {"methods/lora.py": LORA_FILE, "train/run.py": SHARED_FILE}


def code(**changed: str) -> Code:
    """That of a LoRA run, with other digests of some of its definitions."""
    return {file: {name: changed.get(name, each) for name, each in found.items()} for file, found in CODE.items()}


def made(data: str = REVISION, before: str = "", **changed: str) -> Maker:
    return Maker.now(data, code(**changed), before)


def begin(folder: Path) -> None:
    """As a run leaves its folder when it is stopped."""
    claim(folder, "checkpoint-3")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "complete.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')


def done(store: Store, of: RunConfig, by: Maker, accuracy: float = 0.5, age: int = 0) -> Path:
    """A run that `by` has finished, `age` seconds before others."""
    folder = store.create(of, by)
    (folder / "result.json").write_text(json.dumps(result(folder, of, accuracy)))
    os.utime(folder / "result.json", (1e9 - age, 1e9 - age))
    return folder


def test_a_run_begins_with_one_of_its_own_version_code_and_data(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = config(followed=True), config(after=config(followed=True).id)
    monkeypatch.setattr(rankwise, "__version__", "0.0.1")
    older = made()
    monkeypatch.undo()
    folder = store.create(second, made())
    with pytest.raises(InputError, match="the run that it begins with is not in"):
        store.before(folder)
    for other, words in (
        (older, "another version of rankwise"),
        (made("of other data"), "other data"),
        (made(run="2"), r"other code: train/run.py differs"),
    ):
        store.create(first, other)
        with pytest.raises(InputError, match=f"begins with was made with {words}; carry out the whole chain again"):
            store.before(folder)
    wanted = store.create(first, made())
    assert store.before(folder) == wanted and store.before(wanted) is None
    assert store.named(first.id) == made().name
    store.claim(folder, made())
    assert store.maker(folder) == made(before=made().name)


def test_a_chain_is_stale_when_what_it_begins_with_was_made_again(store: Store) -> None:
    first = config(followed=True, method={"name": "full"})
    second = config(after=first.id)
    by = Maker.now(REVISION, {"methods/full.py": {"Full": "1"}})
    folder = done(store, second, made(before=by.name))
    store.create(first, by)
    assert store.before(folder)
    again = Maker.now(REVISION, {"methods/full.py": {"Full": "2"}})
    store.create(first, again)
    assert store.others({folder: made(before=again.name)}) == {folder: ["another run before it"]}
    with pytest.raises(InputError, match="was made with another run before it"):
        store.before(folder)


def test_what_nobody_has_begun_takes_on_who_makes_it_now(store: Store) -> None:
    folder = store.create(config(), made(LoRA="0"))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')  # killed before its first checkpoint
    assert store.others({folder: made()}) == {}
    assert store.create(config(), made()) == folder and store.maker(folder) == made()
    store.claim(folder, made(run="5"))
    assert store.maker(folder) == made(run="5")
    assert store.config(folder) == config()


def test_what_others_have_begun_or_done_is_not_gone_on_with_in_silence(store: Store) -> None:
    stopped, finished = store.create(config(), made(LoRA="0")), done(store, config(seed=1), made(LoRA="0"))
    begin(stopped)
    wanted = {stopped: made(), finished: made("other")}
    assert store.others(wanted) == {
        stopped: ["methods/lora.py"],
        finished: ["methods/lora.py", "other data"],
    }
    for folder, by in wanted.items():
        store.create(store.config(folder), by)
        assert store.maker(folder) == made(LoRA="0")
    with pytest.raises(InputError, match="was started with other code: methods/lora.py differs; .*--reuse.*--repeat"):
        store.claim(stopped, made())

    store.take_over(stopped, made())
    store.claim(stopped, made())
    assert store.others({stopped: made()}) == {} and store.state(stopped) == "stopped"
    assert yaml.safe_load((stopped / "run.yaml").read_text())["begun_with"] == made(LoRA="0").made_with()
    assert store.config(stopped) == config()

    store.clear(finished)
    assert store.state(finished) == "pending" and not store.begun(finished)
    assert store.maker(store.create(config(seed=1), made("other"))) == made("other")
    store.clear(stopped)
    assert store.state(stopped) == "pending"


def test_a_run_at_work_is_not_cleared(store: Store) -> None:
    folder = store.create(config(), made())
    with filelock.FileLock(folder / "run.lock"), pytest.raises(InputError, match="another process is at work"):
        store.clear(folder)


def test_a_mended_run_is_still_that_of_its_maker(store: Store) -> None:
    folder = done(store, config(), made(LoRA="0"))
    whole = (folder / "run.yaml").read_text()
    for also in ((), ("maker.json",)):
        (folder / "run.yaml").write_text(whole[:70])
        for name in also:
            (folder / name).unlink()
        store.create(config(), made())
        differences = store.others({folder: made()})[folder]
        assert differences == (
            ["other code", "other data", "another version of rankwise"] if also else ["methods/lora.py"]
        )


def test_runs_of_older_versions_are_runs(store: Store) -> None:
    """Their ids held version and data, and their settings may be fewer than a run has now."""
    settings = config().model_dump(mode="json", exclude={"runs", "clip", "tuned"})
    name = hashlib.sha256(json.dumps([settings, "0.0.1", "abc"], sort_keys=True).encode()).hexdigest()[:12]
    folder = store.folder / f"cola-lora-0-{name}"
    folder.mkdir(parents=True)
    text = as_yaml({"id": name, "made_with": {"rankwise": "0.0.1", "data": "abc"}, **settings})
    (folder / "run.yaml").write_text(text)
    (folder / "result.json").write_text(json.dumps(result(folder, config(), 0.5)))
    assert store.state(folder) == "done" and not store.standing(folder).error
    assert [each.folder for each in store.results()] == [folder] and store.left_out() == ""
    (folder / "run.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    assert store.standing(folder).error


def test_runs_of_different_makers_are_in_no_comparison(store: Store) -> None:
    """The newest run and those that agree with it count; other methods do not have a method's own file to agree on."""
    head = Maker.now(REVISION, {"methods/head.py": {"Head": "1"}, "train/run.py": SHARED_FILE})
    kept = [
        done(store, config(seed=1), made()),
        done(store, config(method={"name": "head"}), head, age=9),
        done(store, config(task="mrpc"), made("of another task"), age=9),
    ]
    assert {each.folder for each in store.results()} == set(kept) and store.left_out() == ""
    done(store, config(seed=2), made(LoRA="0"), age=5)
    assert store.left_out() == "1 finished run is left out, because newer ones were made with " + (
        "other code: methods/lora.py differs."
    )
    done(store, config(seed=3), made("of other rows"), age=5)
    done(store, config(seed=4), replace(made(), version="0.0.1"), age=5)
    assert {each.folder for each in store.results()} == set(kept)
    assert store.left_out() == (
        "3 finished runs are left out, because newer ones were made with other code and other data and "
        "another version of rankwise: methods/lora.py differs."
    )
    assert store.left_out() in Summary.of_store(store).text()
    newest = done(store, config(seed=5), made(run="2"), age=-5)
    assert [each.folder for each in store.results()] == [newest]
    assert store.left_out(kept) == "" and len(store.results(kept)) == 3


@pytest.mark.parametrize("damage", ["", "[]", '{"code": {"a": 1}}', '{"code": []}', "{"])
def test_a_code_that_nobody_can_read_agrees_with_itself_alone(damage: str, store: Store) -> None:
    by = [made(LoRA=f"{number} {damage}") for number in range(2)]
    for seed, each in enumerate(by):
        folder = done(store, config(seed=seed), each, age=seed)
        (folder / "maker.json").write_text(damage)
    maker._noted.clear()  # as in another process
    assert [each.seed for each in store.results()] == [0]
    assert store.left_out().endswith("made with other code.")


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
    """Each failed run is started again in the moment after somebody has asked how it stands."""

    def state(self, folder: Path) -> State:
        found = super().state(folder)
        self.forget_error(folder)
        return found


def test_a_run_that_is_begun_again_while_somebody_looks_is_no_error(tmp_path: Path) -> None:
    store = BegunAgain(tmp_path / "runs")
    folder = store.create(config(), REVISION)
    for look in (store.standing, store.failure):
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
    assert {each.folder: each.metrics["accuracy"] for each in store.results()} == {first: 0.5, second: 0.6}
    (only,) = store.results([second])
    assert only.config["seed"] == 1
    assert "runs" not in only.config


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
