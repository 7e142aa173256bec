"""The pictures of docs/findings.md."""

from collections.abc import Iterable, Sequence
from typing import Any

from cells import ENOUGH, LEVELS, Cell, Start, Study
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from rankwise.pictures.style import COLOURS, DASHES, MARKERS, bare_figure, legend, look_of, set_title, styled
from rankwise.results.stats import mean, t_interval


@styled
def curve(study: Study) -> Figure:
    """Score against parameters, with intervals over the seeds: methods with ranks above, others next to LoRA below."""
    figure = bare_figure(5.6)
    panels = figure.subplots(2, sharex=True, sharey=True)
    lines: dict[str, list[Cell]] = {}
    for cell in study.cells:
        if cell.method not in LEVELS:
            lines.setdefault("LoRA" if cell.name in ("LoRA", "LoRA, spaced") else cell.name, []).append(cell)
    ranked = {name: any(any(cell.first["ranks"]) for cell in cells) for name, cells in lines.items()}
    order = sorted(lines, key=lambda name: (name != "LoRA", not ranked[name], name))
    for look, (name, cells) in enumerate((name, lines[name]) for name in order):
        for axes in panels if name == "LoRA" else panels[:1] if ranked[name] else panels[1:]:
            shift = 1.3 ** (look / len(lines) - 0.5) if name != "LoRA" else 1.0  # what has one size stands side by side
            course(axes, name, cells, look, shift)
    for axes in panels:
        for cell in (each for each in study.cells if each.method in LEVELS):
            level = mean(list(cell.scores.values()))
            axes.axhline(level, color="#777777", linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(
                cell.name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
        if study.reference and study.margin:
            level = mean(list(study.reference.scores.values()))
            axes.axhspan(level - study.margin, level, color="#0072B2", alpha=0.08, linewidth=0)
        axes.set_ylabel(study.cells[0].first["metric"])
    panels[1].set(xscale="log", xlabel="parameters, without the head")
    panels[1].xaxis.set_major_formatter("{x:,.0f}")
    panels[1].xaxis.set_minor_formatter(NullFormatter())
    note = "bars: 95 % t-intervals over seeds; band: at most a margin below LoRA of rank 8"
    legend(figure, panels[0], f"{note}\nLoRA below rank 1 is spaced LoRA", labels(panels))
    set_title(panels[0], f"{study.name}: score and size")
    return figure


def course(axes: Axes, name: str, cells: Sequence[Cell], look: int, shift: float) -> None:
    """The line of a method, shifted so that intervals do not hide each other. Less than three seeds have none."""
    means = [mean(list(c.scores.values())) for c in cells]
    ends = [
        (len(c.scores) >= ENOUGH and t_interval(list(c.scores.values()))) or (m, m)
        for c, m in zip(cells, means, strict=True)
    ]
    axes.errorbar(
        [c.parameters * shift for c in cells],
        means,
        yerr=[
            [m - low for m, (low, _) in zip(means, ends, strict=True)],
            [high - m for m, (_, high) in zip(means, ends, strict=True)],
        ],
        color=COLOURS[look % len(COLOURS)],
        marker=look_of(MARKERS, look),
        linestyle=look_of(DASHES, look),
        markersize=4,
        linewidth=1.1,
        capsize=2,
        label=name,
    )


@styled
def losses(starts: Sequence[Start]) -> Figure:
    """The loss of each start over the steps, the mean over its seeds; a panel for each rate."""
    rates = sorted({start.of[2] for start in starts})
    figure = bare_figure(2.2 * len(rates))
    panels = figure.subplots(len(rates), sharex=True, sharey=True, squeeze=False)[:, 0]
    names = list(dict.fromkeys(name_of(start) for start in starts))
    for axes, rate in zip(panels, rates, strict=True):
        for start in (each for each in starts if each.of[2] == rate):
            steps = [step for step, _ in next(iter(start.rows.values()))["losses"]]
            look = names.index(name_of(start))
            axes.plot(
                steps,
                [mean([*start.losses(step, step).values()]) for step in steps],
                color=COLOURS[look % len(COLOURS)],
                marker=look_of(MARKERS, look),
                linestyle=look_of(DASHES, look),
                markersize=3,
                linewidth=1.1,
                label=name_of(start),
            )
        axes.set_ylabel(f"rate {rate:g}\ntraining loss")
    panels[-1].set_xlabel("step")
    legend(figure, panels[0], "means over seeds, of ten steps each", labels(panels))
    set_title(panels[0], "sst2: random and SVD starts")
    return figure


def labels(panels: Iterable[Axes]) -> dict[str, Any]:
    """What is drawn in any of the panels, by name."""
    return {label: mark for axes in panels for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}


def name_of(start: Start) -> str:
    method, alpha, _ = start.of
    return f"{method}, α {alpha:g}, {start.init}"
