import csv
import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from rankwise.errors import InputError
from rankwise.report import tables
from rankwise.results.columns import chosen, columns
from rankwise.results.rows import Row, Score, best, summarise
from rankwise.runs.result import Split
from rankwise.runs.store import Store
from runs import tune


@pytest.fixture
def rows(runs: Path) -> list[Row]:
    return best(summarise(Store(runs).results()))


def test_markdown_has_a_line_per_row_and_the_note(rows: list[Row]) -> None:
    lines = tables.markdown(rows).splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[0].startswith("| method | accuracy (mean ± sd) | 95 % interval | learning rate | seeds |")
    assert lines[4].startswith("| simplex-lora rank=4 | 0.7")
    assert "\\* stdlib-module, validation: split by rankwise from docstrings" in lines
    assert "\\* stdlib-module, train: 4,800 of 5,000 rows" in lines


def test_csv_can_be_read_back_in_full_precision(rows: list[Row]) -> None:
    found = list(csv.DictReader(io.StringIO(tables.csv(rows))))
    assert [float(line["mean"]) for line in found] == [row.mean for row in rows]
    assert [float(line["f1_sd"]) for line in found] == [row.metrics["f1"].sd for row in rows]
    assert found[1]["trainable"] == "331776" and found[1]["official"] == "False"
    assert found[1]["train_note"] == "4,800 of 5,000 rows"
    assert float(found[0]["interval_low"]) < float(found[0]["mean"]) < float(found[0]["interval_high"])


def test_latex_escapes_and_closes(rows: list[Row]) -> None:
    rows[0] = replace(rows[0], method="a_b & 50%")
    lines = tables.latex(rows).splitlines()
    assert lines[0].startswith("\\begin{tabular}{lr") and "\\end{tabular}" in lines
    assert lines[4].startswith("a\\_b \\& 50\\% & 0.") and "$\\pm$" in lines[4] and lines[4].endswith("\\\\")
    assert lines[-1].startswith("% * stdlib-module")


def test_one_seed_has_neither_spread_nor_interval(rows: list[Row]) -> None:
    row = replace(rows[0], scores={0: 0.5}, folders={0: rows[0].first})
    cells = {column.heading: column.cell(row) for column in columns([row])}
    assert "±" not in cells["accuracy"] and cells["95 % interval"] == ""


def test_tasks_of_different_metrics_share_one_table(rows: list[Row]) -> None:
    other = replace(rows[0], task="cola", score="matthews", metrics={"matthews": Score(0.5, None)})
    found = [column.heading for column in columns([*rows, other])]
    assert found[:4] == ["task", "method", "metric", "score"]
    assert tables.markdown([other]).splitlines()[0].count("accuracy") == 0


def test_every_format_holds_the_same_columns(rows: list[Row]) -> None:
    shown = columns(rows)
    heads = [f"{column.heading} ({column.unit})" if column.unit else column.heading for column in shown]
    assert tables.markdown(rows).splitlines()[0] == f"| {' | '.join(heads)} |"
    in_latex = tables.latex(rows).splitlines()[2].removesuffix(" \\\\").replace("$\\pm$", "±").replace("\\%", "%")
    assert in_latex.split(" & ") == heads
    found = next(csv.DictReader(io.StringIO(tables.csv(rows))))
    for column in shown:
        for key, value in column.values.items():
            assert found[key] == ("" if value(rows[0]) is None else str(value(rows[0])))


def latex_cells(line: str) -> list[str]:
    """The cells of a row of a tabular, read as TeX reads it; fails on what TeX would stop at."""
    assert line.endswith(" \\\\")
    cells, depth, math, place = [""], 0, False, 0
    line = line.removesuffix(" \\\\")
    while place < len(line):
        letter = line[place]
        if letter == "\\":
            word = re.match(r"\\([A-Za-z]+|[&%$#_{}])", line[place:])
            assert word, line[place:]
            assert word[1] != "pm" or math
            cells[-1] += word[0]
            place += len(word[0])
            continue
        assert letter not in "%#_^~"
        assert letter not in "<>|" or math
        if letter == "&":
            assert depth == 0 and not math
            cells.append("")
        else:
            cells[-1] += letter
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
        math ^= letter == "$"
        place += 1
    assert depth == 0 and not math
    return cells


def called(row: Row, name: str, train_note: str | None = None) -> Row:
    """A row in which whatever a user may name is called so."""
    splits = {"evaluated": replace(row.evaluated, note=name)}
    splits |= {} if train_note is None else {"trained": replace(row.trained, note=train_note)}
    return replace(row, method=name, task=name, searches={}, **splits)


HOSTILE = ["a_b & 50%", "\\input{x}", "{", "}}", "$x^2$ ~#", "a\nb\r\nc", "<i> | \\\\", "|", "λ=0.1 …", "%", "\\"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_a_table(rows: list[Row], name: str) -> None:
    rows = [called(row, name, f"{name}\n% end") for row in rows]
    shown = columns(rows)
    lines = tables.latex(rows).splitlines()
    assert [len(latex_cells(line)) for line in [lines[2], *lines[4:-4]]] == [len(shown)] * (1 + len(rows))
    assert lines[-4:-2] == ["\\bottomrule", "\\end{tabular}"] and all(line.startswith("% *") for line in lines[-2:])
    table = tables.markdown(rows).splitlines()[: 2 + len(rows)]
    assert {len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in table} == {len(shown) + 1}
    assert [line["method"] for line in csv.DictReader(io.StringIO(tables.csv(rows), newline=""))] == [name] * len(rows)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on the PATH")
def test_latex_takes_every_name(rows: list[Row], tmp_path: Path) -> None:
    """Letters that are not Latin, such as λ, need LuaLaTeX or XeLaTeX."""
    named = [called(rows[0], name) for name in HOSTILE if "λ" not in name]
    head, end = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}", "\\end{document}"
    page = f"{head}\n{tables.latex(named)}\n{end}\n"
    (tmp_path / "page.tex").write_text(page, encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "page.pdf").exists()


def test_how_a_rate_was_chosen_and_the_share_of_a_budget_are_in_every_format(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tune(store, {1e-4: 0.6, 1e-3: 0.8}, 1e-3, budget=8_072)
    tune(store, {1e-3: 0.4, 1e-2: 0.3}, 1e-3, method={"name": "head"})
    tuned = best(summarise(store.results()))
    chosen = "cola: learning rates were chosen on 9 rows of train_held_out (9 of 100 rows, held out); "
    for form in (tables.markdown, tables.latex):
        assert form(tuned).count(chosen) == 1
        assert "of budget" in form(tuned) and "50.0" in form(tuned)
    head, lora = csv.DictReader(io.StringIO(tables.csv(tuned)))
    assert (lora["asked"], lora["used"], head["asked"], head["used"]) == ("8072", "0.5", "", "")
    assert (lora["tuned_split"], lora["tuned_rows"], lora["tuned_rates"]) == ("train_held_out", "9", "0.0001 0.001")


def test_without_a_budget_and_without_tuning_nothing_is_said_of_them(rows: list[Row]) -> None:
    assert "of budget" not in tables.markdown(rows) and "chosen" not in tables.latex(rows)
    assert {line["tuned_split"] for line in csv.DictReader(io.StringIO(tables.csv(rows)))} == {""}


@pytest.mark.parametrize(
    "name", ["=1+1", "+x", "-x", "@x", "\tx", "\x1b[31mred", "<script>x</script>", "[a](http://x.y)"]
)
def test_no_name_is_a_formula_a_script_a_link_or_a_command_to_a_terminal(rows: list[Row], name: str) -> None:
    rows = [called(row, name) for row in rows]
    [line, *_] = csv.DictReader(io.StringIO(tables.csv(rows), newline=""))
    assert line["method"] == (name if name[0] not in "=+-@\t" else f"'{name}") and float(line["mean"]) == rows[0].mean
    for form in (tables.markdown, tables.latex):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", form(rows))
    assert not re.search(r"<script|(?<!\\)\]\(|https?:", tables.markdown(rows))


def test_a_table_has_the_columns_that_are_asked_for_in_their_order(rows: list[Row]) -> None:
    shown = chosen(rows, ["seeds", "method", "f1", "peak", "seconds"])
    assert [column.heading for column in shown] == ["seeds", "method", "f1", "peak", "time of a run"]
    assert (
        tables.latex(rows, shown).splitlines()[2].startswith("seeds & method & f1 (mean $\\pm$ sd) & peak (parameters)")
    )
    assert tables.markdown(rows, shown).startswith("| seeds | method | f1 (mean ± sd) | ")
    assert tables.csv(rows, shown).splitlines()[0] == "n,method,f1,f1_sd,trainable,seconds"
    with pytest.raises(
        InputError, match=r"no column is called 'methid' \(did you mean \"method\"\?\); there are task, me"
    ):
        chosen(rows, ["seeds", "methid"])


def test_the_best_score_of_each_task_stands_out(rows: list[Row]) -> None:
    worse = [replace(row, task="cola", task_options="{}", scores={0: 0.1 * place}) for place, row in enumerate(rows)]
    tied = replace(worse[-1], method="tied", metrics={})
    shown = chosen([*rows, tied], ["method", "mean", "f1", "seeds"])
    for form, mark in ((tables.latex, "\\textbf{"), (tables.markdown, "**")):
        lines = [line for line in form([*rows, *worse, tied], shown, bold=True).splitlines() if " seeds " not in line]
        best = [line.replace("|", "&").split("&")[int(form is tables.markdown)] for line in lines if mark in line]
        methods = [max(rows, key=lambda row: row.mean or 0).method, worse[-1].method, "tied"]
        assert {each.strip() for each in best} >= set(methods)
        assert mark not in form([*rows, *worse], shown)
        marks = [line.count(mark) for line in lines if "tied" in line and "0." in line]
        assert marks == [1 if form is tables.latex else 2]


def test_a_caption_makes_a_floating_table(rows: list[Row]) -> None:
    lines = tables.latex(rows, caption="50 % of a_b").splitlines()
    assert lines[:4] == ["\\begin{table}", "\\centering", "\\caption{50 \\% of a\\_b}", lines[3]]
    assert lines[3].startswith("\\begin{tabular}") and "\\end{tabular}" in lines
    assert lines.index("\\end{table}") == lines.index("\\end{tabular}") + 1
    assert tables.markdown(rows, caption="A & B").splitlines()[:2] == ["A & B", ""]


def test_every_table_carries_what_was_learnt_and_what_was_not(rows: list[Row]) -> None:
    rows = [
        replace(row, remarks=["head, seed 0, on v: all 9 answers are 'x'"]) if row.name == "head" else row
        for row in rows
    ]
    searched = "stdlib-module, simplex-lora rank=4: ranks changed at 17, 17, 17 of 36 sites"
    for form in (tables.markdown, tables.latex):
        assert searched in form(rows) and "stdlib-module: head, seed 0, on v: all 9 answers are 'x'" in form(rows)
    head, lora, simplex = csv.DictReader(io.StringIO(tables.csv(rows)))
    assert head["notes"] == "stdlib-module: head, seed 0, on v: all 9 answers are 'x'." and lora["notes"] == ""
    assert simplex["notes"].startswith(searched)


def test_the_users_own_rows_are_said_to_be_theirs(rows: list[Row]) -> None:
    own = Split("validation", 61, False, own="your file that were held out of training")
    rows = [replace(row, task="tickets", evaluated=own, trained=replace(own, name="train")) for row in rows]
    assert "\ntickets: accuracy, scored on 61 rows of your file that were held out of training\n" in tables.markdown(
        rows
    )
    assert {line["own"] for line in csv.DictReader(io.StringIO(tables.csv(rows)))} == {own.own}
