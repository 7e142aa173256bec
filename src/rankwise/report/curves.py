"""Curves over the steps of training: mean over the seeds with a band, alone or in panels by rank and rate.

Every function returns a `matplotlib.figure.Figure`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rankwise.pictures.style import (
    COLOURS,
    DASHES,
    MARKERS,
    WIDTH,
    bare_figure,
    legend,
    look_of,
    new_figure,
    set_title,
    short,
    styled,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = "band: one sample standard deviation over seeds"


@dataclass(frozen=True)
class Line:
    """One curve per seed: `curves` is a list of (steps, values), each pair of equal length."""

    label: str
    look: int
    curves: Sequence[tuple[Sequence[float], Sequence[float]]]


@styled
def curves(lines: Sequence[Line], ylabel: str, title: str) -> Figure:
    """Mean over seeds with a band of one sample standard deviation, at the steps that every seed has.

    A line of a single seed has no band. Lines without a common step are left out.
    """
    figure, axes = new_figure(3.6)
    banded = _lines(axes, lines)
    axes.set(xlabel="optimizer step", ylabel=short(ylabel))
    set_title(axes, title)
    legend(figure, axes, note=BAND if banded else "")
    return figure


@styled
def panels(cells: Mapping[tuple[int, float], Sequence[Line]], ylabel: str, title: str) -> Figure:
    """`curves` for every (rank, learning rate): ranks down, rates across, all with the same axes.

    A combination without a run stays empty. Raises ValueError for no cells.
    """
    if not cells:
        raise ValueError("no curves to draw: there is no combination of rank and rate")
    ranks, rates = sorted({rank for rank, _ in cells}), sorted({rate for _, rate in cells})
    figure = bare_figure(1.1 + 1.25 * len(ranks), max(WIDTH, 0.9 + 1.55 * len(rates)))
    grid = figure.subplots(len(ranks), len(rates), sharex=True, sharey=True, squeeze=False)
    banded = False
    for (row, rank), (column, rate) in itertools.product(enumerate(ranks), enumerate(rates)):
        axes = grid[row, column]
        axes.tick_params(labelsize=8)
        axes.locator_params(nbins=4)
        if (rank, rate) in cells:
            banded |= _lines(axes, cells[rank, rate], thin=True)
        else:
            axes.text(0.5, 0.5, "no run", transform=axes.transAxes, ha="center", va="center", color="#666666")
        if row == 0:
            axes.set_title(f"rate {rate:g}", fontsize=9, loc="center")
        if row == len(ranks) - 1:
            axes.set_xlabel("optimizer step", fontsize=8)
        if column == 0:
            axes.set_ylabel(f"rank {rank}", fontsize=9)
    figure.supylabel(short(ylabel), fontsize=9)
    figure.suptitle(wrapped(title, 14 * figure.get_figwidth()), fontsize=10.5, x=0.01, ha="left")
    drawn = [axes for axes in grid.flat if axes.get_legend_handles_labels()[0]]
    labels = {label: handle for axes in drawn for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend(figure, drawn[0], note=BAND if banded else "", handles=labels)
    return figure


def mean_and_spread(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Steps that all curves share (n,), the mean there (n,), the sample deviation (n,) or None for one curve."""
    tables = [dict(zip(steps, values, strict=True)) for steps, values in curves if len(steps)]
    if not tables:
        return np.array([]), np.array([]), None
    shared = sorted(set(tables[0]).intersection(*tables[1:]))
    values = np.array([[table[step] for step in shared] for table in tables], dtype=float)  # (seeds, n)
    spread = values.std(axis=0, ddof=1) if len(tables) > 1 else None
    return np.array(shared), values.mean(axis=0), spread


def _lines(axes: Axes, lines: Sequence[Line], thin: bool = False) -> bool:
    """Draw the means, with bands where there are several seeds, and return whether there is a band."""
    banded = False
    for line in lines:
        steps, mean, spread = mean_and_spread(line.curves)
        if not len(steps):
            continue
        colour = COLOURS[line.look % len(COLOURS)]
        axes.plot(
            steps,
            mean,
            color=colour,
            linestyle=look_of(DASHES, line.look),
            linewidth=1.1 if thin else 1.6,
            marker=look_of(MARKERS, line.look) if len(steps) <= 25 else None,
            markersize=2.5 if thin else 4,
            label=short(line.label),
        )
        if spread is not None:
            banded = True
            axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.16, linewidth=0)
    axes.locator_params(axis="x", integer=True)
    return banded
