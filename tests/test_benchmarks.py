"""`make bench`: what it measures is well formed, is kept, and is what docs/performance.md says."""

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asserts import texts

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import suite

    return suite


def run(*options: object) -> str:
    command = [sys.executable, FOLDER / "suite.py", *map(str, options)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_the_page_is_what_the_results_give(suite: ModuleType) -> None:
    text = suite.page.PAGE.read_text(encoding="utf-8")
    results = suite.read(suite.RESULTS)
    assert suite.page.written(text, results) == text
    assert results
    other = json.loads(json.dumps(results).replace('"date": "2', '"date": "3'))
    assert suite.page.written(text, other) != text


def steps(lora: float, slow: float) -> dict[str, Any]:
    arms = {"PEFT LoRA": 1.3, "lora": lora, "lora-fa": 1.0, "sora": lora, "simplex-lora": slow, "adalora": 2.0}
    arms["lora, shrunk"] = 0.9
    rows = [
        {"arm": arm, **{f"over {other}": [value - 0.1, value, value + 0.1] for other in ("limit", "PEFT LoRA", "lora")}}
        for arm, value in arms.items()
    ]
    return {"rows": rows}


def test_goals_are_reached_missed_or_not_measured(suite: ModuleType) -> None:
    lines = suite.page.goals({"steps-bert-8": steps(1.05, 1.06), "steps-llama-8": steps(1.09, 1.2)}).splitlines()
    table = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert (
        "| 1.050 (0.950–1.150) | 1.090 (0.990–1.190) | yes | `steps-bert-8 steps-llama-8` |"
        in table["LoRA's step ÷ limit, r 8"]
    )
    slowest = table["the slowest search ÷ limit, r 8"]
    assert "1.060 (0.960–1.160), simplex-lora | 1.200 (1.100–1.300), simplex-lora | **one of two**" in slowest
    assert "| **no** |" in table["AdaLoRA's search ÷ limit, r 8"]
    assert "| – | – | not measured |" in table["LoRA's step ÷ limit, r 32"]
    assert all(line.count("|") == 7 for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["steps-bert-9"], "there is no part steps-bert-9: choose from steps-bert-8, "),
        (["help", "--rounds", "1"], "--rounds must be at least 2"),
        (["help", "--tokens", "-1"], "--tokens at least 1"),
        (["help", "--json", "{folder}"], "cannot be read"),
        (["help", "--json", "{folder}/none/x.json"], "nothing can be written to"),
        (["help", "--json", "{folder}/torn.json"], "cannot be read"),
        (["help", "--json", "{folder}/other.json"], "has no results of this program"),
        (["help", "--json", "{folder}/gpu.json"], "is of another device (GPU, not "),
    ],
)
def test_bad_input_is_refused_in_one_line(
    options: list[str], message: str, suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torn.json").write_text('{"help":')
    (tmp_path / "other.json").write_text('{"name": 1}')
    machine = {"device": "GPU", "dtype": "float32", "threads": 1}
    (tmp_path / "gpu.json").write_text(json.dumps({"error": {"machine": machine}}))
    monkeypatch.setattr(sys, "argv", ["suite.py", *(option.format(folder=tmp_path) for option in options)])
    with pytest.raises(suite.InputError) as caught:
        suite.main()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def growing(axis: str) -> dict[str, Any]:
    """Three points, at which a step grows as its axis does and a rank change as the square of it."""
    ratios = {key: [1.0, 1.1, 1.2] for key in ("over limit", "search over lora", "change over step")}
    sizes = {"kept by limit": 100, "kept": 150}
    return {
        "rows": [{axis: n, **ratios, **sizes, "seconds": {"lora": 2.0 * n, "change": n**2}} for n in (1, 4, 64)],
    }


def test_growth_is_the_power_between_the_last_two_points(suite: ModuleType) -> None:
    said = suite.page.scaling({"scaling-rank": growing("rank")})
    assert (
        "a step grows as rank^1.00 (at most 1), what it saves above the limit grows as rank^0.00 (at most 1), " in said
    )
    assert "a rank change grows as rank^2.00 (at most 3)." in said and "growth.svg" not in said


def test_pictures_are_drawn_and_linked_where_the_results_are_enough(suite: ModuleType) -> None:
    results = {f"scaling-{axis}": growing(axis) for axis in ("rank", "sites", "tokens")}
    assert suite.page.pictures({"scaling-rank": results["scaling-rank"]}) == {}
    results |= {"steps-bert-8": steps(1.05, 1.06), "steps-llama-8": steps(1.09, 1.2)}
    drawn = suite.page.pictures(results)
    assert drawn.keys() == {"step.svg", "growth.svg"} and "pictures/growth.svg" in suite.page.scaling(results)
    assert {"rankwise LoRA after shrinking", "PEFT LoRA", "MiniLM's shape, r 8"} <= {*texts(drawn["step.svg"])}
    assert {"rank", "sites", "tokens", "a rank change ÷ step"} <= {*texts(drawn["growth.svg"])}
    assert not [text for figure in drawn.values() for text in texts(figure) if "$" in text]
    assert all(suite.page.svg(figure).startswith("<?xml") for figure in drawn.values())


def test_every_part_has_its_table_and_its_function(suite: ModuleType) -> None:
    assert {name.partition("-")[0] for name in suite.PARTS} == suite.page.SECTIONS.keys()
    for file, function, _ in suite.PARTS.values():
        assert f"\ndef {function}(tokens: int, rounds: int" in (FOLDER / f"{file}.py").read_text()


def test_runs_take_turns_and_the_first_round_is_not_counted(suite: ModuleType) -> None:
    import measures

    order: list[str] = []
    runs = {name: lambda name=name: float(len(order) + bool(order.append(name))) for name in "abc"}
    found = measures.in_turns(runs, 2)
    assert "".join(order) == "abcbcacab"
    assert found == {"a": [5.0, 7.0], "b": [3.0, 8.0], "c": [4.0, 6.0]}


@pytest.mark.parametrize("values", [[2.0], [3.0, 1.0], [3.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0]])
def test_quartiles_lie_within_what_was_measured(suite: ModuleType, values: list[float]) -> None:
    import measures

    low, middle, high = measures.quartiles(values)
    assert min(values) <= low <= middle <= high <= max(values)
    if len(values) < 4:
        assert (low, high) == (min(values), max(values))


def test_a_part_without_a_method_that_was_added_is_measured_again(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import arms

    def measured(name: str, asked: argparse.Namespace) -> dict[str, Any]:
        again.append(name)
        return whole | {"rows": rows}

    file, again = tmp_path / "results.json", list[str]()
    whole = {"machine": arms.machine(), "date": "2026-01-01"}
    rows = [{"arm": name} for name in arms.every()]
    file.write_text(json.dumps({"steps-bert-8": whole | {"rows": rows}, "memory-bert-8": whole | {"rows": rows[1:]}}))
    monkeypatch.setattr(suite, "measured", measured)
    for _ in range(2):
        [*suite.new_results(["steps-bert-8", "memory-bert-8"], argparse.Namespace(json=file, again=False))]
    assert again == ["memory-bert-8"]


@pytest.mark.large
def test_what_has_been_measured_is_kept_unless_it_is_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    options = ("--json", file, "--rounds", 2)
    assert re.findall(r"\d rounds?", run("help", "error", *options)) == ["2 rounds", "1 round"]
    first = json.loads(file.read_text())
    assert [*first] == ["error", "help"]  # in the order of the parts
    assert run("help", "error", *options) == ""
    assert json.loads(file.read_text()) == first
    assert "1536×384" in run("error", "--again", *options)
    assert json.loads(file.read_text())["help"] == first["help"]
    assert [row["above"] < 1e-8 for row in first["error"]["rows"]] == [True] * 3


@pytest.mark.large
@pytest.mark.parametrize("shape", ["bert", "llama"])
def test_each_step_is_measured_and_its_memory(shape: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    options = ("--json", file, "--rounds", 2, "--tokens")
    shown = run(f"steps-{shape}-8", "changes", *options, 8) + run(f"memory-{shape}-8", *options, 128)
    results = json.loads(file.read_text())
    steps, memory = ({row["arm"]: row for row in results[f"{part}-{shape}-8"]["rows"]} for part in ("steps", "memory"))
    wanted = {
        "PEFT LoRA",
        "PEFT DoRA",
        "full fine-tuning",
        "lora",
        "lora, lean",
        "simplex-lora",
        "sora",
        "adalora",
    }
    assert wanted <= steps.keys() <= memory.keys()
    for row in steps.values():
        low, middle, high = row["over limit"]
        assert 0 < low <= middle <= high and 0 < row["optimizer"][1] < 1
    assert steps["lora"]["over lora"] == steps["PEFT LoRA"]["over PEFT LoRA"] == [1, 1, 1]
    assert all(row["peak"] > 0 for row in memory.values())
    assert memory["lora, lean"]["kept"] < memory["lora"]["kept"]
    assert memory["lora-fa"]["kept"] < memory["lora"]["kept"] == memory["PEFT LoRA"]["kept"]
    assert memory["lora, shrunk"]["kept"] < memory["lora"]["kept"]
    assert all(row["share"][0] > 0 for row in results["changes"]["rows"])
    assert len(re.findall(r"^\| rankwise simplex-lora ", shown, re.MULTILINE)) == 2


@pytest.mark.large
@pytest.mark.parametrize("axis", ["rank", "sites", "tokens"])
def test_growth_is_measured_along_each_axis(axis: str, suite: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    shown = run(f"scaling-{axis}", "--json", file, "--rounds", 2, "--tokens", 32)
    rows = json.loads(file.read_text())[f"scaling-{axis}"]["rows"]
    values = [row[axis] for row in rows]
    assert values == sorted(values) and len(values) > 1
    for row in rows:
        assert row["kept"] > row["kept by limit"] > 0
        for key in ("over limit", "search over lora", "change over step"):
            assert 0 < row[key][0] <= row[key][1] <= row[key][2]
    before, last = rows[-2:]
    power = math.log(last["seconds"]["lora"] / before["seconds"]["lora"]) / math.log(last[axis] / before[axis])
    more = ": **more**" if power > 1 + suite.page.NOISE else ""
    assert f"a step grows as {axis}^{power:.2f} (at most 1{more})" in shown


@pytest.mark.large
def test_several_runs_at_once_have_the_gradients_of_each_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    run("together-llama", "--json", file, "--rounds", 2, "--tokens", 8)
    rows = json.loads(file.read_text())["together-llama"]["rows"]
    assert [(row["runs"], row["tokens"]) for row in rows] == [(2, 32), (4, 32), (8, 32)]
    assert all(0 < row["gradients differ by"] < 1e-5 for row in rows)
    assert all(row[f"over {other}"][0] > 0 for row in rows for other in ("fast", "peft"))


@pytest.mark.large
def test_short_runs_are_compared_with_one_process(suite: ModuleType) -> None:
    import parts

    found = parts.short_runs(8, 2, "--model", "random-bert", "--steps", "2", "--runs", "2")
    assert [row["arm"] for row in found["rows"]] == ["one", "forked", "fresh"]
    assert found["rows"][0]["over one"] == [1, 1, 1] and found["rows"][1]["over one"][0] > 0
    assert suite.page.section("runs", {**found, "rounds": 2, "seconds": 1}).count("\n| ") == 5
