"""Settings below settings, typed on the command line and varied."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts with two columns that could be learnt."""
    for name, count in (("train", 40), ("validation", 12)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            rows = ([f"{name} number {n}", "ab"[n % 2], "xyz"[n % 3]] for n in range(count))
            csv.writer(file).writerows([["body", "kind", "mood"], *rows])
    return tmp_path


def test_a_column_is_chosen_varied_and_overridden(data: Path, cli: Cli) -> None:
    own = [f"task.dataset={data}", "task.columns.text=body", "model=random-bert", f"runs={data / 'runs'}"]
    single = ["train", "task.type=classification", *own, "task.columns.label=kind", "--dry-run", "--json"]
    assert json.loads(cli(*single)[1])["task"]["columns"] == {"text": "body", "label": "kind"}

    file = data / "columns.yaml"
    task = {"type": "classification", "dataset": str(data), "columns": {"text": "body"}}
    vary = {"task.columns.label": ["kind", "mood"], "seed": [0]}
    file.write_text(yaml.safe_dump({"task": task, "model": "random-bert", "runs": str(data / "runs"), "vary": vary}))
    planned = json.loads(cli("compare", file, "--dry-run", "--json")[1])
    assert [each["config"]["task"]["columns"]["label"] for each in planned] == ["kind", "mood"]
    [one] = json.loads(cli("compare", file, "task.columns.label=mood", "--dry-run", "--json")[1])
    assert one["config"]["task"]["columns"] == {"text": "body", "label": "mood"}

    file.write_text(yaml.safe_dump({"model": "random-bert", "vary": {"task": [{**task, "columns": {"text": "body"}}]}}))
    [one] = json.loads(cli("compare", file, "task.columns.label=kind", f"runs={data}", "--dry-run", "--json")[1])
    assert one["config"]["task"]["columns"] == {"text": "body", "label": "kind"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.columns.lable=kind", 'did you mean "label"'),
        ("method.rank.x=1", "method.rank = {'x': 1}: expected integer"),
        ("epochs.x=1", "epochs.x: only method, task, trainer, vary, tune and report have keys below them"),
        ("task.colums.label=kind", 'task.colums: classification has no such option (did you mean "columns"?)'),
    ],
)
def test_a_key_that_nobody_has_is_refused(setting: str, message: str, data: Path, cli: Cli) -> None:
    own = ["task.type=classification", f"task.dataset={data}", "task.columns.text=body", "task.columns.label=kind"]
    code, out, err = cli("train", *own, setting, "model=random-bert", f"runs={data / 'runs'}", "--dry-run")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
    assert not (data / "runs").exists()
