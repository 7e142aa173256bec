"""The papers' tables: all of them load, and the numbers are the printed ones."""

from collections import Counter
from typing import Any

import pytest

from rankwise import published, tasks
from rankwise.archs import archs
from rankwise.errors import InputError
from rankwise.methods import registry
from rankwise.published import Row, Table, find, number, papers
from rankwise.settings import Schema, load_method

TABLES = [table for paper in papers() for table in paper.tables]
every_table = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.id)


def row(table: str, name: str, parameters: str = "") -> dict[str, str | None]:
    """A row as heading -> cell."""
    found = find(table)
    [only] = [each for each in found.rows if each.name == name and parameters in ("", each.parameters)]
    return dict(zip([column.name for column in found.columns], only.cells, strict=True))


def known(options: dict[str, Any]) -> bool:
    name = options["name"]
    given = [f"{key}={value}" for key, value in options.items() if key != "name"]
    full, _ = load_method(name, given, Schema(registry(), {}))
    return full["name"] == name


@every_table
def test_every_row_has_a_cell_for_every_column(table: Table) -> None:
    assert {len(each.cells) for each in table.rows} <= {len(table.columns)}
    assert len({column.name for column in table.columns}) == len(table.columns)
    assert len({(each.name, each.parameters) for each in table.rows}) == len(table.rows)
    assert table.kind == "table" or not (table.columns or table.numbers)
    assert table.source and table.number and table.about


@every_table
def test_what_stands_beside_is_what_we_have(table: Table) -> None:
    assert table.arch in {"", *archs()}
    for column in table.columns:
        if column.task:
            task = tasks.build({"name": column.task})
            assert column.metric.removesuffix("_mismatched") in task.metrics
        assert bool(column.task) == bool(column.metric)
        assert not (column.task and column.average)
    for each in table.rows:
        for options in filter(None, (each.method, each.nearest)):
            assert known(options)


@every_table
def test_every_cell_is_a_number_of_its_unit(table: Table) -> None:
    most = {"percent": 100, "fraction": 1, "number": 1000}
    for each in table.rows:
        for column, cell in zip(table.columns, each.cells, strict=True):
            assert cell is None or 0 < number(cell) <= most[column.unit], (each.name, column.name)


@every_table
def test_what_is_not_read_as_it_stands_has_a_reason(table: Table) -> None:
    assert bool(table.as_printed) <= bool(table.reading)
    for each in table.rows:
        # our own choice of what to put beside it
        if each.nearest is not None and each.learning_rate is None:
            assert each.reading
        assert each.method is None or each.nearest is None
        if not any(each.cells) and not each.parameters:
            assert each.reading


def test_a_reading_moves_numbers_and_neither_makes_nor_loses_any() -> None:
    shifted = [table for table in TABLES if table.as_printed]
    assert [table.id for table in shifted] == ["simplexlora/glue_deberta_v3_base"]
    [table] = shifted
    left_out = {  # in doubt, as the rows say
        "WLoRA (r=8, k=10)": ["11"],
        "SimplexLoRA (r=8), mean of 3 random seeds": [".9289"],
    }
    for each in table.rows:
        label, *cells = table.as_printed["rows"][each.name]
        printed = Counter(word for cell in cells for word in cell.split())
        read = Counter(filter(None, each.cells))
        assert printed - read == Counter(left_out.get(each.name, [])) and not read - printed
        assert (label or "") == each.parameters
        assert all(doubt in each.reading for doubt in left_out.get(each.name, []))


def test_the_arithmetic_behind_the_shifted_cells() -> None:
    table = find("simplexlora/glue_deberta_v3_base")
    firsts = ["MNLI", "SST-2", "CoLA", "QQP, accuracy", "QNLI", "RTE", "MRPC, accuracy", "STS-B"]
    tasks_in_order = ["MNLI", "SST-2", "CoLA", "QQP", "QNLI", "RTE", "MRPC", "STS-B"]

    def mean(cells: dict[str, str | None], names: list[str]) -> float:
        return sum(number(cells[name] or "") for name in names) / len(names)

    lora, wlora = row(table.id, "LoRA (r=8)"), row(table.id, "WLoRA (r=8, k=10)")
    minutes = [f"minutes, {task}" for task in tasks_in_order]
    assert f"{mean(lora, firsts):.4f}".removeprefix("0") == ".8666" in table.reading and lora["mean"] == ".8665"
    assert f"{mean(wlora, firsts):.4f}".removeprefix("0") == ".8224" == wlora["mean"]
    assert (mean(lora, minutes), lora["minutes, mean"]) == (24.375, "24.38")
    assert "24.375" in table.reading
    assert mean(wlora, minutes) == 13.75 and "13.75" in table.rows[1].reading and wlora["minutes, mean"] is None
    # as the headings stand, the printed mean is none of what is below them
    headings, cells = table.as_printed["headings"], table.as_printed["rows"]["LoRA (r=8)"]
    assert len(cells) == len(headings) + 1


def test_soras_average_takes_the_mean_of_a_tasks_metrics_first() -> None:
    cells = {name: number(cell or "") for name, cell in row("sora/glue", "SoRA").items()}
    pairs = [("QQP, accuracy", "QQP, F1"), ("MNLI, matched", "MNLI, mismatched")]
    singles = [cells[name] for name in ("CoLA", "SST-2", "MRPC", "STS-B", "QNLI", "RTE")]
    average = (sum(singles) + sum((cells[a] + cells[b]) / 2 for a, b in pairs)) / 8
    assert f"{average:.2f}" == f"{cells['Average']}" == "89.36"


def test_numbers_are_as_printed() -> None:
    e2e = ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
    expected = [
        (
            "lora/e2e_gpt2_medium",
            "GPT-2 M LoRA",
            e2e,
            ["70.4 ± .1", "8.85 ± .02", "46.8 ± .2", "71.8 ± .1", "2.53 ± .02"],
        ),
        ("lora/e2e_gpt2_medium", "GPT-2 M FT *", e2e, ["68.2", "8.62", "46.2", "71.0", "2.47"]),
        (
            "lora/e2e_gpt2_large",
            "GPT-2 L LoRA",
            e2e,
            ["70.4 ± .1", "8.89 ± .02", "46.8 ± .2", "72.0 ± .2", "2.47 ± .02"],
        ),
        ("lora/gpt3", "GPT-3 FT", ["WikiSQL Acc.", "MNLI-m Acc.", "SAMSum R1"], ["73.8", "89.5", "52.0"]),
        ("sora/glue", "LoRA (r=8)", ["Average", "CoLA"], ["88.38", None]),
        ("sora/glue", "AdaLoRA", ["Average"], ["88.83"]),
        ("lora_fa_svd/mrpc_start", "rate 4e-4, r=4", ["random start", "SVD start"], [".845", ".866"]),
        ("lora_fa_svd/regulariser", "with", ["score"], [".803"]),
    ]
    for table, name, headings, cells in expected:
        assert [row(table, name)[heading] for heading in headings] == cells
    by_rank = {
        "WLoRA [k=20], warm-up 0": [".88725/.91986", ".8948/.9174", ".89461/.92196", ".89235/.91549"],
        "FatLoRA [mfs=2, fs=10], warm-up 50": [".88725/.91901", ".8971/.90619", ".89661/.92596", ".9021/.90815"],
        "LoRA, warm-up 100": [".89052/.92125", ".89379/.92444", ".89424/.92479", ".90196/.93004"],
    }
    for name, pairs in by_rank.items():
        cells = row("simplexlora/mrpc_by_rank", name)
        assert [f"{cells[f'r={r}, accuracy']}/{cells[f'r={r}, F1']}" for r in (1, 2, 4, 8)] == pairs
    steps = row("simplexlora/mrpc_by_rank", "SimplexLoRA, warm-up 30")
    assert [cell for cell in steps.values() if cell] == ["5e-5", "3e-5", "5e-5", "3e-5"]


def test_two_rows_of_one_name_are_told_apart_by_their_parameters() -> None:
    assert row("lora/gpt3", "GPT-3 LoRA", "4.7M")["WikiSQL Acc."] == "73.4"
    assert row("lora/gpt3", "GPT-3 LoRA", "37.7M")["WikiSQL Acc."] == "74.0"
    assert {each.name for each in find("lora/gpt3").rows if each.parameters == "40.1M"} == {"GPT-3 Adapter^H"}


def test_a_label_is_only_of_what_the_paper_itself_says() -> None:
    """What we put beside a row for want of its definition is no published count."""
    ours = [each.nearest for table in TABLES for each in table.rows if each.nearest]
    assert {options["name"] for options in ours} >= {"adapter-h", "pre-layer", "adalora"}
    assert not any(published.labels("gpt2-medium", options["name"], options) for options in ours)


def test_a_number_is_read_without_its_spread() -> None:
    assert (number("70.4 ± .1"), number(".88725"), number("3e-5")) == (70.4, 0.88725, 3e-5)
    with pytest.raises(ValueError, match="no printed number"):
        number("70.4 or so")


def test_an_unknown_table_gets_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r'did you mean "lora/e2e_gpt2_medium"\?') as caught:
        find("lora/e2e_gpt2_medum")
    assert "rankwise papers" in str(caught.value)


def test_a_row_is_made_of_what_is_said() -> None:
    with pytest.raises(TypeError):
        Row("LoRA", celsl=("1",))  # type: ignore[call-arg]
