import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rankwise.config import InputError, RunConfig
from rankwise.report import html
from rankwise.runs.store import Store

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Text, pictures and addresses of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "action") and value]
        if tag == "img":
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(folder: Path) -> Page:
    return Page(html.write(folder).read_text(encoding="utf-8"))


def test_the_page_holds_everything_and_fetches_nothing(runs: Path) -> None:
    out = html.write(runs)
    assert out == runs / "report.html"
    text = out.read_text(encoding="utf-8")
    found = Page(text)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in found.addresses)
    assert not re.search(r"<(script|link|iframe)|@import|url\(", text)
    assert 'name="viewport"' in text
    for words in (
        "Where does rank belong?",
        "Three methods.",
        "One budget.",
        "18 of 18 runs finished",
        "simplex-lora rank=4",
        "331,776",
        "mean ± sd",
        "95 % interval",
        "not the official split",
        "Configuration",
        "Environment",
        "2.13.0",
    ):
        assert words in found.text


def test_the_pictures_are_the_ones_promised(runs: Path) -> None:
    found = page(runs)
    alts = [str(image["alt"]) for image in found.images]
    assert [alt.split(". ")[0].split(" by ")[0] for alt in alts[:4]] == [
        "Score against the parameters kept",
        "training loss",
        "accuracy during training",
        "f1 during training",
    ]
    assert alts[4].startswith("Rank of each site by step")  # one method moves its ranks, and only that one is drawn
    assert alts[5].startswith("Final ranks: encoder.layer.0.attention.self.query")
    assert len(alts) == 6
    for image in found.images:
        assert b"<svg" in base64.b64decode(str(image["src"]).partition(",")[2])


def test_the_same_runs_give_the_same_page(runs: Path, tmp_path: Path) -> None:
    assert html.write(runs, tmp_path / "a.html").read_bytes() == html.write(runs, tmp_path / "b.html").read_bytes()


def test_what_comes_from_a_run_is_escaped(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0,), title="<script>alert(1)</script>")
    failed = Store(folder).create(RunConfig(task="stdlib-module", seed=9), "x")
    (failed / "error.txt").write_text("<img src=x onerror=alert(2)> & co\n\nTraceback", encoding="utf-8")
    for result in folder.glob("*/result.json"):
        content = json.loads(result.read_text())
        content["splits"]["evaluation"][0]["note"] = '"><b>bold</b>'
        result.write_text(json.dumps(content))
    text = html.write(folder).read_text(encoding="utf-8")
    assert "<script" not in text and "<img src=x" not in text and "<b>bold" not in text
    assert "failed, <img src=x onerror=alert(2)> & co" in Page(text).text


def test_a_search_that_moved_nothing_is_said_to_have_moved_nothing(tmp_path: Path, make: Callable[..., Path]) -> None:
    found = page(make(tmp_path / "runs", seeds=(0,), moving=False))
    assert "all ranks stayed as they were (4)" in found.text
    assert not any(str(image["alt"]).startswith("Rank of each site") for image in found.images)


def test_agreement_between_seeds_is_counted(runs: Path) -> None:
    pattern = r"Over 3 seeds, (\d+) of 36 sites end away from their first rank in some seed; all seeds agree at (\d+)"
    found = re.search(pattern, page(runs).text)
    assert found
    ends = []
    for file in sorted(runs.glob("*simplex-lora-*/ranks.jsonl")):
        if "learning_rate: 0.003" in (file.parent / "run.yaml").read_text():
            ends.append(json.loads(file.read_text().splitlines()[-1])["ranks"])
    moved = [site for site in ends[0] if any(end[site] != 4 for end in ends)]
    assert [int(number) for number in found.groups()] == [
        len(moved),
        sum(ends[0][site] == ends[1][site] == ends[2][site] for site in moved),
    ]


def test_several_tasks_get_an_overview(tmp_path: Path, make: Callable[..., Path]) -> None:
    found = page(make(tmp_path / "runs", tasks=("stdlib-module", "cola"), seeds=(0,)))
    assert "All tasks, each method at its best learning rate" in found.text
    assert len([image for image in found.images if str(image["alt"]).startswith("Score")]) == 2


def test_texts_stand_side_by_side_escaped_and_shortened(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0, 1))
    for result in Store(folder).results():
        wrote = f"<script>{result['method']}</script>" if result["seed"] == 0 else "of another seed"
        rows = {
            "split": ["validation"] * 9 + ["test"],
            "idx": [*range(9), 0],
            "source": [f"<b>source</b> {place} " + "x" * (1000 if place == 2 else 1) for place in range(10)],
            "references": [["one & only"]] * 4 + [["first", "second"]] * 6,
            "prediction": [wrote] * 8 + ["", ""],
        }
        pyarrow.parquet.write_table(pyarrow.table(rows), result["folder"] / "predictions.parquet")
    out = html.write(folder).read_text(encoding="utf-8")
    found = Page(out)
    assert "What was written" in found.text and "<script>" not in out and "of another seed" not in found.text
    for words in ("<script>head</script>", "<script>lora</script>", "one & only", "references first second"):
        assert words in found.text
    assert "x … (1,016 characters in all)" in found.text
    assert [f"source</b> {place} " in found.text for place in range(9)].count(True) == 4


def test_pictures_of_masks_are_shown_once_a_method(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0, 1))
    for result in Store(folder).results():
        (result["folder"] / "masks.png").write_bytes(b"\x89PNG")
    found = page(folder)
    masks = [image for image in found.images if "makes of some images" in str(image["alt"])]
    assert len(masks) == 3 and {image["src"] for image in masks} == {"data:image/png;base64,iVBORw=="}


def test_unfinished_runs_are_listed_and_leave_no_number(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    store.create(RunConfig(task="cola", seed=1), "x")
    half = store.create(RunConfig(task="cola", seed=2), "x")
    (half / "metrics.jsonl").write_text('{"step": 0, "steps": 300}\n{"step": 10, "loss": 1.0}\n{"step": 11, "lo')
    found = page(tmp_path / "runs")
    assert "0 of 2 runs finished" in found.text
    assert "cola, lora, rate 0.001, seed 1: pending" in found.text
    assert "seed 2: stopped, step 10 of 300" in found.text
    assert "Results" not in found.text and not found.images


def test_a_finished_run_with_missing_curves_still_has_its_row(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0,))
    for name in ("metrics.jsonl", "ranks.jsonl", "env.json"):
        for path in folder.glob(f"*/{name}"):
            path.unlink()
    found = page(folder)
    assert "simplex-lora rank=4" in found.text
    assert len(found.images) == 1


def test_a_folder_without_runs_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        html.write(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        html.write(tmp_path / "nowhere")


def test_a_page_that_cannot_be_written_is_an_input_error(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        html.write(runs, tmp_path / "file" / "report.html")


def test_a_report_starts_without_torch(runs: Path) -> None:
    code = f"import sys; from rankwise.report import html; html.write({str(runs)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
