"""The pictures of docs/performance.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.pictures.style import COLOURS, MARKERS, bare_figure, legend, new_figure, set_title, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW = 0.24
"""Inches."""


@styled
def steps(series: dict[str, dict[str, list[float]]], goal: float, title: str) -> Figure:
    """A row for each arm, with a mark for each series: quartiles of its step over the limit."""
    names = list(dict.fromkeys(name for arms in series.values() for name in arms))
    figure, axes = new_figure(1.4 + ROW * len(names), 6.4)
    axes.axvline(1, color="#555555", linewidth=1)
    axes.axvspan(1, goal, color="#009E73", alpha=0.12, linewidth=0, label=f"goal of rankwise: at most {goal:.2f}")
    for number, (label, arms) in enumerate(series.items()):
        place = [names.index(name) + 0.3 * (number - (len(series) - 1) / 2) for name in arms]
        low, middle, high = zip(*arms.values(), strict=True)
        colour = COLOURS[number]
        axes.hlines(place, low, high, color=colour, linewidth=1.6)
        axes.plot(middle, place, MARKERS[number], color=colour, markersize=5, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("time of a step ÷ the least possible (median and quartiles)")
    axes.grid(axis="y", visible=False)
    set_title(axes, title)
    legend(figure, axes)
    return figure


@styled
def growth(axes_of: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """A column for each axis: above what a step takes and saves over the limit, below a rank change over a step."""
    figure = bare_figure(4.6, 7.2)
    panels = figure.subplots(2, len(axes_of), sharex="col", sharey="row", squeeze=False)
    for column, (axis, rows) in enumerate(axes_of.items()):
        values = [row[axis] for row in rows]
        above, below = panels[:, column]
        lines = {
            "LoRA's step ÷ limit": [row["over limit"][1] for row in rows],
            "SimplexLoRA's step ÷ LoRA's": [row["search over lora"][1] for row in rows],
            "saved by LoRA ÷ limit": [row["kept"] / row["kept by limit"] for row in rows],
        }
        for number, (label, line) in enumerate(lines.items()):
            above.plot(values, line, marker=MARKERS[number], color=COLOURS[number], markersize=4.5, label=label)
        changes = [row["change over step"][1] for row in rows]
        below.plot(values, changes, marker=MARKERS[3], color=COLOURS[3], markersize=4.5, label="a rank change ÷ step")
        below.set(xscale="log", yscale="log", xlabel=axis)
        below.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
        below.minorticks_off()
        below.yaxis.set_major_formatter("{x:g}")  # not by the markup for mathematics, which is off
        above.set_ylim(bottom=0)
    panels[0, 0].set_ylabel("ratio")
    panels[1, 0].set_ylabel("ratio")
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    handles = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels()), strict=True))
    handles |= dict(zip(*reversed(panels[1, 0].get_legend_handles_labels()), strict=True))
    legend(figure, panels[0, 0], handles=handles)
    return figure
