"""Ours beside what is printed: found by method and options, in the printed unit, with what is different said."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import InputError
from rankwise.published import find, number
from rankwise.results.beside import Beside
from rankwise.results.published import text
from rankwise.results.summary import Summary
from rankwise.runs.store import Store
from runs import config, finish, result

QV = ["c_attn.q", "c_attn.v"]
FOUR = ["query", "key", "value", "attention.output.dense"]
MEDIUM = "openai-community/gpt2-medium"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def e2e(store: Store, bleu: float, model: str = MEDIUM, **settings: Any) -> None:
    method = settings.pop("method", {"name": "lora", "rank": 4, "targets": QV, "alpha": 32.0})
    metrics = {"bleu": bleu, "nist": 8.5, "rouge_l": 0.7}
    finish(store, config(task="e2e", method=method, **settings), 0.0, score="bleu", metrics=metrics, model=model)


def cells(store: Store, *tables: str, **about: Any) -> list[Beside]:
    return Summary(store.results(), {"published": {"tables": list(tables), **about}}).beside


def of(found: list[Beside], row: str, column: str) -> Beside:
    [only] = [cell for cell in found if (cell.row, cell.column) == (row, column)]
    return only


def test_ours_stands_beside_the_row_of_its_method_in_the_printed_unit(store: Store) -> None:
    for seed, bleu in enumerate((68.0, 69.0, 70.0)):
        e2e(store, bleu, seed=seed)
    found = cells(store, "lora/e2e_gpt2_medium")
    bleu = of(found, "GPT-2 M LoRA", "BLEU")
    assert (bleu.mean, bleu.sd, bleu.n) == (pytest.approx(69.0), pytest.approx(1.0), 3)
    assert (bleu.published, bleu.published_parameters, bleu.budget, bleu.final) == ("70.4 ± .1", "0.35M", 4000, 3992)
    assert (bleu.task, bleu.metric, bleu.method, bleu.differs) == ("e2e", "bleu", "lora rank=4", ())
    # a fraction of ours is printed in percent
    assert of(found, "GPT-2 M LoRA", "ROUGE-L").mean == pytest.approx(70.0)
    assert of(found, "GPT-2 M LoRA", "NIST").mean == pytest.approx(8.5)
    # without Java there is no METEOR
    meteor = of(found, "GPT-2 M LoRA", "METEOR")
    assert (meteor.n, meteor.mean, meteor.published) == (0, None, "46.8 ± .2")
    full = of(found, "GPT-2 M FT *", "BLEU")
    assert (full.n, full.mean, full.method, full.budget, full.differs) == (0, None, "", None, ())


def test_every_printed_cell_is_there_once_whatever_of_ours_there_is(store: Store) -> None:
    e2e(store, 60.0)
    table = find("lora/e2e_gpt2_medium")
    found = cells(store, table.id)
    assert [(c.row, c.column, c.published) for c in found] == [
        (row.name, column.name, cell)
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
    ]
    assert cells(store) == [] == Summary(store.results()).beside


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "rank": 8, "targets": QV},
        {"name": "simplex-lora", "rank": 4, "targets": QV},
        {"name": "adapter-l", "size": 7},
    ],
)
def test_another_method_or_rank_is_another_row(store: Store, method: dict[str, Any]) -> None:
    e2e(store, 60.0, method=method)
    assert not any(cell.n for cell in cells(store, "lora/e2e_gpt2_medium"))


def test_other_targets_are_said_and_the_right_ones_preferred(store: Store) -> None:
    e2e(store, 60.0, model="llama", method={"name": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]})
    [cell] = [c for c in cells(store, "lora/e2e_gpt2_medium") if c.n and c.column == "BLEU"]
    assert "targets q_proj, v_proj instead of c_attn.q, c_attn.v" in cell.differs
    assert "model llama instead of gpt2-medium" in cell.differs
    e2e(store, 65.0, method={"name": "lora", "rank": 4, "targets": QV[::-1]})
    [cell] = [c for c in cells(store, "lora/e2e_gpt2_medium") if c.n and c.column == "BLEU"]
    assert (cell.mean, cell.differs) == (65.0, ())


def test_what_is_not_the_papers_protocol_is_said(store: Store) -> None:
    e2e(store, 5.0, model="random-gpt2", scale="smoke")
    of_smoke = cells(store, "lora/e2e_gpt2_medium", differs="no label smoothing", changed=["epochs=1"])
    assert of(of_smoke, "GPT-2 M LoRA", "BLEU").differs == (
        "scale smoke",
        "model random-gpt2 instead of gpt2-medium",
        "set on the command line: epochs=1",
        "no label smoothing",
    )


def test_a_split_that_is_not_official_is_said(store: Store) -> None:
    of_run = config(task="e2e", method={"name": "lora", "rank": 4, "targets": QV})
    splits = result(Path("x-1"), of_run, 0.0)["splits"]
    splits["evaluation"][0] |= {"official": False, "note": "published scores are on the test rows"}
    finish(store, of_run, 0.0, score="bleu", metrics={"bleu": 60.0}, model=MEDIUM, splits=splits)
    cell = of(cells(store, "lora/e2e_gpt2_medium"), "GPT-2 M LoRA", "BLEU")
    assert cell.differs == ("validation: published scores are on the test rows",)


def test_the_half_that_was_scored_is_named(store: Store) -> None:
    six = ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"]
    of_run = config(task={"name": "cola", "protocol": "halves"}, method={"name": "sora", "rank": 8, "targets": six})
    splits = result(Path("x-1"), of_run, 0.0)["splits"]
    splits["evaluation"][0] |= {"name": "validation_half", "official": False, "note": "the second half"}
    metrics = {"matthews": 0.6}
    finish(store, of_run, 0.6, score="matthews", metrics=metrics, splits=splits, model="microsoft/deberta-v3-base")
    cell = of(cells(store, "sora/glue"), "SoRA", "CoLA")
    assert (cell.metric, cell.mean, cell.published) == ("matthews", pytest.approx(60.0), "71.48")
    assert cell.differs == ("validation_half: the second half",)
    assert "what was left after training, on average" in cell.reading


def test_an_average_says_over_which_tasks(store: Store) -> None:
    method = {"name": "bitfit"}
    whole = {"name": "train", "rows": 9, "official": True, "note": ""}
    for task, score in (("cola", 0.5), ("rte", 0.7)):
        half = {"name": "validation_second", "rows": 9, "official": task == "cola", "note": "the second half"}
        splits = {"train": whole, "evaluation": [half]}
        finish(
            store, config(task=task, method=method), score, benchmark={"name": "GLUE", "score": score}, splits=splits
        )
    cell = of(cells(store, "sora/glue"), "BitFit", "Average")
    assert (cell.task, cell.mean, cell.n, cell.learning_rate) == ("GLUE", pytest.approx(60.0), 1, None)
    assert "the average of 2 tasks: cola, rte" in cell.differs
    assert "rte, validation_second: the second half" in cell.differs
    assert not any(clause.startswith("cola") for clause in cell.differs)


def test_a_row_of_one_rate_takes_that_rate_and_not_the_best(store: Store) -> None:
    for rate, score in ((5e-5, 0.7), (1e-3, 0.9)):
        for init in ("kaiming", "svd_authors"):
            method = {"name": "lora-fa", "rank": 8, "targets": FOUR, "pull": 0.0, "init": init}
            finish(
                store, config(task="mrpc", method=method, learning_rate=rate), score, model="FacebookAI/roberta-base"
            )
    found = cells(store, "lora_fa_svd/mrpc_start")
    for column, printed in (("random start", ".704"), ("SVD start", ".790")):
        cell = of(found, "rate 5e-5, r=8", column)
        assert (cell.mean, cell.learning_rate, cell.published) == (pytest.approx(0.7), 5e-5, printed)
    assert of(found, "rate 4e-4, r=4", "SVD start").n == 0


def test_an_empty_cell_is_shown_where_we_have_a_number(store: Store) -> None:
    method = {"name": "simplex-lora", "rank": 1, "targets": ["query_proj", "key_proj", "value_proj"]}
    finish(store, config(task="mrpc", method=method), 0.8)
    found = [c for c in cells(store, "simplexlora/mrpc_by_rank") if c.row.startswith("SimplexLoRA")]
    assert [(c.column, c.published, c.n) for c in found] == [("r=1, accuracy", "", 1), ("r=1, F1", "", 1)]
    assert "only the step sizes are printed" in found[0].reading


def test_parameters_alone_stand_beside_labels(store: Store) -> None:
    finish(store, config(task="titles", method={"name": "sora", "rank": 8, "targets": "all-linear"}), 0.3)
    [cell] = cells(store, "sora/t5_small")
    assert (cell.row, cell.column, cell.budget, cell.published_parameters) == ("rank 8", "", 8000, "1343240")
    assert "targets all-linear instead of all-linear+lm_head" in cell.differs


def test_the_text_has_ours_the_printed_numbers_and_the_notes(store: Store) -> None:
    for seed, bleu in enumerate((68.0, 69.0, 70.0)):
        e2e(store, bleu, seed=seed, model="random-gpt2")
    shown = text(cells(store, "lora/e2e_gpt2_medium"))
    head, table, notes = shown.split("\n\n")
    assert head == "lora/e2e_gpt2_medium: ours next to Hu et al. 2021, LoRA, arXiv 2106.09685, table 3"
    [line] = [line for line in table.splitlines() if " BLEU " in line]
    assert line.split("  ")[0] == "GPT-2 M LoRA" and "69.00 ± 1.00" in line and "70.4 ± .1" in line and "0.35M" in line
    missing, common, reruns = notes.splitlines()
    assert missing == f"No run of ours for {35 - 3} of the printed cells."
    assert common == "All rows: ours: model random-gpt2 instead of gpt2-medium"
    assert reruns.startswith("All rows: printed: independent reruns of the public recipe give BLEU 68.65")
    e2e(store, 60.0, model="random-gpt2", method={"name": "adapter-h", "size": 112})
    shown = text(cells(store, "lora/e2e_gpt2_medium"))
    [line] = [line for line in shown.splitlines() if " BLEU " in line and "Adapter^H" in line]
    assert line.endswith("  1") and "\n1: printed: no bottleneck of a whole number of features gives 11.09M" in shown
    assert text([]) == ""


def test_a_cell_is_plain_data(store: Store) -> None:
    e2e(store, 60.0)
    found = [asdict(cell) for cell in cells(store, "lora/e2e_gpt2_medium")]
    assert json.loads(json.dumps(found))[0]["differs"] == []
    assert all(number(cell["published"]) > 0 for cell in found)


def test_an_unknown_table_is_refused(store: Store) -> None:
    e2e(store, 60.0)
    with pytest.raises(InputError, match="no such table"):
        cells(store, "lora/e2e")
    (store.folder / "experiment.yaml").write_text("published: {tables: [lora/e2e]}")
    summary = Summary.of_store(store)  # whose results are shown all the same
    assert "no such table" in summary.damage and "e2e: bleu on 50 rows" in summary.text() and not summary.beside
