"""What the command line does, called from Python."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rankwise as rw
from asserts import refused
from rankwise.runs.store import Store
from rankwise.settings import load
from rankwise.sweep.check import schema
from rankwise.sweep.compare import Outcome
from rankwise.tasks import build, registry
from rankwise.tasks.custom import Custom
from runs import REVISION, config, finish, result

TINY = {"task": "stdlib-kind", "model": "random-bert", "max_length": 8, "train_rows": 24, "eval_rows": 16}
GRID = {**TINY, "max_steps": 1, "vary": {"method": ["lora", "head"], "seed": [0, 1, 2]}}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Path]]:
    """Sweeps that leave results without training: at how many jobs, and the folders."""
    found: list[tuple[int, Path]] = []

    def carry_out(store: Store, folders: list[Path], runner: Any) -> Outcome:
        for folder in folders:
            found.append((runner.jobs, folder))
            score = 0.8 if "lora" in folder.name else 0.6
            (folder / "result.json").write_text(json.dumps(result(folder, store.config(folder), score)))
        return Outcome(done=list(folders))

    monkeypatch.setattr("rankwise.sweep.plan.carry_out", carry_out)
    return found


def test_an_experiment_is_compared_by_one_call(sent: list[tuple[int, Path]], tmp_path: Path) -> None:
    file, runs = tmp_path / "grid.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(GRID))
    found = rw.compare(file, {"seed": [0, 1], "method.rank": 4}, runs=runs, jobs=3)
    assert (found.folder, found.code, found.left()) == (runs, 0, [])
    assert len(found.outcome.done) == 4 and {jobs for jobs, _ in sent} == {3}
    assert {json.dumps(each) for each in found.as_json()["done"]} == {json.dumps(folder.name) for _, folder in sent}
    assert len(found.rows) == len(found.best) == 2
    assert any("training the head only is 0.200 behind lora rank=4" in verdict for verdict in found.verdicts)
    assert found.verdicts[0] in found.text() and found.as_json()["findings"] == found.verdicts
    assert not (runs / "report.html").exists()
    assert found.write_page() == runs / "report.html" and (runs / "report.html").is_file()

    again = rw.report(str(runs))
    assert again.verdicts == found.verdicts and again.notes == found.notes
    assert again.write_page(tmp_path / "page.html") == tmp_path / "page.html"


def test_an_experiment_may_be_given_as_a_mapping(sent: list[tuple[int, Path]], tmp_path: Path) -> None:
    found = rw.compare(GRID, ["method=head"], runs=tmp_path)
    assert [each.name.rsplit("-", 1)[0] for each in found.outcome.done] == [f"stdlib-kind-head-{n}" for n in range(3)]


def test_a_run_is_trained_by_one_call_and_found_again(tmp_path: Path) -> None:
    given = {**TINY, "max_steps": 2, "method": {"name": "lora", "rank": 2}}
    found = rw.train(given, runs=tmp_path)
    assert found.folder.parent == tmp_path and (found.adapter / "adapter_model.safetensors").is_file()
    assert found.result["options"]["rank"] == 2 and "lora rank=2" in found.text()
    before = (found.folder / "result.json").stat().st_mtime_ns
    assert rw.train(found.folder).result == found.result == rw.train(given, {"runs": str(tmp_path)}).result
    assert (found.folder / "result.json").stat().st_mtime_ns == before
    assert rw.report(tmp_path).rows


def test_what_failed_is_told_with_what_to_do_about_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    folders = [store.create(config(seed=seed), REVISION) for seed in range(3)]
    for folder, lasting in zip(folders, (False, True, True), strict=True):
        store.note_error(folder, "no\n\nTraceback\n", refused=lasting)
    monkeypatch.setattr("rankwise.sweep.plan.carry_out", lambda store, folders, runner: Outcome(failed=folders))
    found = rw.retry(tmp_path)
    assert found.code == 3
    assert found.left() == [
        f"1 run failed; `rankwise retry {tmp_path}` carries it out again",
        "2 runs failed and would again until what their errors name is changed; "
        f"`rankwise status {tmp_path}` shows them",
    ]
    monkeypatch.setattr("rankwise.sweep.plan.carry_out", lambda store, folders, runner: Outcome(stopped=folders))
    found = rw.retry(tmp_path)
    assert (found.code, found.left()) == (75, ["3 runs were stopped; the same command goes on with them"])


def test_what_is_wrong_is_an_input_error_of_one_line(tmp_path: Path) -> None:
    finish(Store(tmp_path / "runs"), config(), 0.5)
    (tmp_path / "empty").mkdir()
    for call, words in {
        lambda: rw.compare(TINY): "these settings: has no `vary:`, so it is one run",
        lambda: rw.train(GRID): "these settings: has `vary:`, so it is an experiment",
        lambda: rw.compare(tmp_path / "no.yaml"): "there is no such file",
        lambda: rw.compare(GRID, runner="cloud"): "--runner cloud: there is no such runner",
        lambda: rw.compare(GRID, {"epoch": 3}, runs=tmp_path / "new"): 'did you mean "epochs"?',
        lambda: rw.compare(GRID, runs=tmp_path / "runs", reuse=True, repeat=True): "choose one",
        lambda: rw.train(): "task: is missing",
        lambda: rw.train(tmp_path / "runs", {"seed": 1}): "the settings of a run are in its run.yaml",
        lambda: rw.report(tmp_path / "empty"): "there is no run in it",
        lambda: rw.report(tmp_path / "missing"): "there is no such folder of runs",
        lambda: rw.retry(tmp_path / "missing"): "there is no such folder of runs",
    }.items():
        with pytest.raises(rw.InputError) as error:
            call()
        assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", registry())
def test_python_builds_the_task_that_a_file_asks_for(name: str, tmp_path: Path) -> None:
    """Objects can be given in place of the names and options in a file."""
    own = issubclass(registry()[name], Custom)
    given = {"name": name, "dataset": "rows.csv", "split": "test"} if own else {"name": name}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"task": given}))
    of_file = load(file, schema=schema()).task
    assert rw.task(given) == build(of_file)
    assert own or rw.task(name) == rw.task(given)
    with_path = {key: Path(value) if key == "dataset" else value for key, value in given.items() if key != "name"}
    assert rw.task({"type": name, **with_path}) == rw.task(rw.task(given)) == rw.task(given)
    method = rw.SoRA(rank=3, gates="normal")
    config = load({"task": rw.task(given), "method": method}, schema=schema())
    assert build(config.task) == build(of_file) and config.method == {"name": "sora", **dataclasses.asdict(method)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("colla", "task = 'colla': no such task (did you mean \"cola\"?); known: "),
        ({"type": "pair", "dataste": "x"}, 'task.dataste: pair has no such option (did you mean "dataset"?)'),
        ({"type": "pair", "dataset": "x", "split": 3}, "task.split = 3: expected string: put it in quotes"),
        ({"dataset": "x"}, "task: needs a name, as in `task: {name: mrpc}`"),
        (3, "task = 3: expected a name or a mapping, as in `task: {name: mrpc}`"),
    ],
)
def test_python_refuses_a_task_as_a_file_does(given: Any, message: str) -> None:
    assert refused(lambda: rw.task(given)).startswith(message)
    assert refused(lambda: load({"task": given}, schema=schema())).startswith(message)


def test_an_experiment_of_objects_is_that_of_their_names(sent: list[tuple[int, Path]], tmp_path: Path) -> None:
    objects = {**GRID, "task": rw.task("stdlib-kind"), "vary": {"method": [rw.LoRA(), rw.Head()], "seed": [0]}}
    names = {**GRID, "vary": {"method": ["lora", "head"], "seed": [0]}}
    found = [rw.compare(each, runs=tmp_path / str(place)) for place, each in enumerate((objects, names))]
    assert len({tuple(folder.name for folder in each.outcome.done) for each in found}) == 1


def test_rooms_that_are_called_are_rooms_all_the_same() -> None:
    import rankwise.report.html
    import rankwise.train.model

    assert callable(rw.train) and callable(rw.report)
    assert rankwise.train.model.build and rankwise.report.html.write


@pytest.mark.large
def test_public_names_are_looked_up_on_first_use() -> None:
    script = (
        "import sys, rankwise as rw\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert {'LoRA', 'compare', 'train', 'report', '__version__'} <= set(dir(rw)) == set(rw.__all__)\n"
        "from rankwise import *\n"
        "assert all(getattr(rw, name) is globals()[name] or name in ('train', 'report') for name in rw.__all__)\n"
        "try: rw.nothing\n"
        "except AttributeError: print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
