"""The tables and pictures of docs/findings.md, from results/ alone: `make study-report`."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from archive import RESULTS, ROOT, STUDIES, kept
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy import stats as distributions

from rankwise.files import write_whole
from rankwise.pictures.style import COLOURS, DASHES, MARKERS, legend, new_figure, set_title, styled, svg
from rankwise.results.stats import Difference, difference, holm, mean, sd, t_interval

PAGE = ROOT / "docs" / "findings.md"
PICTURES = ROOT / "docs" / "pictures"
NAMES = {
    "lora": "LoRA",
    "spaced-lora": "LoRA, spaced",
    "simplex-lora": "SimplexLoRA",
    "weight-lora": "WeightLoRA",
    "lora-fa": "LoRA-FA",
    "sora": "SoRA",
    "adalora": "AdaLoRA",
    "bitfit": "BitFit",
    "head": "the head alone",
    "none": "as it comes",
    "full": "full",
    "fourierft": "FourierFT",
    "ia3": "IA³",
    "tinylora": "TinyLoRA",
    "vb-lora": "VB-LoRA",
    "vera": "VeRA",
}
RANKED = ("lora", "spaced-lora", "squeeze", "simplex-lora", "weight-lora", "lora-fa", "sora", "adalora")
LEVELS = ("none", "head", "full")
"""Methods of one size, which the pictures have as lines across."""
CONTROLS = ("squeeze, permuted", "squeeze, type", "squeeze, uniform", "LoRA of that size")
"""What squeeze is compared with."""
CLAIMS = (
    ("SimplexLoRA is at least as good as LoRA of the same size", ("SimplexLoRA", 8), ("LoRA", 8)),
    ("SimplexLoRA is at least as good as LoRA of the same size", ("SimplexLoRA", 1), ("LoRA", 1)),
    ("WeightLoRA with a third of the adapters is as good as LoRA", ("WeightLoRA", 8), ("LoRA", 8)),
    ("SoRA with 70 % of the parameters is at least as good as LoRA", ("SoRA", 8), ("LoRA", 8)),
    ("LoRA-FA is as good as LoRA", ("LoRA-FA", 8), ("LoRA", 8)),
    ("a pull of B to its start hurts", ("LoRA, pulled", 8), ("LoRA", 8)),
)
"""Of the papers, and the two cells that decide each."""
TINY = 70 * 1024
"""Bytes of the largest file that counts as a tiny adapter."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One method at one size on one task: its reported runs by seed, and the runs that chose its rate."""

    rows: Mapping[int, dict[str, Any]]
    trials: Sequence[dict[str, Any]] = ()

    @property
    def first(self) -> dict[str, Any]:
        return next(iter(self.rows.values()))

    @property
    def method(self) -> str:
        return self.first["method"]

    @property
    def score(self) -> str:
        """What squeeze chose by; empty for other methods."""
        return self.first["options"].get("score", "")

    @property
    def name(self) -> str:
        """The method without its size."""
        options, words = self.first["options"], [NAMES.get(self.method, self.method)]
        if self.score:
            words += [self.score] if self.score != "spectrum" else []
            words += [f"from rank {options['rank']}"] if options["rank"] != 8 else []
            at_the_end = options["every"] * options["times"] == self.first["losses"][-1][0]
            words += ["cut at the end"] if at_the_end else []
        return ", ".join([*words, *(["pulled"] if options.get("pull") else [])])

    @property
    def size(self) -> float | None:
        """Units of rank per site; None where rank is not what decides the size."""
        options = self.first["options"]
        return options.get("mean_rank", options.get("rank")) if self.method in RANKED else None

    @property
    def key(self) -> tuple[bool, float, str]:
        """What the same method has in common on other tasks at this size; the largest comes first."""
        return self.size is None, -(self.size or self.parameters), self.name

    @property
    def scores(self) -> dict[int, float]:
        return {seed: row["value"] for seed, row in self.rows.items()}

    @property
    def parameters(self) -> float:
        """At the end, without the head."""
        return mean([row["result.json"]["parameters"]["final"] for row in self.rows.values()])

    @property
    def bytes(self) -> float:
        """Of the saved file of weights."""
        return mean([row["result.json"]["cost"]["adapter_bytes"] for row in self.rows.values()])

    @property
    def edge(self) -> str:
        """Whether the rate is the lowest or the highest of those tried."""
        rates, own = [row["learning_rate"] for row in self.trials], self.first["learning_rate"]
        return "" if len(set(rates)) < 2 else " ↓" if own == min(rates) else " ↑" if own == max(rates) else ""


@dataclass(frozen=True, eq=False)
class Study:
    """One task: its cells, in the order of their sizes."""

    name: str
    sites: Sequence[str]
    cells: Sequence[Cell]

    @cached_property
    def reference(self) -> Cell | None:
        """LoRA of rank 8."""
        return self.find("LoRA", 8)

    def find(self, name: str, size: float | None) -> Cell | None:
        return next((cell for cell in self.cells if (cell.name, cell.size) == (name, size)), None)

    def plain(self, size: float | None) -> Cell | None:
        """LoRA of this size: of equal rank, or spaced."""
        return self.find("LoRA", size) or self.find("LoRA, spaced", size)

    @property
    def margin(self) -> float:
        """One standard error of the reference's score over the rows that were scored: the mean over its seeds."""
        assert self.reference is not None
        return mean([row["error"] for row in self.reference.rows.values()])


def studies() -> list[Study]:
    """Those with results, in the order of their names."""
    found = []
    for name in STUDIES:
        content = kept(RESULTS / f"{name}.json")
        if content["rows"]:
            found.append(Study(name.removeprefix("study_"), content["sites"], _cells(content["rows"])))
    return found


def _cells(rows: Iterable[dict[str, Any]]) -> list[Cell]:
    by_kind: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        key = f"{row['method']} {sorted(row['options'].items())}"
        by_kind.setdefault(key, {"run": [], "trial": []})[row["kind"]].append(row)
    cells = [Cell({r["seed"]: r for r in each["run"]}, each["trial"]) for each in by_kind.values() if each["run"]]
    return sorted(cells, key=lambda cell: (-cell.parameters, cell.name))


# --- tables


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


def not_worse(cell: Cell, study: Study) -> float | None:
    """The p-value of Student's one-sided test that the mean gap to the reference is below minus the margin."""
    if study.reference is None:
        return None
    shared = sorted(cell.scores.keys() & study.reference.scores.keys())
    above = [cell.scores[seed] - study.reference.scores[seed] + study.margin for seed in shared]
    spread = sd(above)
    if not spread:
        return None
    return float(distributions.t.sf(mean(above) * math.sqrt(len(above)) / spread, len(above) - 1))


def scores(study: Study) -> str:
    """Every cell of a task."""
    rows = []
    for cell in study.cells:
        gap = difference(cell.scores, study.reference.scores) if study.reference else None
        spread = sd(list(cell.scores.values()))
        rows.append(
            [
                *(cell.name, share(cell.size), f"{cell.parameters:,.0f}", f"{cell.bytes / 1024:,.0f} KiB"),
                f"{cell.first['learning_rate']:g}{cell.edge}",
                f"{mean(list(cell.scores.values())):.3f}" + (f" ± {spread:.3f}" if spread is not None else ""),
                *(str(len(cell.scores)), "" if cell is study.reference else signed(gap)),
            ]
        )
    metric = study.cells[0].first["metric"]
    return table(
        ["method", "units a layer", "parameters", "file", "rate", metric, "seeds", "to LoRA, r 8 (95 %)"], rows
    )


def sizes(found: Sequence[Study]) -> str:
    """How much smaller than LoRA of rank 8, and not worse: Holm's correction is over the tasks of a size and method."""
    smaller = {
        study: [c for c in study.cells if c.method not in LEVELS and c.parameters < study.reference.parameters / 2]
        for study in found
        if study.reference
    }
    rows = []
    for key in sorted({cell.key for cells in smaller.values() for cell in cells}):
        cells = {study: cell for study, own in smaller.items() for cell in own if cell.key == key}
        name, size = key[-1], next(iter(cells.values())).size
        p = {study: value for study, cell in cells.items() if (value := not_worse(cell, study)) is not None}
        adjusted = dict(zip(p, holm(list(p.values())), strict=True))
        factors = [study.reference.parameters / cell.parameters for study, cell in cells.items() if study.reference]
        row = [name, share(size), f"{mean(factors):.0f} ×"]
        for study in smaller:
            if study not in cells:
                row.append("")
                continue
            gap = difference(cells[study].scores, study.reference.scores)  # type: ignore[union-attr]
            passed = adjusted.get(study)
            mark = "" if passed is None else " **not worse**" if passed <= 0.05 else f" p {passed:.2f}"
            row.append(f"{gap.mean:+.3f}{mark}" if gap else "")
        rows.append(row)
    return table(["method", "units a layer", "smaller", *(f"{s.name} (± {s.margin:.3f})" for s in smaller)], rows)


def where(found: Sequence[Study]) -> str:
    """What squeeze gains by its choice over each control at the same size."""
    rows, tests = [], []
    for study in found:
        for cell in study.cells:
            if cell.name != "squeeze":
                continue
            for name in CONTROLS:
                other = study.find(name, cell.size) or (study.plain(cell.size) if name == CONTROLS[-1] else None)
                gap = difference(cell.scores, other.scores) if other is not None else None
                if gap is not None and gap.p is not None:  # from two seeds on
                    rows.append([study.name, share(cell.size), name, signed(gap)])
                    tests.append(gap.p)
    return table(
        ["task", "units a layer", "squeeze above", "gap (95 %)", "p", "p, Holm"],
        [[*row, f"{p:.2g}", f"{held:.2g}"] for row, p, held in zip(rows, tests, holm(tests), strict=True)],
    )


def plans(found: Sequence[Study]) -> str:
    """How far the ranks of two seeds agree, and where they are."""
    rows = []
    for study in found:
        for cell in study.cells:
            ranks = [row["ranks"] for row in cell.rows.values() if row.get("ranks")]
            if (
                cell.method not in ("squeeze", "simplex-lora")
                or len(ranks) < 2
                or cell.score in ("uniform", "permuted")
            ):
                continue
            pairs = [float(distributions.spearmanr(a, b).statistic) for a, b in combinations(ranks, 2)]
            units = np.sum(ranks, axis=0)
            kinds: dict[str, int] = {}
            for site, count in zip(study.sites, units.tolist(), strict=True):
                kinds[kind] = kinds.get(kind := re.sub(r"^.*\.\d+\.", "", site), 0) + count
            top = sorted(kinds.items(), key=lambda item: -item[1])[:3]
            rows.append(
                [
                    *(
                        study.name,
                        cell.name,
                        share(cell.size),
                        f"{mean(pairs):+.2f} ({min(pairs):+.2f} … {max(pairs):+.2f})",
                    ),
                    ", ".join(f"{kind} {count / units.sum():.0%}" for kind, count in top),
                ]
            )
    return table(["task", "method", "units a layer", "Spearman between seeds", "most rank in"], rows)


def over_tasks(pairs: Sequence[tuple[Cell, Cell]]) -> Difference | None:
    """The mean over tasks of how far the first of a pair is above the second, over the seeds that all have."""
    seeds = set.intersection(*({*ours.scores} & {*theirs.scores} for ours, theirs in pairs)) if pairs else set()
    sides = [{seed: mean([pair[side].scores[seed] for pair in pairs]) for seed in seeds} for side in (0, 1)]
    return difference(*sides)


def verdict(gap: Difference) -> str:
    low, high = gap.seeds or (0.0, 0.0)
    return "ahead" if low > 0 else "behind" if high < 0 else "no difference shown"


def claims(found: Sequence[Study]) -> str:
    """What papers say, with the gap on each task and over all that have both."""
    rows = []
    for claim, ours, theirs in CLAIMS:
        gaps, pairs = [], []
        for study in found:
            one, other = study.find(*ours), study.find(*theirs)
            gaps.append(signed(difference(one.scores, other.scores)) if one and other else "")
            pairs += [(one, other)] if one and other else []
        if (gap := over_tasks(pairs)) and gap.seeds:
            rows.append([claim, share(ours[1]), *gaps, signed(gap), verdict(gap)])
    return table(["claim", "units a layer", *(study.name for study in found), "mean", "it is"], rows)


def tiny(found: Sequence[Study]) -> str:
    """Every method whose file is tiny, the best mean first, next to spaced LoRA whose file is not larger."""
    cells: dict[tuple[bool, float, str], dict[Study, Cell]] = {}
    for study in found:
        for cell in study.cells:
            if cell.bytes <= TINY and cell.method not in LEVELS:
                cells.setdefault(cell.key, {})[study] = cell
    rows = []
    for own in cells.values():
        first = next(iter(own.values()))
        pairs = []
        for study, cell in own.items():
            plain = [c for c in study.cells if c.name == "LoRA, spaced" and c.bytes <= 1.05 * cell.bytes]
            pairs += [(cell, plain[0])] if plain and cell is not plain[0] else []
        gap = over_tasks(pairs) if len(pairs) == len(own) else None
        means = [mean(list(own[each].scores.values())) if each in own else None for each in found]
        row = [first.name, share(first.size), f"{mean([c.parameters for c in own.values()]):,.0f}"]
        row += [f"{mean([c.bytes for c in own.values()]) / 1024:,.0f} KiB", *(f"{m:.3f}" if m else "" for m in means)]
        measured = [each for each in means if each is not None]
        rows.append((len(measured), mean(measured), [*row, f"{mean(measured):.3f}", signed(gap)]))
    names = [study.name for study in found]
    titles = ["method", "units a layer", "parameters", "file", *names, "mean", "to LoRA, spaced (95 %)"]
    return table(titles, [row for *_, row in sorted(rows, key=lambda each: each[:2], reverse=True)])


# --- pictures


@styled
def curve(study: Study) -> Figure:
    """Score against parameters, with intervals over the seeds."""
    figure, axes = new_figure(3.4)
    lines: dict[str, list[Cell]] = {}
    for cell in study.cells:
        if cell.method not in LEVELS:
            lines.setdefault("LoRA" if cell.method in ("lora", "spaced-lora") else cell.name, []).append(cell)
    for look, (name, cells) in enumerate(sorted(lines.items())):
        shift = 1.04 ** (look - len(lines) / 2)  # so that intervals do not hide each other
        means = [mean(list(c.scores.values())) for c in cells]
        ends = [t_interval(list(c.scores.values())) or (m, m) for c, m in zip(cells, means, strict=True)]
        axes.errorbar(
            [c.parameters * shift for c in cells],
            means,
            yerr=[
                [m - low for m, (low, _) in zip(means, ends, strict=True)],
                [high - m for m, (_, high) in zip(means, ends, strict=True)],
            ],
            color=COLOURS[look % len(COLOURS)],
            marker=MARKERS[look % len(MARKERS)],
            linestyle=DASHES[look % len(DASHES)],
            markersize=4,
            linewidth=1.1,
            capsize=2,
            label=name,
        )
    for cell in (each for each in study.cells if each.method in LEVELS):
        level = mean(list(cell.scores.values()))
        axes.axhline(level, color="#777777", linewidth=0.8, linestyle=(0, (2, 2)))
        axes.annotate(cell.name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if study.reference:
        level = mean(list(study.reference.scores.values()))
        axes.axhspan(level - study.margin, level, color="#0072B2", alpha=0.08, linewidth=0)
    axes.set(xscale="log", xlabel="parameters, without the head", ylabel=study.cells[0].first["metric"])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    legend(figure, axes)
    set_title(axes, f"{study.name}: score and size")
    return figure


BLOCKS: dict[str, Callable[[Sequence[Study]], str]] = {
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
    for name, block in {**BLOCKS, "tasks": tasks}.items():
        marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n)(?:(?!<!-- end).)*(<!-- end -->)", re.DOTALL)
        text, count = marks.subn(lambda mark, block=block: f"{mark[1]}\n{block(found)}\n\n{mark[2]}", text)
        assert count == 1, name
    return text


if __name__ == "__main__":
    everything = studies()
    for each in everything:
        write_whole(PICTURES / f"study_{each.name}.svg", svg(curve(each)))
    write_whole(PAGE, written(PAGE.read_text(encoding="utf-8"), everything))
    print(f"docs/findings.md: {', '.join(each.name for each in everything) or 'no results yet'}")
