"""The study: what is kept of its runs can be put back, and docs/findings.md is what results/ gives."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from scipy import stats

from asserts import texts
from rankwise.named import asked
from rankwise.runs.store import Store
from runs import config, finish_with_curves, predict

FOLDER = Path(__file__).parent.parent / "study"


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import archive

    return archive


@pytest.fixture
def report(archive: ModuleType) -> ModuleType:
    import report

    return report


def test_the_page_and_its_pictures_are_what_the_results_give(report: ModuleType) -> None:
    text, found = report.PAGE.read_text(encoding="utf-8"), report.studies()
    assert report.written(text, found) == text
    for study in found:
        assert (report.PICTURES / f"study_{study.name}.svg").is_file()


def test_every_study_is_one_of_the_experiments_and_its_rows_have_what_a_result_has(archive: ModuleType) -> None:
    names = {file.stem for file in archive.RESULTS.glob("*.json")}
    assert names <= set(archive.STUDIES)
    for name in names:
        content = archive.kept(archive.RESULTS / f"{name}.json")
        for row in content["rows"]:
            assert {key: row[key] for key in ("task", "method", "seed")} == {
                key: row["result.json"][key] for key in ("task", "method", "seed")
            }
            assert not row.get("ranks") or len(row["ranks"]) == len(content["sites"])


def asks(method: Mapping[str, Any]) -> frozenset[Any]:
    """The options of a method but for defaults, whatever types their numbers have."""
    return frozenset(
        (key, tuple(value) if isinstance(value, list) else value) for key, value in asked("method", method).items()
    )


def test_every_row_is_one_that_its_experiment_runs(archive: ModuleType) -> None:
    for name in archive.STUDIES:
        settings = yaml.safe_load((archive.ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8"))
        common = settings.get("tune", settings["vary"]).get("learning_rate")
        rates: dict[frozenset[Any], set[float]] = {}
        for entry in settings["vary"]["method"]:
            own = entry.pop("learning_rate", common)
            rates.setdefault(asks(entry), set()).update(map(float, own if isinstance(own, list) else [own]))
        for row in archive.kept(archive.RESULTS / f"{name}.json")["rows"]:
            options = asks({"name": row["method"], **row["options"]})
            found = row["kind"] == "trial" or row["learning_rate"] in rates[options]  # more may have been tried
            assert options in rates and found, (name, row["folder"])
            run = yaml.safe_load(row["run.yaml"])
            asked_for = {**settings}
            if row["kind"] == "trial":
                by_share = run["tuning"] < 1  # the first way to choose; now and then it also looked between epochs
                assert by_share or run["tuning"] == settings["tune"]["rows"], (name, row["folder"])
                asked_for |= {"eval_every": None} if by_share and run["eval_every"] is None else {}
            for key in settings.keys() - {"task", "runs", "tune", "vary", "report"}:
                assert run[key] == asked_for[key], (name, row["folder"], key)


def test_what_is_kept_is_put_back_as_finished_runs(
    archive: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(archive, "RESULTS", tmp_path / "results")
    archive.RESULTS.mkdir()
    store = Store(tmp_path / "runs" / "study_x")
    for seed in (0, 1):
        predict(finish_with_curves(store, config(seed=seed), 0.7), [0, 1, 1], [0, 1, 0])
    before = store.results()
    assert archive.keep("study_x") == 2 == archive.keep("study_x")
    content = json.loads((tmp_path / "results" / "study_x.json").read_text())
    assert [row["right"] for row in content["rows"]] == ["110", "110"]
    assert content["rows"][0]["losses"] and content["rows"][0]["value"] == before[0].metrics["accuracy"]
    assert content["rows"][0]["error"] == pytest.approx((2 / 9 / 3) ** 0.5, rel=0.3)  # of 2 of 3 rows
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert archive.put_back("study_x") == 2 and archive.put_back("study_x") == 0
    after = Store(tmp_path / "runs" / "study_x").results()
    assert [(each.run, each.metrics, each.config) for each in after] == [
        (each.run, each.metrics, each.config) for each in before
    ]
    assert archive.keep("study_x") == 2
    assert json.loads((tmp_path / "results" / "study_x.json").read_text()) == content  # what is kept stays


def row(
    method: str, seed: int, value: float, parameters: int = 1000, kind: str = "run", **options: Any
) -> dict[str, Any]:
    result = {
        **{"parameters": {"final": parameters}, "cost": {"adapter_bytes": 4 * parameters}},
        "splits": {"evaluation": [{"rows": 2000}]},
    }
    asked = {"task": "t", "method": method, "seed": seed, "options": options, "learning_rate": 1e-3, "kind": kind}
    found = {"metric": "accuracy", "value": value, "ranks": [1, 2, 3, seed], "error": 0.02, "losses": [[150, 0.5]]}
    return {**asked, **found, "result.json": result}


def cells_of(rows: Iterable[dict[str, Any]]) -> list[Any]:
    from cells import cells

    return cells(rows)


def study(report: ModuleType, *rows: dict[str, Any]) -> Any:
    return report.Study("t", ["a.0.q", "a.0.k", "a.1.q", "a.1.k"], cells_of(rows))


def test_an_adapter_is_not_worse_by_students_test_against_the_margin(report: ModuleType) -> None:
    gaps = [0.0, -0.01, 0.01, -0.005, 0.005]
    large = [row("lora", seed, 0.8 + 0.01 * seed, 8000, rank=8) for seed in range(5)]
    small = [row("spaced-lora", s, 0.8 + 0.01 * s + gap, 100, mean_rank=0.1, rank=8) for s, gap in enumerate(gaps)]
    one = study(report, *large, *small)
    margin = one.margin
    assert margin == pytest.approx(0.02)
    cell = one.find("LoRA, spaced", 0.1)
    expected = stats.ttest_1samp([gap + margin for gap in gaps], 0, alternative="greater").pvalue
    assert report.not_worse(cell, one) == pytest.approx(expected)
    assert "| 80 × | +0.000 **not worse** |" in report.sizes([one])
    worse = [{**each, "value": each["value"] - 3 * margin} for each in small]
    assert "not worse" not in report.sizes([study(report, *large, *worse)])


def test_advice_shows_the_gap_of_each_task_with_its_interval(report: ModuleType) -> None:
    def of(*small: float) -> Any:
        large = [row("lora", seed, 0.8, 8000, rank=8) for seed in range(3)]
        return study(report, *large, *[row("lora", s, 0.8 + gap, 1000, rank=1) for s, gap in enumerate(small)])

    gaps = [0.02, 0.03, 0.01]
    low, high = stats.t.interval(0.95, 2, 0.02, stats.sem(gaps))
    [line] = report.advice([of(*gaps), of(0.1, 0.1), of()]).splitlines()[2:]
    assert line == f"| plain LoRA | `lora` with `rank: 1, alpha: 2` | 8 × | +0.020 ({low:+.3f} … {high:+.3f}) |  |  |"


def test_a_choice_is_compared_with_its_controls_of_the_same_size(report: ModuleType) -> None:
    def squeezed(score: str, gap: float) -> list[dict[str, Any]]:
        options = {"mean_rank": 0.25, "rank": 8, "score": score, "every": 50, "times": 1}
        return [row("squeeze", s, 0.7 + gap + 0.01 * (s % 2), **options) for s in range(5)]

    lora = [row("lora", seed, 0.7, 8000, rank=8) for seed in range(5)]
    one = study(report, *lora, *squeezed("spectrum", 0.05), *squeezed("permuted", 0.0), *squeezed("uniform", 0.05))
    lines = report.where([one]).splitlines()[2:]
    assert len(lines) == 2
    assert "| squeeze, permuted | +0.050" in lines[0] and "| squeeze, uniform | +0.000" in lines[1]
    plans = report.plans([one]).splitlines()[2:]
    assert len(plans) == 2 and "| squeeze | ¼ |" in plans[0] and "| squeeze, permuted | ¼ |" in plans[1]


def test_ranks_by_weights_are_compared_with_lora_and_with_weights_of_other_layers(report: ModuleType) -> None:
    rows = [row("lora", seed, 0.7, 8000, rank=8) for seed in range(5)]
    for gap, more in ((0.05, {}), (0.04, {"score": "omega", "omega_rate": 5.0}), (0.02, {"score": "permuted"})):
        rows += [row("simplex-lora", s, 0.7 + gap + 0.01 * (s % 2), 8000, rank=8, **more) for s in range(5)]
    lines = report.where([study(report, *rows)]).splitlines()[2:]
    gaps = ["SimplexLoRA | SimplexLoRA, permuted | +0.030", "SimplexLoRA | LoRA | +0.054"]
    gaps.append("SimplexLoRA, ω at rate 5 | LoRA | +0.044")
    assert len(lines) == 3 and all(gap in line for gap, line in zip(gaps, lines, strict=True))


def test_runs_of_before_an_option_was_added_join_those_after_it(report: ModuleType) -> None:
    old = [row("simplex-lora", seed, 0.5, rank=8) for seed in (0, 1)]
    new = [row("simplex-lora", seed, 0.5, rank=8, score="omega") for seed in (2, 3)]
    [cell] = cells_of([*old, *new])
    assert sorted(cell.rows) == [0, 1, 2, 3]


def test_squeeze_is_named_by_what_it_is_asked_for(report: ModuleType) -> None:
    plain = {"mean_rank": 0.25, "rank": 8, "score": "spectrum", "every": 50, "times": 1}
    more: dict[str, dict[str, Any]] = {"": {}, ", omega": {"score": "omega"}, ", from rank 1": {"rank": 1}}
    more |= {", cut at the end": {"every": 150}, ", 4 cuts": {"every": 20, "times": 4}}
    for name, options in more.items():
        [cell] = cells_of([row("squeeze", 0, 0.5, **plain | options)])
        assert (cell.name, cell.size) == (f"squeeze{name}", 0.25)


def test_layers_have_one_name_whatever_the_model_calls_them() -> None:
    kinds = (["query", "value"], ["q_proj", "v_proj"], "all-linear")
    found = [cells_of([row("lora", 0, 0.5, rank=1, targets=targets)])[0] for targets in kinds]
    assert [cell.key for cell in found] == [("LoRA on query and value", "1")] * 2 + [("LoRA", "1")]
    attention = ["query", "key", "value", "attention.output.dense"], ["q_proj", "k_proj", "v_proj", "o_proj"]
    found = [cells_of([row("ia3", 0, 0.5, targets=targets)])[0] for targets in attention]
    assert found[0].key == found[1].key and found[0].name == "IA³ on attention"  # a method without ranks, too


def test_a_claim_and_a_tiny_adapter_are_judged_over_all_tasks(report: ModuleType) -> None:
    seeds = range(5)
    noise = [0.0, 0.01, -0.01, 0.005, -0.005]
    tasks = [
        study(
            report,
            *[row("lora", s, 0.7 + noise[s], 80_000 * large, rank=8) for s in seeds],
            *[row("simplex-lora", s, 0.7 + gap + 2 * noise[s], 80_000 * large, rank=8) for s in seeds],
            *[row("spaced-lora", s, 0.6, 1000 * large, mean_rank=0.1, rank=8) for s in seeds],
            *[row("ia3", s, 0.6 - gap + noise[s], 1000 * large) for s in seeds],
        )
        for gap, large in ((0.02, 1), (0.04, 9))  # of models of two sizes
    ]
    claim, *others = report.claims(tasks).splitlines()[2:]
    gaps = [(0.03 + each) / 0.02 for each in noise]  # in margins
    low, high = stats.t.interval(0.95, 4, stats.tmean(gaps), stats.sem(gaps))
    assert f"| 2 | +1.5 ({low:+.1f} … {high:+.1f}) | holds |" in claim
    assert all("| 0 |  | not measured |" in line for line in others)
    best, other = report.tiny(tasks).splitlines()[2:]
    assert best.startswith("| LoRA, spaced | ⅒ | 80 × | 0.600 | 0.600 | 2 | -5.0 (")
    assert "| IA³ |" in other and "| 0.580 | 0.560 | 2 |" in other and other.count("-1.5 (") == 1


def test_a_cell_has_the_runs_at_the_rate_that_was_chosen(report: ModuleType) -> None:
    def at(rate: float, value: float, kind: str = "run", seed: int = 0) -> dict[str, Any]:
        return {**row("lora", seed, value, rank=8, kind=kind), "learning_rate": rate}

    trials = [at(0.01, 0.6, "trial", 9), at(0.03, 0.7, "trial", 9), at(0.1, 0.7, "trial", 9)]
    [cell] = cells_of([*trials, at(0.01, 0.9), at(0.03, 0.8), at(0.01, 0.9, seed=1), at(0.03, 0.5, seed=1)])
    assert cell.scores == {0: 0.8, 1: 0.5} and cell.first["learning_rate"] == 0.03
    assert cells_of([*trials, at(0.01, 0.9)]) == []
    more = [at(0.01, 0.8, "trial", 10), at(0.03, 0.6, "trial", 10)]  # at the highest rate that seed diverged
    runs = [at(0.01, 0.9), at(0.03, 0.8), at(0.1, 0.7)]
    [cell] = cells_of([*trials, *more, *runs])
    assert (cell.first["learning_rate"], cell.tuning_seeds) == (0.01, 2)


def test_a_task_on_which_a_size_was_not_measured_counts_against_it(report: ModuleType) -> None:
    large = [row("lora", seed, 0.8, 8000, rank=8) for seed in range(5)]
    small = [row("ia3", seed, 0.8 + 0.007 * seed - 0.023, 100) for seed in range(5)]
    one, other = study(report, *large, *small), study(report, *large)
    p = report.not_worse(one.find("IA³", None), one)
    assert 0.025 < p < 0.05
    assert "**not worse**" in report.sizes([one]) and f"p {2 * p:.3f} |  |" in report.sizes([one, other])


def test_a_mean_over_tasks_is_of_seeds_that_all_of_them_have(report: ModuleType) -> None:
    def of(*seeds: int) -> Any:
        return study(report, *[row(m, s, 0.7, rank=8) for s in seeds for m in ("lora", "lora-fa")])

    def fa(*tasks: Any) -> Any:
        return report.over_tasks([(each, each.find("LoRA-FA", 8), each.find("LoRA", 8)) for each in tasks])

    gap, count = fa(of(0, 1, 2, 3), of(1, 2, 3))
    assert (gap.n, gap.mean, count) == (3, 0.0, 2)
    assert fa(of(0, 1, 2), of(1, 2, 3)) == (None, 0)
    assert report.verdict(None) == "not measured"


def test_a_claim_is_judged_by_the_interval_that_is_shown(report: ModuleType) -> None:
    gaps = {0: -0.2, 1: 0.3, 2: -0.9, 3: 0.4, 4: -0.1}
    low, _ = stats.t.interval(0.95, 4, stats.tmean([*gaps.values()]), stats.sem([*gaps.values()]))
    shifts = [(-0.99 - low, "holds"), (-1.01 - low, "open"), (-2 - low - 0.5, "does not hold")]
    for shift, expected in shifts:
        moved = {seed: gap + shift for seed, gap in gaps.items()}
        assert report.verdict(report.difference(moved, dict.fromkeys(moved, 0.0))) == expected


def test_what_is_not_measured_yet_leaves_a_gap(report: ModuleType) -> None:
    few = study(
        report,
        *[row("lora", s, 0.7, 8000, rank=8) for s in range(2)],
        *[row("squeeze", s, 0.7, mean_rank=0.25, rank=8, score="spectrum", every=50, times=1) for s in range(2)],
    )
    lost = study(report, *[{**row("lora", s, 0.7, 8000, rank=8), "error": None, "losses": []} for s in range(3)])
    alone = study(report, *[row("squeeze", 0, 0.7, mean_rank=0.1, rank=8, score="type", every=50, times=1)])
    for found in ([few], [lost], [alone], [few, lost, alone], []):
        tables = [block(found) for block in report.BLOCKS.values()]
        assert not [each for each in tables if "nan" in each or "not worse**" in each]
        assert all(report.scores(each) and report.curve(each) for each in found)


def test_a_start_is_compared_with_the_random_one_at_its_rate(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cells

    rows = []
    for init, gain in (("svd", 0.1), ("kaiming", 0.0)):
        for rate, level in ((1e-2, 0.5), (1e-4, 0.6)):
            for seed in (0, 1, 2):
                value = level + (gain if rate < 1e-3 else -gain) + seed / 1000
                each = row("lora-fa", seed, value, init=init, alpha=1.0)
                losses = [[50, 1 - value], [60, 9 * gain], [100, 9 * gain], [110, 1 - 3 * value], [150, 1 - value]]
                rows.append(each | {"learning_rate": rate, "losses": losses})
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    assert report.by_start() == "Not measured yet."
    write = (tmp_path / "study_starts.json").write_text
    write(json.dumps({"sites": [], "rows": rows}))
    found = [line for line in report.by_start().splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found[2:]]
    assert [(line[2], line[3]) for line in lines] == [
        (init, rate) for rate in ("0.0001", "0.01") for init in ("kaiming", "svd")
    ]
    assert [line[5].split(" ")[0] for line in lines] == ["", "-0.100", "", "+0.100"]  # of the first loss
    assert [line[7].split(" ")[0] for line in lines] == ["", "-0.200", "", "+0.200"]  # of the last loss
    assert [line[9].split(" ")[0] for line in lines] == ["", "+0.100", "", "-0.100"]  # of the score
    alone = [each for each in rows if each["options"]["init"] == "svd"]
    for few in (alone, [each for each in rows if each["seed"] < 2]):  # next to nothing, and of too few seeds
        write(json.dumps({"sites": [], "rows": few}))
        assert "…" not in report.by_start() and "nan" not in report.by_start()
    import curves

    write(json.dumps({"sites": [], "rows": rows}))
    assert {"LoRA-FA, α 1, svd", "rate 0.0001\ntraining loss", "rate 0.01\ntraining loss"} <= {
        *texts(curves.losses(cells.starts()))
    }
    write(json.dumps({"sites": [], "rows": [*rows, rows[0]]}))
    with pytest.raises(AssertionError, match="two starts of one name"):
        cells.starts()


def test_equal_gaps_are_judged_by_their_number(report: ModuleType) -> None:
    large = [row("lora", seed, 0.8, 8000, rank=8) for seed in range(5)]
    small = [row("ia3", seed, 0.8 - 3 / 408, 100) for seed in range(5)]
    one = study(report, *large, *small)
    assert report.not_worse(one.find("IA³", None), one) == 0.5**5
    assert report.not_worse(one.find("IA³", None), study(report, *large[:2], *small)) is None


def test_the_picture_of_a_task_has_every_method_and_numbers_that_can_be_read(report: ModuleType) -> None:
    sizes = ((8, 8000), (1, 1000))
    lora = [row("lora", seed, 0.7 + 0.01 * seed, many, rank=rank) for rank, many in sizes for seed in (0, 1)]
    tiny = [row("ia3", seed, 0.6, 300) for seed in (0, 1)]
    figure = report.curve(study(report, *lora, *tiny, *[row("head", seed, 0.5, 0) for seed in (0, 1)]))
    found = texts(figure)
    assert {"LoRA", "IA³", "the head alone", "t: score and size"} <= {*found}
    assert not [text for text in found if "$" in text]


def test_a_rate_at_an_end_of_those_tried_is_marked(report: ModuleType) -> None:
    trials = [{**row("lora", 9, rate, rank=8, kind="trial"), "learning_rate": rate} for rate in (1e-4, 1e-3)]
    one = study(report, *trials, *[row("lora", seed, 0.7, rank=8) for seed in (0, 1)])
    assert "| 0.001 ↑ | 1 × 2,000 | 0.700 ± 0.000 | 2 |" in report.scores(one)
    more = [{**each, "seed": 10} for each in trials]
    one = study(report, *trials, *more, *[row("lora", seed, 0.7, rank=8) for seed in (0, 1)])
    assert "| 0.001 ↑ | 2 × 2,000 | 0.700 ± 0.000 | 2 |" in report.scores(one)
    single = study(report, *[row("lora", seed, 0.7, rank=8) for seed in (0, 1)])
    assert f"| {single.cells[0].first['learning_rate']:g} |  | 0.700 ± 0.000 | 2 |" in report.scores(single)


def test_a_rate_is_chosen_by_the_trials_on_the_most_rows(report: ModuleType) -> None:
    def trial(rate: float, value: float, rows: int, seed: int) -> dict[str, Any]:
        found = {**row("lora", seed, value, rank=8, kind="trial"), "learning_rate": rate}
        found["result.json"]["splits"]["evaluation"][0]["rows"] = rows
        return found

    few = [trial(1e-3, 0.7, 320, seed) for seed in (9, 10)] + [trial(1e-2, 0.9, 320, seed) for seed in (9, 10)]
    many = [trial(1e-3, 0.8, 2000, 9), trial(1e-2, 0.6, 2000, 9)]
    one = study(
        report, *few, *many, row("lora", 0, 0.7, rank=8), {**row("lora", 0, 0.9, rank=8), "learning_rate": 1e-2}
    )
    assert "| 0.001 ↓ | 1 × 2,000 | 0.700 | 1 |" in report.scores(one)
