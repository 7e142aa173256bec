"""From rows of results to the pictures of a page, each with words for those who cannot see it."""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rankwise.metrics import with_direction
from rankwise.pictures import heat, style
from rankwise.report import curves, plots
from rankwise.results.formats import duration, plus_minus, size
from rankwise.results.rows import Row
from rankwise.results.tuning import Rate
from rankwise.runs import record
from rankwise.runs.record import Ranks, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 60  # most points in one curve
SIZES = {"rank", "size", "prefix", "infix", "blocks", "keep", "budget"}
"""Options of methods that only make them larger or smaller."""
Value = Callable[[Step], float | None]
"""Reads a value from a line of `metrics.jsonl`; None for a line that has none."""


@dataclass(frozen=True)
class Picture:
    """A figure as a data URL, and words for those who cannot see it."""

    source: str
    alt: str
    wide: bool = False
    """Whether its text would be too small to read at the width of a phone."""

    @classmethod
    def of(cls, figure: "Figure", alt: str) -> "Picture":
        return cls._of(style.svg(figure).encode(), "svg+xml", alt, figure.get_figwidth() > 1.2 * style.WIDTH)

    @classmethod
    def png(cls, content: bytes, alt: str) -> "Picture":
        return cls._of(content, "png", alt)

    @classmethod
    def _of(cls, content: bytes, kind: str, alt: str, wide: bool = False) -> "Picture":
        return cls(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", alt, wide)


def of_task(best: Sequence[Row], rows: Sequence[Row], title: str) -> list[Picture]:
    """All pictures of one task except those of ranks: `best` has a row per method, `rows` one per learning rate too."""
    looks = {row.method: place for place, row in enumerate(best)}
    return [
        *_sizes(best, looks, title),
        *_rates(best, rows, looks, title),
        *_costs(best, looks, title),
        *_curves(best, looks, title),
        *_panels(rows, looks, title),
    ]


@dataclass(frozen=True)
class RankCourse:
    """Where a method put the rank: its label, a sentence or two, and pictures."""

    label: str
    text: str
    figures: Sequence[Picture] = ()


def of_ranks(row: Row) -> RankCourse | None:
    """Words and pictures of where the rank went; None for a method without sites or whose ranks cannot move."""
    histories = {seed: history(folder) for seed, folder in row.folders.items()}
    seed = min((seed for seed, lines in histories.items() if lines), default=None)
    if seed is None or not any(len(changes(lines)) > 1 or _searched(lines) for lines in histories.values()):
        return None
    course = changes(histories[seed])
    steps = max((line.step for line in record.course(row.folders[seed])), default=course[-1][0])
    final = course[-1][1]
    words = f"Seed {seed}, learning rate {row.learning_rate:g}. {in_words(course)}"
    if len(course) == 1:
        return RankCourse(row.method, words)
    ends = [changes(each)[-1][1] for each in histories.values() if each]
    if len(ends) > 1:
        moved = [site for site, rank in course[0][1].items() if any(end.get(site) != rank for end in ends)]
        same = sum(len({end.get(site) for end in ends}) == 1 for site in moved)
        words += f" {_agreement(len(ends), len(final), len(moved), same)}"
    label = f"{row.method}, seed {seed}"
    top = max(rank for _, ranks in course for rank in ranks.values())
    listed = ", ".join(f"{site} {rank}" for site, rank in final.items())
    over_time = heat.ranks_over_time(course, steps, f"Ranks over time: {label}")
    figures = [Picture.of(over_time, f"Rank of each site by step. {words}")]
    if len(course) > 2:
        frames = heat.ranks_in_steps(course, f"Ranks by projection and layer: {label}")
        figures.append(Picture.of(frames, f"Ranks by projection and layer at some steps. {words}"))
    end = heat.rank_picture(final, title=f"Final ranks: {label}", top=top)
    figures.append(Picture.of(end, f"Final ranks: {listed}"))
    return RankCourse(row.method, words, figures)


def _agreement(seeds: int, layers: int, moved: int, same: int) -> str:
    """How far the seeds agree on the ranks of the layers whose rank changed at all."""
    if not moved:
        return f"No layer changed rank in any of {seeds} seeds."
    doubt = ", so do not read much into the picture" if 2 * same < moved else ""
    agreed = "all of them" if same == moved else str(same)
    return (
        f"{moved} of {layers} layers changed rank in at least one of {seeds} seeds; the seeds agree on {agreed}{doubt}."
    )


def history(folder: Path) -> list[Ranks]:
    """The lines of a run's `ranks.jsonl` that name sites."""
    return [line for line in record.rank_course(folder) if line.ranks]


def changes(lines: Sequence[Ranks]) -> list[tuple[int, Mapping[str, int]]]:
    """(step, ranks) at the start and wherever the ranks changed."""
    changed: list[tuple[int, Mapping[str, int]]] = []
    for line in lines:
        if not changed or line.ranks != changed[-1][1]:
            changed.append((line.step, line.ranks))
    return changed


def in_words(course: Sequence[tuple[int, Mapping[str, int]]]) -> str:
    """What `changes` found, in a sentence."""
    final = course[-1][1]
    if len(course) == 1:
        return f"The search found no reason to move: all ranks stayed as they were ({_range(final)})."
    empty = sum(rank == 0 for rank in final.values())
    words = f"{_plural(len(course) - 1, 'change')}; at the end ranks of {_range(final)}"
    return f"{words}, {_plural(empty, 'site')} empty." if empty else f"{words}."


def curve(lines: Iterable[Step], value: Value) -> tuple[list[float], list[float]]:
    """Steps and finite values, averaged in groups if there are more than POINTS."""
    points = [(line.step, each) for line in lines if (each := value(line)) is not None and math.isfinite(each)]
    many = -(-len(points) // POINTS) or 1
    groups = [points[start : start + many] for start in range(0, len(points), many)]
    return [group[-1][0] for group in groups], [fmean(each for _, each in group) for group in groups]


def loss(line: Step) -> float | None:
    """The training loss in a line of `metrics.jsonl`; None in a line of another kind."""
    return line.loss


def evaluated(name: str) -> Value:
    """A reader of the metric `name` from a line of `metrics.jsonl`."""
    return lambda line: line.eval.get(name)


def families(methods: Sequence[str]) -> dict[str, str]:
    """Method -> what to call it together with its other sizes; the method itself if it has only one."""
    labels = list(dict.fromkeys(methods))
    words = {label: [word for word in label.split(" ") if word.partition("=")[0] not in SIZES] for label in labels}
    # alpha often goes with the rank, and is dropped too if each size has one
    bare = {label: " ".join(word for word in words[label] if not word.startswith("alpha=")) for label in labels}
    named = {}
    for label in labels:
        like = [other for other in labels if bare[other] == bare[label]]
        by_size = {tuple(word for word in other.split(" ") if word.partition("=")[0] in SIZES) for other in like}
        if len(by_size) < len(like):
            like = [other for other in labels if words[other] == words[label]]
            named[label] = " ".join(words[label]) if len(like) > 1 else label
        else:
            named[label] = bare[label] if len(like) > 1 else label
    return named


def _sizes(best: Sequence[Row], looks: Mapping[str, int], title: str) -> list[Picture]:
    scored = _scored(best)
    if not scored:
        return []
    named = families([row.method for row in scored])
    first = {named[row.method]: looks[row.method] for row in reversed(scored)}
    points = [
        plots.Point(name := named[row.method], first[name], row.final, _mean(row), row.interval) for row in scored
    ]
    figure = plots.score_by_parameters(
        points, with_direction(scored[0].score), _bars(scored), f"{title}: score against size"
    )
    words = "; ".join(f"{row.method}: {plus_minus(row.mean, row.sd)}" for row in scored)
    return [Picture.of(figure, f"Score against the parameters kept. {words}")]


def _costs(best: Sequence[Row], looks: Mapping[str, int], title: str) -> list[Picture]:
    scored = _scored(best)
    if len(scored) < 2:
        return []
    seconds, memory = (
        [plots.Point(row.method, looks[row.method], getattr(row, key), _mean(row), row.interval) for row in scored]
        for key in ("seconds", "peak_memory")
    )
    metric = with_direction(scored[0].score)
    figure = plots.score_by_cost(seconds, memory, metric, _bars(scored), f"{title}: score against cost")
    words = "; ".join(
        f"{row.method}: {plus_minus(row.mean, row.sd)}, {duration(row.seconds)}, {size(row.peak_memory)}"
        for row in scored
    )
    return [Picture.of(figure, f"Score against the time of a run and its peak memory. {words}")]


def _scored(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.mean is not None and math.isfinite(row.mean)]


def _mean(row: Row) -> float:
    assert row.mean is not None, "only rows with a score are drawn"
    return row.mean


def _bars(rows: Sequence[Row]) -> str:
    if any(row.interval for row in rows):
        return "bars: 95 % t-interval of the mean over seeds"
    return "one seed: no bars" if all(row.n == 1 for row in rows) else "seeds equal: no bars"


def _rates(best: Sequence[Row], rows: Sequence[Row], looks: Mapping[str, int], title: str) -> list[Picture]:
    """Score by rate of the methods that were tried at several, a picture for each set of rows that were scored."""
    reported: dict[str, list[Rate]] = {}
    for row in _scored([row for row in rows if row.tuned is None]):
        reported.setdefault(row.method, []).append(Rate(row.learning_rate, row.scores))
    tried: dict[str, list[plots.Tried]] = {}
    for row in best:
        if row.tuned:
            where, rates, chosen = f" on {row.tuned.split.name}", row.tuned.rates, row.tuned.learning_rate
        else:
            where, rates, chosen = "", reported.get(row.method, []), row.learning_rate
        if len({rate.learning_rate for rate in rates}) > 1:
            tried.setdefault(where, []).append(plots.Tried(row.method, looks[row.method], rates, chosen))
    pictures = []
    for where, methods in tried.items():
        metric = f"{with_direction(best[0].score)}{where}"
        words = "; ".join(
            f"{method.label}: "
            + ", ".join(f"{plus_minus(rate.mean, rate.sd)} at {rate.learning_rate:g}" for rate in method.rates)
            + f", chosen {method.chosen:g}"
            for method in methods
        )
        figure = plots.score_by_rate(methods, metric, f"{title}: score by learning rate")
        pictures.append(Picture.of(figure, f"Score by learning rate. {metric}: {words}"))
    return pictures


def _curves(best: Sequence[Row], looks: Mapping[str, int], title: str) -> list[Picture]:
    runs = {row.method: _runs(row) for row in best}
    wanted: list[tuple[str, str, Value]] = [("training loss", "training loss", loss)]
    for name in dict.fromkeys(name for each in runs.values() for run in each for line in run for name in line.eval):
        shown = "evaluation loss" if name == "loss" else name
        wanted.append((f"{shown} during training", shown, evaluated(name)))
    pictures = []
    for what, label, value in wanted:
        lines = [curves.Line(name, looks[name], [curve(run, value) for run in each]) for name, each in runs.items()]
        if any(len(steps) > 1 for line in lines for steps, _ in line.curves):  # one point is not a curve
            figure = curves.curves(lines, label, f"{title}: {what}")
            words = f"{what} by optimizer step, a line per method at its best learning rate"
            pictures.append(Picture.of(figure, words))
    return pictures


def _panels(rows: Sequence[Row], looks: Mapping[str, int], title: str) -> list[Picture]:
    """Loss and main metric by rank and learning rate, of the methods that were run at several of both."""
    ranked = [row for row in rows if row.options.get("rank") is not None]
    named = families([row.method for row in ranked])

    def several(row: Row) -> bool:
        like = [other for other in ranked if named[other.method] == named[row.method]]
        return all(len(set(each)) > 1 for each in zip(*(_place(other) for other in like), strict=True))

    ranked = [row for row in ranked if several(row)]
    if not ranked:
        return []
    first = {named[row.method]: looks[row.method] for row in reversed(ranked)}
    metric = ranked[0].score
    pictures = []
    for label, value in (("training loss", loss), (metric, evaluated(metric))):
        cells: dict[tuple[int, float], list[curves.Line]] = {}
        for row in ranked:
            name = named[row.method]
            drawn = [curve(run, value) for run in _runs(row)]
            if any(len(steps) > 1 for steps, _ in drawn):
                cells.setdefault(_place(row), []).append(curves.Line(name, first[name], drawn))
        if cells:
            figure = curves.panels(cells, label, f"{title}: {label} by rank and learning rate")
            pictures.append(Picture.of(figure, f"{label} during training, a panel for each rank and learning rate"))
    return pictures


def _place(row: Row) -> tuple[int, float]:
    return row.options["rank"], row.learning_rate


def _runs(row: Row) -> list[list[Step]]:
    return [record.course(folder) for folder in row.folders.values()]


def _searched(lines: Sequence[Ranks]) -> bool:
    """Whether the method looked for ranks at all: a search writes its weights along with the ranks."""
    return any(line.weights is not None for line in lines)


def _range(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return f"{low}" if low == high else f"{low} to {high}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
