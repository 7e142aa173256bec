"""The tables and pictures of docs/findings.md, from results/ alone: `make study-report`."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from archive import RESULTS, ROOT, kept
from cells import ENOUGH, LEVELS, NAMES, OWN, SCREEN, STARTS, Cell, Study, starts, studies
from curves import curve, losses
from scipy import stats as distributions

from rankwise.files import write_whole
from rankwise.pictures.style import svg
from rankwise.results.stats import Difference, difference, equal, holm, mean, sd

PAGE = ROOT / "docs" / "findings.md"
PICTURES = ROOT / "docs" / "pictures"
CONTROLS = ("permuted", "type", "uniform", "random")
"""What methods that decide ranks are compared with, next to LoRA of their size."""
CLAIMS = (
    ("SimplexLoRA, 8 units a layer, is not worse than LoRA", ("SimplexLoRA", 8), ("LoRA", 8)),
    ("SimplexLoRA, 1 unit a layer, is not worse than LoRA", ("SimplexLoRA", 1), ("LoRA", 1)),
    ("WeightLoRA with a third of the adapters is not worse than LoRA", ("WeightLoRA", None), ("LoRA", 8)),
    ("SoRA with a part of the parameters (70 % in the paper) is not worse than LoRA", ("SoRA", None), ("LoRA", 8)),
    ("LoRA-FA is not worse than LoRA", ("LoRA-FA", 8), ("LoRA", 8)),
    ("LoRA is not worse with a pull of B to its start", ("LoRA, pulled", 8), ("LoRA", 8)),
)
"""Of the papers, and the two cells that decide each."""
ADVICE = (
    ("plain LoRA", "`lora` with `rank: 1, alpha: 2`", ("LoRA", 1)),
    ("the most score for few parameters", "`ia3`", ("IA³", None)),
    ("next to nothing on disk", "`spaced-lora` with `mean_rank: 0.1`", ("LoRA, spaced", 0.1)),
)
"""What a reader may want, what to take, and its cells."""
ARROWS = {"lowest": " ↓", "highest": " ↑", "": ""}
TINY = 0.1
"""The largest file that counts as a tiny adapter, in that of LoRA of rank 8."""


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Not measured yet."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, ["---"] * len(titles), *rows))


def share(size: float | None) -> str:
    return "" if size is None else {0.5: "½", 0.25: "¼", 0.1: "⅒"}.get(size, f"{size:g}")


def signed(gap: Difference | None) -> str:
    if gap is None or gap.seeds is None:
        return ""
    return f"{gap.mean:+.3f} ({gap.seeds[0]:+.3f} … {gap.seeds[1]:+.3f})"


def mean_of(cell: Cell) -> str:
    """The mean score and the standard deviation over seeds."""
    values = list(cell.scores.values())
    spread = sd(values)
    return f"{mean(values):.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def gap_of(cell: Cell | None, other: Cell | None) -> Difference | None:
    """How far a cell is above another; None where either is missing or too few seeds have both."""
    found = difference(cell.scores, other.scores) if cell and other else None
    return found if found and found.n >= ENOUGH else None


def not_worse(cell: Cell, study: Study) -> float | None:
    """The p-value of Student's one-sided test that the mean gap to the reference is below minus the margin."""
    if study.reference is None or study.margin is None or gap_of(cell, study.reference) is None:
        return None
    shared = cell.scores.keys() & study.reference.scores.keys()
    above = [cell.scores[seed] - study.reference.scores[seed] + study.margin for seed in sorted(shared)]
    if equal(above):  # for which the sign test is what is left
        return 0.5 ** len(above) if mean(above) > 0 else 1.0
    return float(distributions.ttest_1samp(above, 0, alternative="greater").pvalue)


def scores(study: Study) -> str:
    """Every cell of a task."""
    rows = []
    for cell in study.cells:
        gap = gap_of(cell, study.reference)
        rows.append(
            [
                *(cell.name, share(cell.size), f"{cell.parameters:,.0f}", f"{cell.bytes / 1024:,.0f} KiB"),
                f"{cell.first['learning_rate']:g}{ARROWS[cell.edge]}",
                f"{n} × {cell.tuning_rows:,}" if (n := cell.tuning_seeds) else "",
                mean_of(cell),
                *(str(len(cell.scores)), "" if cell is study.reference else signed(gap)),
            ]
        )
    metric = study.cells[0].first["metric"]
    return table(
        ["method", "units a layer", "parameters", "file", "rate", "chosen on", metric, "seeds", "to LoRA, r 8 (95 %)"],
        rows,
    )


def how_much(cells: Mapping[Study, Cell], of: str) -> float:
    """How many times smaller than LoRA of rank 8, the mean over tasks."""
    return mean([getattr(study.reference, of) / getattr(cell, of) for study, cell in cells.items()])


def advice(found: Sequence[Study]) -> str:
    """What to take, and its gap to LoRA of rank 8 on each task."""
    rows = []
    for want, take, cell in ADVICE:
        own = {study: taken for study in found if study.reference and (taken := study.find(*cell))}
        if own:
            gaps = [gap_of(own.get(study), study.reference) for study in found]
            rows.append([want, take, f"{how_much(own, 'parameters'):.0f} ×", *map(signed, gaps)])
    titles = [f"{study.name} ({study.cells[0].first['metric']})" for study in found]
    return table(["you want", "take", "fewer parameters", *titles], rows)


def sizes(found: Sequence[Study]) -> str:
    """How much smaller than LoRA of rank 8, and not worse.

    Holm's correction is over all tasks for each method and size; a task on which it was not measured counts as p = 1.
    """
    smaller = {
        study: [c for c in study.cells if c.method not in LEVELS and c.parameters < study.reference.parameters / 2]
        for study in found
        if study.reference
    }
    groups: dict[tuple[str, str], dict[Study, Cell]] = {}
    for study, own in smaller.items():
        for cell in own:
            groups.setdefault(cell.key, {})[study] = cell
    rows = []
    for cells in sorted(groups.values(), key=lambda each: how_much(each, "parameters")):
        p = {study: value for study, cell in cells.items() if (value := not_worse(cell, study)) is not None}
        missing = [1.0] * (len(smaller) - len(p))
        adjusted = dict(zip(p, holm([*p.values(), *missing]), strict=False))
        first = next(iter(cells.values()))
        row = [first.name, share(first.size), f"{how_much(cells, 'parameters'):.0f} ×"]
        for study in smaller:
            gap, value = gap_of(cells.get(study), study.reference), adjusted.get(study)
            mark = "" if value is None else " **not worse**" if value <= 0.05 else f" p {value:.3f}"
            row.append(f"{gap.mean:+.3f}{mark}" if gap else "")
        rows += [row] if any(row[3:]) else []
    titles = [f"{each.name}" + (f" (± {each.margin:.3f})" if each.margin else "") for each in smaller]
    return table(["method", "units a layer", "smaller", *titles], rows)


def where(found: Sequence[Study]) -> str:
    """What a choice of ranks gains over each control at the same size."""
    rows, tests = [], []
    for study in found:
        for cell in study.cells:
            if cell.score != OWN.get(cell.method):
                continue
            name = NAMES.get(cell.method, cell.method)
            controls = [cell.name.replace(name, f"{name}, {control}", 1) for control in CONTROLS]
            others = [study.find(name, cell.size) for name in controls]
            others += [study.plain(cell.size)] if "end" not in cell.name else []
            for other in filter(None, others):
                gap = gap_of(cell, other)
                if gap is not None and gap.p is not None:
                    rows.append([study.name, share(cell.size), cell.name, other.name, signed(gap)])
                    tests.append(gap.p)
    return table(
        ["task", "units a layer", "method", "compared with", "gap (95 %)", "p", "p, Holm"],
        [[*row, f"{p:.2g}", f"{held:.2g}"] for row, p, held in zip(rows, tests, holm(tests), strict=True)],
    )


def plans(found: Sequence[Study]) -> str:
    """How far the ranks of two seeds agree, and where they are. The ranks of a permuted plan show what chance gives."""
    rows = []
    for study in found:
        for cell in study.cells:
            ranks = [row["ranks"] for row in cell.rows.values() if row.get("ranks")]
            if cell.method not in OWN or cell.score == "uniform":
                continue
            pairs = [float(distributions.spearmanr(a, b).statistic) for a, b in combinations(ranks, 2) if differ(a, b)]
            if not pairs:
                continue
            units = np.sum(ranks, axis=0)
            kinds: dict[str, int] = {}
            for site, count in zip(study.sites, units.tolist(), strict=True):
                kinds[name] = kinds.get(name := re.sub(r"^.*\.\d+\.", "", site), 0) + count
            top = sorted(kinds.items(), key=lambda item: -item[1])[:3]
            agreement = f"{mean(pairs):+.2f} ({min(pairs):+.2f} … {max(pairs):+.2f})"
            most = ", ".join(f"{name} {count / units.sum():.0%}" for name, count in top)
            rows.append([study.name, cell.name, share(cell.size), agreement, most])
    return table(["task", "method", "units a layer", "Spearman between seeds (least … most)", "most rank in"], rows)


def differ(*ranks: Sequence[int]) -> bool:
    """Whether the ranks of each differ among its sites; without that there is no correlation."""
    return all(len(set(each)) > 1 for each in ranks)


def over_tasks(pairs: Sequence[tuple[Study, Cell | None, Cell | None]]) -> tuple[Difference | None, int]:
    """How far one cell is above another in margins, the mean over the tasks that have both; and how many do.

    Only seeds that all of these tasks have count; None where they are too few.
    """
    able = [(study.margin, a, b) for study, a, b in pairs if a and b and study.margin and gap_of(a, b)]
    seeds = set.intersection(*({*a.scores} & {*b.scores} for _, a, b in able)) if able else set()
    gaps = {seed: mean([(a.scores[seed] - b.scores[seed]) / margin for margin, a, b in able]) for seed in seeds}
    return (difference(gaps, dict.fromkeys(gaps, 0.0)), len(able)) if len(gaps) >= ENOUGH else (None, 0)


def in_margins(gap: Difference | None) -> str:
    if gap is None or gap.seeds is None:
        return ""
    return f"{gap.mean:+.1f} ({gap.seeds[0]:+.1f} … {gap.seeds[1]:+.1f})"


def verdict(gap: Difference | None) -> str:
    """Of a claim that something is not worse, by a margin."""
    if gap is None or gap.seeds is None:
        return "not measured"
    low, high = gap.seeds
    return "holds" if low > -1 else "does not hold" if high < -1 else "open"


def screen() -> str:
    """On each candidate for a task the scores of LoRA of rank 8, of the head alone, and of always giving one answer."""
    rows: dict[str, dict[str, Any]] = {}
    for row in kept(RESULTS / f"{SCREEN}.json")["rows"]:
        rates = "" if row["method"] in LEVELS else f" at {row['learning_rate']:g}"
        rows.setdefault(row["task"], {})[NAMES[row["method"]] + rates] = row
    names = sorted({name for found in rows.values() for name in found})
    lines = []
    for task, found in rows.items():
        first = next(iter(found.values()))
        answers = first["result.json"]["answers"][:1]
        usual = answers[0]["metrics"].get(first["metric"]) if answers else None
        cells = [f"{found[name]['value']:.3f}" if name in found else "" for name in names]
        lines.append([task.replace("-", "_"), first["metric"], "" if usual is None else f"{usual:.3f}", *cells])
    return table(["task", "metric", "one answer", *names], sorted(lines))


def by_start() -> str:
    """Each start at each rate: the loss of the first and the last 50 steps, and the score, next to the random start."""
    rows, found = [], starts()
    random = {start.of: start for start in found if start.init == "kaiming"}
    for start in found:
        other = random.get(start.of) if start.init != "kaiming" else None
        early, late = start.losses(1, 50), start.losses(101, 150)
        gaps: list[Difference | None] = [None, None, gap_of(start, other)]
        if other is not None and gaps[2] is not None:
            gaps[:2] = [difference(early, other.losses(1, 50)), difference(late, other.losses(101, 150))]
        method, alpha, rate = start.of
        rows.append(
            [
                *(method, f"{alpha:g}", start.init, f"{rate:g}"),
                *(f"{mean([*early.values()]):.3f}", signed(gaps[0])),
                *(f"{mean([*late.values()]):.3f}", signed(gaps[1])),
                *(mean_of(start), signed(gaps[2]), str(len(start.scores))),
            ]
        )
    against = "to random (95 %)"
    titles = ["method", "α", "start", "rate", "loss, steps 1 to 50", against, "loss, steps 101 to 150", against]
    picture = f"\n\n![loss against steps](pictures/{STARTS}.svg)" if rows else ""
    return table([*titles, "accuracy", against, "seeds"], rows) + picture


def claims(found: Sequence[Study]) -> str:
    """What papers say, with the gap on each task and over all that have both."""
    rows = []
    for claim, ours, theirs in CLAIMS:
        pairs = [(study, study.find(*ours), study.find(*theirs)) for study in found]
        gap, count = over_tasks(pairs)
        own = [signed(gap_of(one, other)) for _, one, other in pairs]
        rows.append([claim, *own, str(count), in_margins(gap), verdict(gap)])
    names = [study.name for study in found]
    return table(["claim", *names, "tasks", "mean in margins (95 %)", "verdict"], rows) if found else table([], [])


def tiny(found: Sequence[Study]) -> str:
    """Methods with tiny files, next to LoRA of rank 8 and to spaced LoRA of at most 1.05 times their bytes.

    Those on the most tasks come first, the best of them first.
    """
    cells: dict[tuple[str, str], dict[Study, Cell]] = {}
    for study in found:
        for cell in study.cells if study.reference else ():
            if cell.bytes <= TINY * study.reference.bytes and cell.method not in LEVELS:
                cells.setdefault(cell.key, {})[study] = cell
    rows = []
    for own in cells.values():
        first = next(iter(own.values()))
        spaced = {
            study: next((c for c in study.cells if c.name == "LoRA, spaced" and c.bytes <= 1.05 * cell.bytes), None)
            for study, cell in own.items()
        }
        gap, count = over_tasks([(study, cell, study.reference) for study, cell in own.items()])
        if gap is None:
            continue
        near, _ = over_tasks([(study, cell, spaced[study]) for study, cell in own.items() if cell is not spaced[study]])
        row = [first.name, share(first.size), f"{how_much(own, 'bytes'):.0f} ×"]
        row += [f"{mean([*own[each].scores.values()]):.3f}" if each in own else "" for each in found]
        rows.append((-count, -gap.mean, [*row, str(count), in_margins(gap), in_margins(near)]))
    names = [study.name for study in found]
    titles = ["method", "units a layer", "file smaller", *names, "tasks", "to LoRA, r 8", "to LoRA, spaced"]
    return table(titles, [row for *_, row in sorted(rows, key=lambda each: each[:2])])


BLOCKS: dict[str, Callable[[Sequence[Study]], str]] = {
    "advice": advice,
    "sizes": sizes,
    "tiny": tiny,
    "where": where,
    "plans": plans,
    "claims": claims,
}
"""What stands between the marks of the page, apart from the tasks."""


def tasks(found: Sequence[Study]) -> str:
    return "\n\n".join(
        f"### {study.name}\n\n`rankwise compare experiments/study_{study.name}.yaml`\n\n{scores(study)}\n\n"
        f"![score against parameters](pictures/study_{study.name}.svg)"
        for study in found
    )


def written(text: str, found: Sequence[Study]) -> str:
    """The page with the tables of these results."""
    for name, block in {**BLOCKS, "screen": lambda _: screen(), "starts": lambda _: by_start(), "tasks": tasks}.items():
        marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n)(?:(?!<!-- end).)*(<!-- end -->)", re.DOTALL)
        text, count = marks.subn(lambda mark, block=block: f"{mark[1]}\n{block(found)}\n\n{mark[2]}", text)
        assert count == 1, name
    return text


if __name__ == "__main__":
    everything = studies()
    for each in everything:
        write_whole(PICTURES / f"study_{each.name}.svg", svg(curve(each)))
    if found := starts():
        write_whole(PICTURES / f"{STARTS}.svg", svg(losses(found)))
    write_whole(PAGE, written(PAGE.read_text(encoding="utf-8"), everything))
    print(f"docs/findings.md: {', '.join(each.name for each in everything) or 'no results yet'}")
