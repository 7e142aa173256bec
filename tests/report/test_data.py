"""What the models of a task read, as the page shows it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rankwise.report import html
from rankwise.runs.data import FILE, Lengths, Seen, SeenRow, SeenSplit, seen
from rankwise.runs.store import Store
from runs import config, finish

ROW = SeenRow(
    split="train",
    number=17,
    place="line 17",
    label="",
    ids=[5, 6, 7, 8],
    words=["<b>bold</b>", " read\n", "learnt ", "<i>too</i>"],
    learnt=[False, False, True, True],
    more=1200,
)
SEEN = Seen(
    task="tickets",
    model="smollm2",
    max_length=128,
    splits=[
        SeenSplit("train", 200, 203, 3, Lengths(4, 9, 20, 128), 2000, 500, 1, 7, 90, 2, contradicted=4),
        SeenSplit("validation", 50, 50, 0, Lengths(4, 9, 20, 99), 450, 100, shared=5, classes={"yes": 30, "no": 20}),
    ],
    rows=[ROW],
)


def note(folder: Path, content: Any) -> None:
    (folder / FILE).write_text(json.dumps(content))


def test_the_page_has_a_section_on_what_the_model_reads(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in (0, 1):
        note(finish(store, config(seed=seed), 0.7), asdict(SEEN))
    page = html.write(tmp_path).read_text()
    assert page.count("What the model reads: tickets as smollm2 reads it, at most 128 tokens of an input") == 1
    assert "<dt>line 17 of train</dt>" in page and "(1,200 more tokens)" in page
    assert "&lt;b&gt;bold&lt;/b&gt; read\n<mark>learnt &lt;i&gt;too&lt;/i&gt;</mark>" in page
    for text in (">7 (3.5%)<", ">90 (4.3%)<", ">500 (25.0%)<", ">5 (10.0%)<", ">30 (60.0%)<"):
        assert text in page, text
    assert "3 rows of train have nothing to learn" in page and "4 rows of train have the input of another row" in page


def test_a_class_stands_below_what_is_read(tmp_path: Path) -> None:
    row = replace(ROW, label="<billing>", learnt=[False] * 4, more=0)
    note(finish(Store(tmp_path), config(), 0.7), asdict(replace(SEEN, rows=[row])))
    page = html.write(tmp_path).read_text()
    assert "learnt &lt;i&gt;too&lt;/i&gt;<br><mark>&lt;billing&gt;</mark></dd>" in page


def test_models_that_read_other_tokens_have_tables_of_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for method, model in (("lora", "smollm2"), ("head", "other")):
        note(finish(store, config(method={"name": method}), 0.7), asdict(replace(SEEN, model=model)))
    page = html.write(tmp_path).read_text()
    assert page.count("What the model reads: ") == 2


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {**asdict(SEEN), "splits": []},
        {**asdict(SEEN), "splits": [asdict(SEEN.splits[0]), {"split": "x", "rows": 1, "given": 1}]},
        {**asdict(SEEN), "rows": [{**asdict(ROW), "learnt": [True]}]},
        {**asdict(SEEN), "max_length": "long"},
    ],
)
def test_a_run_without_it_has_no_such_section(tmp_path: Path, content: Any) -> None:
    folder = finish(Store(tmp_path), config(), 0.7)
    if content is not None:
        note(folder, content)
    assert seen(folder) is None
    assert "What the model reads" not in html.write(tmp_path).read_text()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    note(tmp_path, asdict(SEEN))
    assert seen(tmp_path) == SEEN
