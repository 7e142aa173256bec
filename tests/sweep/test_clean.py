"""What a folder of runs need not keep is deleted, and nothing else."""

import fcntl
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise.errors import InputError
from rankwise.runs.store import Store
from rankwise.sweep.clean import remove, unneeded
from runs import REVISION, config, finish

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One run of each kind, with the files that it leaves."""
    store = Store(tmp_path / "runs")
    done = finish(store, config(), 0.5)
    foreign = finish(store, config(seed=1), 0.5)
    failed, stopped, waiting = (store.create(config(seed=seed), REVISION) for seed in (2, 3, 4))
    store.note_error(failed, "no space left on device\n\nTraceback\n")
    (failed / "log.txt").write_text("…\n")
    (stopped / "metrics.jsonl").write_text('{"step": 1, "steps": 4}\n')
    (stopped / "checkpoint-1").mkdir()
    (stopped / "written.json").write_text('["checkpoint-1"]')
    (foreign / "adapter").mkdir()
    (foreign / "adapter" / "adapter_config.json").write_text("{}")
    names = [each.name for each in (done, failed, stopped, waiting)]
    (store.folder / "plan.json").write_text(json.dumps(names))
    return store


def kinds(store: Store, *only: str) -> dict[int, str]:
    """Seed of each run that need not be kept -> why."""
    return {store.config(each.folder).seed: each.kind for each in unneeded(store, only)}


def test_runs_that_failed_were_stopped_or_are_foreign_need_not_be_kept(store: Store) -> None:
    assert kinds(store) == {1: "foreign", 2: "failed", 3: "stopped"}
    assert kinds(store, "failed", "stopped") == {2: "failed", 3: "stopped"}
    with pytest.raises(InputError, match=r'--only fail: no such kind \(did you mean "failed"\?\); known:'):
        unneeded(store, ["fail"])


def test_a_rate_that_diverged_was_found_out_and_stays(store: Store) -> None:
    tried = store.create(config(seed=5, tuning=0.1), REVISION)
    store.note_error(tried, "loss is nan\n\nTraceback\n", diverged=True)
    store.plan([tried])
    assert 5 not in kinds(store)


def test_cleaning_lists_what_it_deletes_and_leaves_the_rest(store: Store, cli: Cli) -> None:
    code, out, err = cli("clean", store.folder, "--yes")
    assert (code, err) == (0, "deleted 2 unfinished runs and 1 finished run\n")
    assert [line.split()[0].rsplit("-", 2)[1] for line in out.splitlines()[2:]] == ["1", "2", "3"]
    assert "no space left on device" in out and "not part of the folder's current experiment" in out
    assert sorted(store.config(folder).seed for folder in store.folders()) == [0, 4]
    assert len([path for path in store.folder.iterdir() if path.is_dir()]) == 2
    assert cli("clean", store.folder, "--yes", "--json") == (
        0,
        '{\n "deleted": []\n}\n',
        f"{store.folder}: nothing to delete\n",
    )


@pytest.mark.parametrize(("answer", "left"), [("y\n", 2), ("yes\n", 2), ("n\n", 5), ("\n", 5), ("", 5)])
def test_it_asks_on_a_terminal(answer: str, left: int, store: Store, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.StringIO(answer)
    typed.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", typed)
    code, _, err = cli("clean", store.folder)
    assert code == 0 and err.startswith("delete 2 unfinished runs and 1 finished run? [y/N]")
    assert len(store.folders()) == left


def test_without_a_terminal_nothing_is_deleted_unasked(store: Store, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, _, err = cli("clean", store.folder)
    assert code == 2 and err == (
        "rankwise: delete 2 unfinished runs and 1 finished run? No terminal to answer on: give --yes to go ahead\n"
    )
    assert len(store.folders()) == 5
    assert cli("clean", store.folder / "missing", "--yes")[0] == 2
    assert cli("clean", store.folder, "--only", "done", "--yes")[0] == 2
    assert len(store.folders()) == 5


def test_what_no_run_has_written_stays(store: Store, cli: Cli) -> None:
    failed = next(each.folder for each in unneeded(store, ["failed"]))
    (failed / "notes.txt").write_text("mine")
    (failed / "notes.tsv").write_text("mine\talone\n")
    (failed / "CoLA.tsv").write_text("index\tprediction\n0\t1\n")
    (failed / "checkpoint-7").mkdir()
    code, _, err = cli("clean", store.folder, "--only", "failed", "--yes")
    assert code == 0 and f"{failed.name}: kept checkpoint-7, notes.tsv, notes.txt, not written by rankwise\n" in err
    assert sorted(path.name for path in failed.iterdir()) == ["checkpoint-7", "notes.tsv", "notes.txt"]
    assert failed not in store.folders()


def test_runs_that_are_linked_or_of_a_damaged_plan_stay(store: Store, tmp_path: Path) -> None:
    other = finish(Store(tmp_path / "others"), config(seed=8), 0.5)
    (store.folder / other.name).symlink_to(other)
    assert 8 not in kinds(store)
    (store.folder / "plan.json").write_text("{}")
    assert kinds(store) == {2: "failed", 3: "stopped"}


def test_a_run_that_is_at_work_is_left_alone(store: Store) -> None:
    stopped = next(each.folder for each in unneeded(store, ["stopped"]))
    with (stopped / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert kinds(store, "stopped") == {}
        with pytest.raises(InputError, match="another process is at work on this run"):
            remove(stopped)
    assert kinds(store, "stopped") == {3: "stopped"} and not remove(stopped) and not stopped.exists()
