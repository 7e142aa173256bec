"""The command line on folders of runs in which something else lies where our files should be."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from odd_files import ODD, a_pipe
from rankwise.report import figures, tables
from rankwise.report.pages import pages
from rankwise.results.summary import Summary
from rankwise.runs.store import FILES, Store
from rankwise.settings import Experiment, Published
from rankwise.sweep.watch import Watch
from runs import config, finish_with_curves, predict

Cli = Callable[..., tuple[int, str, str]]

NAMES = sorted({*FILES, "run.yaml", "log.txt", "sent.json", "adapter", "model", "../experiment.yaml"})
"""Every file that a run folder may hold, and that of the folder above."""


def whole(folder: Path) -> Path:
    """A finished run with every file that a report looks at, and one beside it; returns the first."""
    store = Store(folder)
    published = Published(tables=["lora/e2e_gpt2_medium"])
    about = {"title": "Two", "text": "Of lora.", "reference": {"name": "lora"}}
    store.note(
        Experiment(
            name="x", base={"task": "x"}, vary={"seed": [0]}, report=about, published=published, runs=str(folder)
        )
    )
    runs = [finish_with_curves(store, config(task="stdlib-kind", seed=seed), 0.7) for seed in (0, 1)]
    for run in runs:
        predict(run, [0, 1, 1], [0, 1, 0])
    return runs[0]


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("place", "command"),
    [
        pytest.param(place, command, id=f"{name}-{command}", marks=[pytest.mark.large] * ((place + turn) % 4 != 0))
        for place, name in enumerate(NAMES)
        for turn, command in enumerate(("status", "report"))
    ],
)
def test_whatever_lies_there_is_neither_waited_for_nor_a_traceback(
    place: int, command: str, cli: Cli, tmp_path: Path
) -> None:
    for odd in ODD:
        run = whole(tmp_path / odd.__name__) / NAMES[place]
        run.unlink(missing_ok=True)
        odd(run)
        code, out, err = cli(command, tmp_path / odd.__name__)
        assert err.count("\n") == (code == 2 or (code == 0 and "experiment.yaml" in err)), err
        assert out if code == 0 else code == 2
    page = ["report", tmp_path / ODD[place % len(ODD)].__name__, "--html", tmp_path / "page.html"]
    assert cli(*page)[0] in (0, 2)
    assert cli("train", tmp_path / a_pipe.__name__ / run.parent.name)[0] in (0, 2)


FOREIGN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every place in a value of JSON, as (container, key)."""
    if not isinstance(content, dict | list):
        return []
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    return [(content, key) for key in keys] + [place for key in keys for place in places(content[key])]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("two") / "runs")


def text_of(file: Path, draw: st.DataObject) -> str:
    """The file with one value of it changed, or a line of it, or something else altogether."""
    text, change = file.read_text(), draw.draw(FOREIGN)
    how = draw.draw(st.sampled_from(["value", "cut", "other", "deep"]))
    if how == "deep":
        return "[" * (1000 if file.suffix == ".yaml" else 100_000)
    if how == "cut":
        return text[: draw.draw(st.integers(0, len(text)))]
    if how == "other":
        return json.dumps(change)
    lines = file.suffix == ".jsonl"
    content = [json.loads(line) for line in text.splitlines()] if lines else yaml.safe_load(text)
    container, key = draw.draw(st.sampled_from(places(content)))
    container[key] = change
    return "".join(json.dumps(line) + "\n" for line in content) if lines else json.dumps(content)


@pytest.mark.parametrize(
    "name",
    [
        "result.json",
        *(
            pytest.param(name, marks=pytest.mark.large)
            for name in ("run.yaml", "metrics.jsonl", "ranks.jsonl", "../experiment.yaml")
        ),
    ],
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(data=st.data())
def test_a_damaged_run_is_a_row_and_the_rest_is_shown(
    name: str, data: st.DataObject, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (two / name).read_bytes()
    (two / name).write_text(text_of(two / name, data))
    try:
        store = Store(two.parent)
        rows = Watch(store).look().rows()
        assert len(rows) == 2 and any("stdlib-kind-lora-1" in row[0] and row[2] == "done" for row in rows)
        summary = Summary.of_store(store)
        assert "lora" in summary.text()
        for form in (tables.markdown, tables.csv, tables.latex):
            assert form(summary.best)
        found = pages(store, store.folders(), store.results(), summary.rows)
        assert len(found) == 2 and json.dumps(summary.as_json())
        for row in summary.best:
            figures.of_ranks(row)
    finally:
        (two / name).write_bytes(whole)


@contextmanager
def as_a_user() -> Iterator[Path]:
    """A folder of somebody for whom permissions count, which they do not for root."""
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid():
            yield Path(name)
            return
        os.chown(name, 65534, -1)
        os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


def test_a_folder_that_cannot_be_looked_into_or_has_no_settings_is_listed_as_such(cli: Cli) -> None:
    with as_a_user() as folder:
        runs = folder / "runs"
        run = whole(runs)
        (runs / "pictures").mkdir()
        other, shut, unread = (shutil.copytree(run, runs / name) for name in ("moved", "shut", "unread"))
        (other / "run.yaml").unlink()
        (unread / "run.yaml").chmod(0)
        shut.chmod(0)
        try:
            code, out, err = cli("status", runs)
            assert (code, err) == (0, "")
            assert "5 runs, 3 damaged, 2 done" in out and "pictures" not in out
            said = {line.split()[0]: line for line in out.splitlines()[1:]}
            assert "damaged" in said["moved"] and "there is no run.yaml in it" in said["moved"]
            assert "run.yaml: cannot be read: permission denied" in said["unread"]
            assert "cannot be read: permission denied" in said["shut"]
            assert cli("report", runs)[0] == 0
            assert [cli("train", each)[0] for each in (other, shut, unread)] == [2, 2, 2]
            runs.chmod(0)
            assert [cli(command, runs)[0] for command in ("status", "report")] == [2, 2]
        finally:
            runs.chmod(0o755)
            shut.chmod(0o755)


def test_a_damaged_experiment_hides_no_result(cli: Cli, tmp_path: Path) -> None:
    run = whole(tmp_path / "runs")
    (run.parent / "experiment.yaml").write_text("report: 5")
    code, out, err = cli("report", run.parent)
    assert code == 0 and "lora rank=4" in out
    assert "experiment.yaml is damaged" in err and err.count("\n") == 1


def test_no_text_of_others_reaches_the_terminal_as_a_command(cli: Cli, tmp_path: Path) -> None:
    """A title, a colour, a clear screen and a text turned round: in names of folders, errors, settings and keys."""
    evil = "\x1b]0;x\x07\x1b[31m\x9b2J\u202e"
    run = whole(tmp_path / "runs")
    other = shutil.copytree(run, run.parent / f"a{evil}\nb")
    (other / "result.json").unlink()
    (other / "error.txt").write_text(f"{evil} happened\n")
    (run / "metrics.jsonl").unlink()
    damaged = json.loads((run / "result.json").read_text())
    damaged |= {"task": f"t{evil}", "notes": [evil], "score": evil, "metrics": {evil: 0.5}}
    (run / "result.json").write_text(json.dumps(damaged))
    (tmp_path / "x.yaml").write_text(json.dumps({"task": "stdlib-kind", evil: 1}), encoding="utf-8")
    forms = ("--md", "--csv", "--latex", "--json")
    commands = [["status"], ["status", "--json"], ["report"], *(["report", form] for form in forms)]
    said = [cli(command[0], run.parent, *command[1:]) for command in commands]
    said += [cli("train", tmp_path / "x.yaml"), cli("train", f"task={evil}")]
    for code, out, err in said:
        assert code in (0, 2)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out + err)
    assert any("x1b" in out for _, out, _ in said)
