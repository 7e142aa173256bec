"""Scores against size, cost and learning rate. Every function returns a `matplotlib.figure.Figure`.

Bars are intervals or deviations over the seeds; the legend says which.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rankwise.pictures.style import (
    COLOURS,
    DASHES,
    MARKERS,
    bare_figure,
    legend,
    look_of,
    new_figure,
    set_title,
    short,
    styled,
)
from rankwise.results.formats import duration, size
from rankwise.results.tuning import Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

TIMES = [1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 900, 1800, *(3600 * 2**power for power in range(20))]
"""Seconds between the ticks of an axis of time."""


@dataclass(frozen=True)
class Point:
    """A score at `x` parameters, seconds or bytes. `bar`: where its bar ends, or None.

    Points of one label are one method in several sizes.
    """

    label: str
    look: int
    x: float
    score: float
    bar: tuple[float, float] | None = None


@dataclass(frozen=True)
class Tried:
    """All rates that were tried for one method, and the one that was chosen."""

    label: str
    look: int
    rates: Sequence[Rate]
    chosen: float | None = None


@styled
def score_by_parameters(
    points: Sequence[Point], metric: str, error: str, title: str = "Score against parameters"
) -> Figure:
    """One mark per method and size: parameters across, score up. `error` names what the bars show, for the caption.

    Several sizes of one method are joined by a line. Methods of equal size are drawn side by side (moved on
    paper, not in the data), because equal budgets are the usual case and would hide each other. The axis is
    logarithmic when sizes differ by more than three times; a size of 0 then stands at its left end.
    """
    figure, axes = new_figure(3.6)
    sizes = [point.x for point in points]
    low, high = min(sizes, default=0), max(sizes, default=1)
    smallest = min((count for count in sizes if count), default=1)
    wide = high / smallest > 3
    if wide and low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 2, high * 2)
        _few_ticks(axes, low / 2, high * 2)
    elif wide:
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.6)
        axes.set_xlim(-smallest / 2, high * 3)
        powers = range(math.ceil(math.log10(smallest)), math.ceil(math.log10(high * 3)))
        axes.set_xticks([0, *(10.0**power for power in powers)])
    else:
        axes.set_xlim(-0.15 * max(high, 1), 1.3 * max(high, 1))
    axes.minorticks_off()
    _room(axes, points)

    def near(one: float, other: float) -> bool:
        return abs(one - other) <= 0.04 * (max(one, other) if wide else high)

    moved = _marks(figure, axes, points, near)
    axes.xaxis.set_major_formatter(lambda value, _: "" if value < 0 else short_count(value))
    axes.set(xlabel="parameters kept at the end, head not counted", ylabel=short(metric))
    set_title(axes, title)
    legend(figure, axes, note=f"{error}; equal sizes stand side by side" if moved else error)
    return figure


@styled
def score_by_cost(
    seconds: Sequence[Point], memory: Sequence[Point], metric: str, error: str, title: str = "Score against cost"
) -> Figure:
    """Two pictures with one score axis: against the time of a run in seconds, and against its peak memory in bytes."""
    figure = bare_figure(3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, points, label, shown, steps in (
        (left, seconds, "time of a run", duration, TIMES),
        (right, memory, "peak memory", size, [2.0**power for power in range(20, 60)]),
    ):
        _marks(figure, axes, points)
        low, high = min(point.x for point in points), max(point.x for point in points)
        pad = 0.2 * (high - low or high or 1.0)
        low, high = max(-pad / 4, low - pad), high + pad  # all of a mark at 0 is seen
        step = next((each for each in steps if each > (high - low) / 4), steps[-1])
        if math.ceil(low / step) >= math.floor(high / step):  # fewer than two ticks show no scale
            low, high = math.floor(max(0.0, low) / step) * step, (math.floor(high / step) + 1) * step
        ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, [_cost(shown, tick) for tick in ticks], fontsize=8.5)
        axes.set_xlabel(label)
    _room(left, seconds)
    left.set_ylabel(short(metric))
    set_title(left, title)
    legend(figure, left, note=error)
    return figure


@styled
def score_by_rate(methods: Sequence[Tried], metric: str, title: str = "Score by learning rate") -> Figure:
    """A line per method: learning rate across, mean score up, bars of one sample standard deviation over the seeds.

    A ring marks the rate that was chosen.
    """
    figure, axes = new_figure(3.6)
    rates = sorted({each.learning_rate for method in methods for each in method.rates})
    axes.set_xscale("log")
    apart = min(3.0, 12.0 / max(1, len(methods)))
    drawn = []
    for place, method in enumerate(methods):
        points = [
            Point(method.label, method.look, each.learning_rate, each.mean, _around(each.mean, each.sd))
            for each in method.rates
        ]
        line = _line(figure, axes, points, apart * (place - (len(methods) - 1) / 2), marker=5)
        ring = [point for point in points if point.x == method.chosen]
        axes.plot(
            [point.x for point in ring],
            [point.score for point in ring],
            "o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=line.get_color(),
            markeredgewidth=1.4,
            transform=line.get_transform(),
        )
        drawn += points
    _room(axes, drawn)
    axes.set_xlim(rates[0] / 1.6, rates[-1] * 1.6)
    kept: list[float] = []  # a tick at each rate, unless two would stand too close
    for rate in rates:
        if not kept or math.log(rate / kept[-1]) > 0.09 * math.log(2.56 * rates[-1] / rates[0]):
            kept.append(rate)
    axes.set_xticks(kept, [f"{rate:g}" for rate in kept], fontsize=8.5)
    axes.minorticks_off()
    axes.set(xlabel="learning rate", ylabel=short(metric))
    set_title(axes, title)
    several = any(each.sd is not None for method in methods for each in method.rates)
    bars = "; bars: one sample standard deviation over seeds" if several else ""
    legend(figure, axes, note=f"ring: the rate chosen{bars}")
    return figure


def short_count(value: float) -> str:
    """1234567 as `1.23M`: a count with at most three figures."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def _marks(
    figure: Figure, axes: Axes, points: Sequence[Point], near: Callable[[float, float], bool] | None = None
) -> bool:
    """Draw the points with their bars, those of labels `near` each other moved apart; returns whether any were."""
    labels = list(dict.fromkeys(point.label for point in points))
    beside = {label: {label} for label in labels}
    for one, other in itertools.combinations(points, 2):
        if near and one.label != other.label and near(one.x, other.x):
            joined = beside[one.label] | beside[other.label]
            beside |= dict.fromkeys(joined, joined)
    for label in labels:
        group = [each for each in labels if each in beside[label]]
        shift = min(8.0, 64.0 / len(group)) * (group.index(label) - (len(group) - 1) / 2)
        _line(figure, axes, [point for point in points if point.label == label], shift, marker=6.5)
    return any(len(group) > 1 for group in beside.values())


def _line(figure: Figure, axes: Axes, points: Sequence[Point], shift: float, marker: float) -> Line2D:
    """Draw the points of one label with their bars, joined by a line and all moved right by `shift` points on paper."""
    from matplotlib.transforms import ScaledTranslation

    points = sorted(points, key=lambda point: point.x)
    look = points[0].look
    line: Line2D = axes.errorbar(
        [point.x for point in points],
        [point.score for point in points],
        yerr=np.transpose([_lengths(point) for point in points]) if any(point.bar for point in points) else None,
        marker=look_of(MARKERS, look),
        color=COLOURS[look % len(COLOURS)],
        markersize=marker,
        capsize=3,
        linestyle=look_of(DASHES, look) if len(points) > 1 else "none",
        linewidth=1.4,
        label=short(points[0].label),
        transform=axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans),  # 72 points an inch
    )[0]
    return line


def _around(mean: float, sd: float | None) -> tuple[float, float] | None:
    return None if sd is None else (mean - sd, mean + sd)


def _lengths(point: Point) -> tuple[float, float]:
    """How far the bar of a point goes down and up from it."""
    return (point.score - point.bar[0], point.bar[1] - point.score) if point.bar else (math.nan, math.nan)


def _room(axes: Axes, points: Sequence[Point]) -> None:
    ends = [end for point in points for end in point.bar or (point.score,)] or [0.0, 1.0]
    pad = 0.12 * (max(ends) - min(ends)) or 0.05
    axes.set_ylim(min(ends) - pad, max(ends) + pad)


def _few_ticks(axes: Axes, low: float, high: float) -> None:
    """Ticks at powers of ten, and also at multiples of these if there would be too few."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [power * factor for power in powers for factor in factors if low <= power * factor <= high]
        if len(ticks) > 2:
            break
    axes.set_xticks(ticks)


def _cost(shown: Callable[[float], str], value: float) -> str:
    """A round time or size without its zeros: `5 min`, `1 GiB`."""
    return shown(value).replace(".0 ", " ").removesuffix(" 0 s").removesuffix(" 0 min")
