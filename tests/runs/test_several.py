"""Several folders of runs read as one."""

import shutil
from pathlib import Path

import pytest
import yaml

from rankwise.errors import InputError
from rankwise.report import html
from rankwise.results.summary import Summary
from rankwise.runs.several import Several
from rankwise.runs.store import Store
from runs import config, finish

HEAD = {"name": "head"}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """LoRA in the one folder, the head in the other, and one run of LoRA in both."""
    for seed in range(3):
        finish(Store(tmp_path / "a"), config(seed=seed), 0.8 + seed / 100)
        finish(Store(tmp_path / "b"), config(seed=seed, method=HEAD), 0.6 + seed / 90)
    both = Store(tmp_path / "a").place(config(seed=1))
    shutil.copytree(both, tmp_path / "b" / both.name)
    return [tmp_path / "a", tmp_path / "b"]


def test_methods_of_two_folders_are_compared_and_a_run_in_both_counts_once(two: list[Path]) -> None:
    summary = Summary.of_store(Several(two))
    assert [(row.method, row.n) for row in summary.rows] == [("head", 3), ("lora rank=4", 3)]
    [contrast] = summary.contrasts
    assert (contrast.ours.method, contrast.theirs.method, contrast.gap.n) == ("head", "lora rank=4", 3)
    assert "1 run is in more than one of the folders and counted once." in summary.notes


def test_the_copy_that_is_finished_counts(two: list[Path]) -> None:
    (Store(two[0]).place(config(seed=1)) / "result.json").unlink()
    assert Summary.of_store(Several(two)).rows[1].n == 3


def test_what_the_experiments_say_of_reports_is_put_together(two: list[Path]) -> None:
    for folder, tables, differs in zip(two, (["lora/e2e_gpt2_medium"], ["sora/glue"]), ("one epoch", ""), strict=True):
        about = {"published": {"tables": tables, "differs": differs}, "report": {"title": folder.name}}
        (folder / "experiment.yaml").write_text(yaml.safe_dump(about))
    content = yaml.safe_load((two[1] / "experiment.yaml").read_text()) | {"report": {"reference": HEAD}}
    (two[1] / "experiment.yaml").write_text(yaml.safe_dump(content))
    summary = Summary.of_store(Several(two))
    assert summary.reference == HEAD and {each.table for each in summary.beside} == {
        "lora/e2e_gpt2_medium",
        "sora/glue",
    }
    (two[0] / "experiment.yaml").write_text("report: 3")
    assert "experiment.yaml is damaged" in Summary.of_store(Several(two)).damage


def test_runs_of_a_chain_find_what_they_begin_with_in_their_own_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        first = config(followed=True, epochs=1.0 if name == "a" else 2.0)
        finish(Store(tmp_path / name), first, 0.5)
        finish(Store(tmp_path / name), config(after=first.id), 0.6)
    results = Several([tmp_path / "a", tmp_path / "b"]).results()
    assert sorted(stage["epochs"] for result in results for stage in result.lineage) == [1.0, 2.0]


def test_a_page_of_two_folders_has_the_runs_of_both(two: list[Path], tmp_path: Path) -> None:
    text = html.write(Several(two), tmp_path / "page.html").read_text()
    assert "<title>Runs in a, b</title>" in text and "6 of 6 runs finished" in text


def test_a_folder_without_runs_is_named(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: there is no run in it"):
        Several([*two, tmp_path / "empty"]).folders()
