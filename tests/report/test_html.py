import base64
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from rankwise.errors import InputError
from rankwise.report import figures, html
from rankwise.runs.store import Store
from rankwise.settings import RunConfig
from runs import config, finish_with_curves, tune, write_lines, write_runs
from runs import finish as made_up

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Text, pictures, tags and addresses of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.anchors: list[str] = []
        self.tags: Counter[str] = Counter()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        self.anchors += [found["id"]] if found.get("id") else []
        self.addresses += [value for key, value in attrs if key in ("src", "href", "action") and value]
        if tag == "img":
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(folder: Path) -> Page:
    return Page(html.write(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of runs that no test changes, in their folder."""
    runs = write_runs(tmp_path_factory.mktemp("written") / "quickstart")
    out = html.write(runs)
    assert out == runs / "report.html"
    return out


@pytest.fixture
def text(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def test_the_page_holds_everything_and_fetches_nothing(text: str) -> None:
    found = Page(text)
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in found.addresses)
    assert not re.search(r"<(link|iframe)|@import|url\(", text) and found.tags["script"] == 1
    assert 'name="viewport"' in text
    for words in (
        "Where does rank belong?",
        "Three methods.",
        "One budget.",
        "18 of 18 runs finished",
        "simplex-lora rank=4",
        "simplex-lora rank=4: ranks changed at 17, 17, 17 of 36 sites (seeds 0, 1, 2), and ω moved by up to "
        "2.30, 2.30, 2.30 ranks.",
        "331,776",
        "mean ± sd",
        "95 % interval",
        "3 ( 0 , 1 , 2 )",
        "not the official split",
        "Configuration",
        "Environment",
        "2.13.0",
    ):
        assert words in found.text


def test_the_pictures_are_the_ones_promised(text: str) -> None:
    found = Page(text)
    alts = [str(image["alt"]) for image in found.images]
    assert [re.split(r"\. | by optimizer| at some", alt)[0] for alt in alts] == [
        "Score against the parameters kept",
        "Score by learning rate",
        "Score against the time of a run and its peak memory",
        "training loss",
        "accuracy during training",
        "f1 during training",
        "Rank of each site by step",  # one method moves its ranks, and only that one is drawn
        "Ranks by projection and layer",
        alts[-1].split(". ")[0],
    ]
    assert alts[-1].startswith("Final ranks: encoder.layer.0.attention.self.query")
    for image in found.images:
        assert b"<svg" in base64.b64decode(str(image["src"]).partition(",")[2])


def test_the_same_runs_give_the_same_page(written: Path, tmp_path: Path) -> None:
    assert html.write(written.parent, tmp_path / "again.html").read_bytes() == written.read_bytes()


def test_what_comes_from_a_run_is_escaped(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0,), title="<script>alert(1)</script>")
    failed = Store(folder).create(RunConfig(task="stdlib-module", seed=9), "x")
    (failed / "error.txt").write_text("<img src=x onerror=alert(2)> & co\n\nTraceback", encoding="utf-8")
    for result in folder.glob("*/result.json"):
        content = json.loads(result.read_text())
        content["splits"]["evaluation"][0]["note"] = '"><b>bold</b>'
        result.write_text(json.dumps(content))
    text = html.write(folder).read_text(encoding="utf-8")
    assert Page(text).tags["script"] == 1 and "<img src=x" not in text and "<b>bold" not in text
    assert "failed, <img src=x onerror=alert(2)> & co" in Page(text).text


def test_what_is_between_backticks_is_code(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0,))
    for seed, error in ((8, "`<b>` or `x`"), (9, "one ` alone <b>")):
        failed = Store(folder).create(RunConfig(task="stdlib-module", seed=seed), "x")
        (failed / "error.txt").write_text(error)
    text = html.write(folder).read_text(encoding="utf-8")
    assert "so scores are slightly too high; use <code>tune:</code> to avoid this." in text
    assert "<code>&lt;b&gt;</code> or <code>x</code>" in text and "one ` alone &lt;b&gt;" in text


def test_a_search_that_moved_nothing_is_said_to_have_moved_nothing(tmp_path: Path, make: Callable[..., Path]) -> None:
    found = page(make(tmp_path / "runs", seeds=(0,), moving=False))
    assert "all ranks stayed as they were (4)" in found.text
    assert not any(str(image["alt"]).startswith("Rank of each site") for image in found.images)


def test_agreement_between_seeds_is_counted(written: Path, text: str) -> None:
    pattern = (
        r"(\d+) of 36 layers changed rank in at least one of 3 seeds; the seeds agree on (\d+), so do not read much "
        r"into the picture\."
    )
    found = re.search(pattern, Page(text).text)
    assert found
    ends = []
    for file in sorted(written.parent.glob("*simplex-lora-*/ranks.jsonl")):
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
    assert len([image for image in found.images if str(image["alt"]).startswith("Score against the param")]) == 2


def test_texts_stand_side_by_side_escaped_and_shortened(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0, 1))
    for result in Store(folder).results():
        wrote = f"<script>{result.method}</script>" if result.seed == 0 else "of another seed"
        rows = {
            "split": ["validation"] * 9 + ["test"],
            "idx": [*range(9), 0],
            "source": [f"<b>source</b> {place} " + "x" * (1000 if place == 2 else 1) for place in range(10)],
            "references": [["one & only"]] * 4 + [["first", "second"]] * 6,
            "prediction": [wrote] * 8 + ["", ""],
        }
        pyarrow.parquet.write_table(pyarrow.table(rows), result.folder / "predictions.parquet")
    out = html.write(folder).read_text(encoding="utf-8")
    found = Page(out)
    shown, _, each_run = found.text.rpartition("Every run")
    assert "What was written" in shown and found.tags["script"] == 1 and "of another seed" not in shown
    assert "written of another seed" in each_run
    for words in ("<script>head</script>", "<script>lora</script>", "one & only", "references first second"):
        assert words in found.text
    assert "x … (1,016 characters in all)" in found.text
    assert [f"source</b> {place} " in shown for place in range(9)].count(True) == 4


def test_pictures_of_masks_are_shown_once_a_method(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0, 1))
    for result in Store(folder).results():
        (result.folder / "masks.png").write_bytes(b"\x89PNG")
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
    assert "Our numbers next to the published ones" not in found.text and not found.images


def test_a_finished_run_with_missing_curves_still_has_its_row(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0,))
    for name in ("metrics.jsonl", "ranks.jsonl", "env.json"):
        for path in folder.glob(f"*/{name}"):
            path.unlink()
    found = page(folder)
    assert "simplex-lora rank=4" in found.text
    assert len(found.images) == 3


def test_every_run_has_a_section_that_its_row_links_to(written: Path, text: str) -> None:
    found = Page(text)
    links = [address.removeprefix("#") for address in found.addresses if address.startswith("#run-")]
    sections = [anchor for anchor in found.anchors if anchor.startswith("run-")]
    assert len(sections) == len(set(sections)) == 18 and set(links) == set(sections)
    assert {address[1:] for address in found.addresses if address.startswith("#")} <= set(found.anchors)
    result = min(Store(written.parent).results(), key=lambda each: each.folder)
    said = found.text.rpartition("Every run")[2]
    assert said.count("ranks changed at 17 of 36 sites, and ω moved by up to 2.30 ranks.") == 6
    assert f"accuracy {result.metrics['accuracy']:.4f}" in said and "train_rows: 4800" in said


def test_the_section_of_a_failed_run_holds_the_end_of_its_error(tmp_path: Path) -> None:
    failed = Store(tmp_path / "runs").create(RunConfig(task="cola", seed=3), "x")
    (failed / "error.txt").write_text("it broke\n\n" + "far away\n" * 5000 + "the <last> line\n", encoding="utf-8")
    found = page(tmp_path / "runs")
    assert found.text.count("far away") < 1000 and "the <last> line" in found.text
    assert "cola, lora, rate 0.001, seed 3: failed, it broke" in found.text and "1 failed" in found.text


def test_a_classifier_names_the_rows_it_got_wrong(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "runs", seeds=(0,))
    for result in Store(folder).results():
        rows = {"split": ["v"] * 30 + ["w"], "idx": [*range(31)], "label": [1] * 31, "prediction": [1] * 5 + [0] * 26}
        pyarrow.parquet.write_table(pyarrow.table(rows), result.folder / "predictions.parquet")
    text = page(folder).text
    assert "25 of 30 rows answered wrong" in text
    assert "label): 5 (0 for 1), 6 (0 for 1)" in text and "14 (0 for 1)." in text and "15 (0 for 1)" not in text


def test_ours_stands_beside_the_paper(runs: Path, tmp_path: Path) -> None:
    method = {"name": "lora", "rank": 4, "alpha": 32.0, "targets": ["c_attn.q", "c_attn.v"]}
    metrics, of_run = {"bleu": 69.0}, config(task="e2e", method=method)
    made_up(Store(tmp_path), of_run, 0.0, score="bleu", metrics=metrics, model="openai-community/gpt2-medium")
    tables = {"published": {"tables": ["lora/e2e_gpt2_medium"], "differs": "a <small> run"}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(tables))
    found = page(tmp_path)
    assert "GPT-2 M LoRA BLEU lora rank=4 69.00 1 4,000 3,992 70.4 ± .1 0.35M" in found.text
    assert "ours: a <small> run" in found.text
    assert "published" in found.anchors and "published" not in page(runs).anchors


def test_the_rates_that_were_tried_are_shown_apart_from_what_is_reported(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tune(store, {1e-4: 0.6, 1e-3: 0.8, 1e-2: 0.7}, 1e-3, budget=4_000)
    tune(store, {1e-3: 0.4, 1e-2: 0.3}, 1e-3, method={"name": "head"})
    failed = store.create(config(learning_rate=1.0, tuning=0.1, seed=7), "0123456789ab")
    store.note_error(failed, "loss is nan\n\nTraceback\n", diverged=True)
    found = page(tmp_path)
    assert "Learning rates tried" in found.text
    assert "lora rank=4 0.001 1 0.800 chosen lora rank=4 0.01 1 0.700" in found.text
    [alt] = [str(image["alt"]) for image in found.images if "by learning rate" in str(image["alt"])]
    assert "accuracy on train_held_out: " in alt
    assert "lora rank=4: 0.600 at 0.0001, 0.800 at 0.001, 0.700 at 0.01, chosen 0.001" in alt
    assert "cola, lora, rate 0.01, seed 7, to choose a rate: accuracy 0.7000" in found.text
    assert "cola, lora, rate 1, seed 7, to choose a rate : loss is nan" in found.text
    assert "of budget" in found.text and "100.9%" in found.text and "outside" in found.text


def test_rates_of_methods_that_were_not_tuned_are_another_picture(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tune(store, {1e-4: 0.6, 1e-3: 0.8}, 1e-3)
    for rate in (1e-3, 1e-2):
        made_up(store, config(method={"name": "head"}, learning_rate=rate), rate)
    alts = [str(image["alt"]) for image in page(tmp_path).images if "by learning rate" in str(image["alt"])]
    assert sorted(alt.split(": ")[0] for alt in alts) == [
        "Score by learning rate. accuracy",
        "Score by learning rate. accuracy on train_held_out",
    ]


def test_several_ranks_and_rates_are_drawn_apart(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for rank in (1, 4):
        for rate in (1e-4, 1e-3):
            for init in ("kaiming", "svd"):
                method = {"name": "lora-fa", "rank": rank, "init": init}
                finish_with_curves(
                    store, RunConfig(task="mrpc", method=method, learning_rate=rate), 0.7, parameters=rank * 1000
                )
    alts = [str(image["alt"]) for image in page(tmp_path / "runs").images]
    assert sum(alt.endswith("a panel for each rank and learning rate") for alt in alts) == 2  # loss and accuracy


def test_sizes_of_a_method_are_one_family_and_other_options_are_not() -> None:
    methods = ["lora rank=1 init=svd", "lora rank=4 init=svd", "lora rank=4 init=kaiming", "head"]
    assert list(figures.families(methods).values()) == ["lora init=svd"] * 2 + ["lora rank=4 init=kaiming", "head"]
    with_alpha = [f"lora rank={rank} alpha={2 * rank}" for rank in (1, 2)]
    assert set(figures.families(with_alpha).values()) == {"lora"}
    apart = [f"lora rank={rank} alpha={alpha}" for rank in (1, 2) for alpha in (1, 2)]
    assert set(figures.families(apart).values()) == {"lora alpha=1", "lora alpha=2"}


def test_a_thousand_runs_make_a_page_of_a_few_megabytes(text: str) -> None:
    sections = text.partition('<h2 id="runs">')[2].partition("</main>")[0]
    assert len(sections) / 18 < 6000


def test_a_score_or_loss_that_is_no_number_leaves_no_picture_but_stays_in_the_table(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for rate in (1e-4, 1e-3):
        folder = finish_with_curves(store, RunConfig(task="mrpc", learning_rate=rate), float("nan"))
        write_lines(folder / "metrics.jsonl", [{"step": step, "loss": float("inf")} for step in (1, 2, 3)])
    found = page(tmp_path / "runs")
    assert "nan" in found.text and not found.images


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
