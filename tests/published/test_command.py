"""`rankwise papers`, and ours next to the printed numbers in `rankwise report`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise import methods, tasks
from rankwise.published import papers
from rankwise.runs.store import Store
from rankwise.settings import Schema, load
from runs import config, finish

Cli = Callable[..., str]


@pytest.fixture
def cli(cli: Callable[..., tuple[int, str, str]]) -> Cli:
    """What a command that goes well prints."""

    def call(*arguments: object) -> str:
        code, out, err = cli(*arguments)
        assert code == 0, err
        return out

    return call


def test_papers_lists_every_table_with_its_experiment(cli: Cli) -> None:
    lines = [line.split() for line in cli("papers").splitlines()]
    found = json.loads(cli("papers", "--json"))
    for paper, told in zip(papers(), found, strict=True):
        assert told["source"] == paper.source and len(told["tables"]) == len(paper.tables)
        for table in paper.tables:
            [line] = [line for line in lines if line[:1] == [table.id]]
            assert line[-2:] == [str(table.numbers), table.experiment]
    cells = {table["id"]: table["rows"] for paper in found for table in paper["tables"]}
    assert cells["sora/glue"][-1]["cells"][-1] == "89.36"


@pytest.mark.parametrize("named", [True, False])
def test_report_shows_them_where_the_experiment_names_a_table(named: bool, cli: Cli, tmp_path: Path) -> None:
    store = Store(tmp_path)
    finish(store, config(task="cola", method={"name": "bitfit"}), 0.5, benchmark={"name": "GLUE", "score": 0.5})
    finish(store, config(task="rte", method={"name": "bitfit"}), 0.7, benchmark={"name": "GLUE", "score": 0.7})
    content = {"task": "cola", "vary": {"seed": [0]}} | ({"published": {"tables": ["sora/glue"]}} if named else {})
    store.note(load(content, [], Schema(methods.registry(), tasks.registry())))  # type: ignore[arg-type]
    shown, found = cli("report", tmp_path), json.loads(cli("report", tmp_path, "--json"))
    assert ("sora/glue: ours next to Ding et al. 2023" in shown) == ("published" in found) == named
    if named:
        [average] = [c for c in found["published"] if (c["row"], c["column"]) == ("BitFit", "Average")]
        assert (average["mean"], average["published"]) == (pytest.approx(60.0), "85.18")
