"""The pictures of a report, drawn with matplotlib and without a display.

Every function returns a `matplotlib.figure.Figure`; `svg` and `save` write it. Figures are five inches wide, so that
their text is still ten pixels tall on a phone. Methods are told apart by colour (those of Okabe and Ito, which
colour-blind readers can separate), marker and dash at once.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from rankwise.config import need
from rankwise.runs.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
WIDTH = 5.0  # inches
ROWS_WITH_NAMES = 80  # above this many sites a heat map names layers only
SAYS_NOTHING = {"dense", "linear"}  # endings of module names
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "rankwise",  # the same data give the same bytes
}


@dataclass(frozen=True)
class Place:
    """Where a site sits: `layer` is None for a weight outside the stack of layers (a pooler, an output head)."""

    layer: int | None
    projection: str


@dataclass(frozen=True)
class Point:
    """One method in the picture of score against size. `error` is half the height of the bar, 0 for none."""

    label: str
    parameters: float
    score: float
    error: float = 0.0


@dataclass(frozen=True)
class Line:
    """One curve per seed: `curves` is a list of (steps, values), each pair of equal length."""

    label: str
    curves: Sequence[tuple[Sequence[float], Sequence[float]]]


P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run `draw` with this page's style: matplotlib reads it whenever an artist is made."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with need("matplotlib", "bench").rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def places(sites: Sequence[str]) -> dict[str, Place]:
    """Layer number and a short, unambiguous projection name for each module name, in the order given.

    The layer is the first number in the dotted name. Of what follows, the shortest ending that no other projection
    shares is kept; an ending that says nothing (`dense` in BERT) is dropped where all names stay unique. Encoder and
    decoder of one model are told apart by the first word in which their names differ.
    """
    parsed: dict[str, tuple[str, int | None, str]] = {}
    for site in sites:
        found = re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", site)
        parsed[site] = (found[1] or "", int(found[2]), found[3]) if found else ("", None, site)
    towers = list(dict.fromkeys(tower for tower, layer, _ in parsed.values() if layer is not None))
    names = _short(list(dict.fromkeys(rest for _, _, rest in parsed.values())))
    prefix = _differing(towers)
    return {
        site: Place(layer, names[rest] if layer is None or len(towers) < 2 else f"{prefix[tower]} {names[rest]}")
        for site, (tower, layer, rest) in parsed.items()
    }


def _short(names: list[str]) -> dict[str, str]:
    trimmed = {}
    for name in names:
        head, _, last = name.rpartition(".")
        trimmed[name] = head if head and last in SAYS_NOTHING else name
    if len(set(trimmed.values())) < len(names):
        trimmed = {name: name for name in names}
    short = {}
    for name, text in trimmed.items():
        words = text.split(".")
        others = [other for other in trimmed.values() if other != text]
        endings = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        # An ending that another name also ends with is still fine when it is this name in full.
        short[name] = next(
            (end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others)), text
        )
    return short


def _differing(towers: list[str]) -> dict[str, str]:
    words = {tower: tower.split(".") for tower in towers}
    for place in range(max((len(parts) for parts in words.values()), default=0)):
        heads = [parts[place] if place < len(parts) else "" for parts in words.values()]
        if len(set(heads)) == len(towers):
            return dict(zip(towers, heads, strict=True))
    return {tower: tower for tower in towers}


@_styled
def rank_picture(
    ranks: Mapping[str, int],
    path: Path | str | None = None,
    title: str = "Rank of every adapted weight",
    top: int | None = None,
) -> Figure:
    """Ranks as a grid, projections down and layers across; also written to `path` (.png or .svg) when one is given.

    `ranks` maps a module name to its rank; 0 is an adapter that the search has emptied (grey). A cell without a number
    is a weight that was never adapted. `top` is the highest rank of the colour bar, where several pictures share one.
    Raises ValueError when `ranks` is empty.
    """
    if not ranks:
        raise ValueError("no ranks to draw: the adapter has no site")
    where = places(list(ranks))
    rows = list(dict.fromkeys(place.projection for place in where.values()))
    layers: list[int | None] = [*sorted({place.layer for place in where.values() if place.layer is not None})]
    if any(place.layer is None for place in where.values()):
        layers.append(None)
    grid = np.full((len(rows), len(layers)), np.nan)
    for site, rank in ranks.items():
        grid[rows.index(where[site].projection), layers.index(where[site].layer)] = rank

    figure, axes = _figure(1.5 + 0.34 * len(rows), max(WIDTH, 2.0 + 0.22 * len(layers)))
    image = axes.pcolormesh(np.ma.masked_invalid(grid), edgecolors="white", linewidth=1.2, **_rank_colours(grid, top))
    if len(layers) <= 48:
        size = 8.5 if len(layers) <= 16 else 6.5
        for (row, column), rank in np.ndenumerate(grid):
            if not np.isnan(rank):
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{rank:.0f}",
                    ha="center",
                    va="center",
                    fontsize=size,
                    color=_ink(image, rank),
                )
    step = max(1, len(layers) // 24)
    axes.set_xticks(
        [column + 0.5 for column in range(0, len(layers), step)],
        ["none" if layers[column] is None else str(layers[column]) for column in range(0, len(layers), step)],
    )
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    axes.set(xlabel="layer (number in the module name)", ylabel="projection", title=title)
    axes.invert_yaxis()
    _bare(axes)
    _rank_bar(figure, axes, image)
    if path is not None:
        save(figure, path)
    return figure


@_styled
def ranks_over_time(
    history: Sequence[tuple[int, Mapping[str, int]]], steps: int, title: str = "Rank of every site during training"
) -> Figure:
    """Ranks of all sites (rows, by layer then projection) from step 0 to `steps`; white lines mark the changes.

    `history` holds (step, {site: rank}) at the start and at each change. Where the ranks settle early, the axis ends a
    little after the last change and says so. Raises ValueError for an empty history.
    """
    if not history:
        raise ValueError("no ranks to draw: the history is empty")
    history = sorted(history, key=lambda entry: entry[0])
    where = places(list(dict.fromkeys(site for _, ranks in history for site in ranks)))
    order = list(dict.fromkeys(place.projection for place in where.values()))

    def position(site: str) -> tuple[float, int]:
        place = where[site]
        return (np.inf if place.layer is None else place.layer, order.index(place.projection))

    sites = sorted(where, key=position)
    changes = [step for step, _ in history[1:]]
    end = max(steps, changes[-1] + 1 if changes else 1)
    cut = changes[-1] * 1.4 if changes and changes[-1] * 1.4 < 0.7 * end else end
    grid = np.array([[ranks.get(site, 0) for _, ranks in history] for site in sites], dtype=float)

    figure, axes = _figure(1.6 + min(0.165 * len(sites), 12.0))
    edges = [history[0][0], *changes, cut]
    # Above a few thousand cells an SVG of vectors is slower to open than the picture in it.
    image = axes.pcolormesh(
        edges, np.arange(len(sites) + 1), grid, rasterized=grid.size > 5000, linewidth=0, **_rank_colours(grid)
    )
    for step in changes:
        axes.axvline(step, color="white", linewidth=0.8)
    if len(changes) <= 60:
        axes.plot(changes, [0.0] * len(changes), "v", color="#333333", markersize=4, clip_on=False)
    layers = [where[site].layer for site in sites]
    starts = [row for row in range(len(sites)) if row == 0 or layers[row] != layers[row - 1]]
    for row in starts[1:]:
        axes.axhline(row, color="white", linewidth=2.0)
    if len(sites) <= ROWS_WITH_NAMES:
        names = [
            f"{'' if layers[row] is None else layers[row]}   {where[site].projection}"
            if row in starts
            else where[site].projection
            for row, site in enumerate(sites)
        ]
        axes.set_yticks(np.arange(len(sites)) + 0.5, names, fontsize=7.5)
    else:
        axes.set_yticks(
            [row + 0.5 for row in starts], ["none" if layers[row] is None else str(layers[row]) for row in starts]
        )
    note = f"\nno change after step {changes[-1]}; the run ended at step {end}" if cut < end else ""
    axes.set(xlabel=f"optimizer step (triangles: rank changes){note}", ylabel="layer and projection", title=title)
    axes.invert_yaxis()
    axes.set_xlim(history[0][0], cut)
    _bare(axes)
    _rank_bar(figure, axes, image)
    return figure


@_styled
def score_by_parameters(
    points: Sequence[Point], metric: str, error: str, title: str = "Score against parameters"
) -> Figure:
    """One marker per method: parameters across, score up. `error` names what the bars show, for the caption.

    Methods of equal size are drawn side by side (moved by a few points on paper, not in the data), because equal
    budgets are the usual case and would hide each other. The axis is logarithmic when sizes differ by more than 20
    times; a size of 0 then stands at its left end.
    """
    from matplotlib.transforms import ScaledTranslation

    figure, axes = _figure(3.6)
    sizes = [point.parameters for point in points]
    low, high = min(sizes, default=0), max(sizes, default=1)
    smallest = min((size for size in sizes if size), default=1)
    wide = high / smallest > 20
    if wide and low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 3, high * 3)
    elif wide:
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.6)
        axes.set_xlim(-smallest / 2, high * 3)
        powers = range(math.ceil(math.log10(smallest)), math.ceil(math.log10(high * 3)))
        axes.set_xticks([0, *(10.0**power for power in powers)])
        axes.minorticks_off()
    else:
        axes.set_xlim(-0.15 * max(high, 1), 1.3 * max(high, 1))
    ends = [point.score + side * point.error for point in points for side in (-1, 1)] or [0.0, 1.0]
    pad = 0.12 * (max(ends) - min(ends)) or 0.05
    axes.set_ylim(min(ends) - pad, max(ends) + pad)
    for index, point in enumerate(points):
        twins = [
            other
            for other, size in enumerate(sizes)
            if abs(size - point.parameters) <= 0.04 * (max(size, point.parameters) if wide else high)
        ]
        shift = 11.0 * (twins.index(index) - (len(twins) - 1) / 2)  # points of 1/72 inch
        axes.errorbar(
            [point.parameters],
            [point.score],
            yerr=[point.error] if point.error else None,
            marker=_of(MARKERS, index),
            color=COLOURS[index % len(COLOURS)],
            markersize=7,
            capsize=4,
            linestyle="none",
            label=point.label,
            transform=axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans),
        )
    axes.xaxis.set_major_formatter(lambda value, _: "" if value < 0 else short_count(value))
    axes.set(xlabel="parameters kept at the end, head not counted", ylabel=metric, title=title)
    _legend(figure, axes, note=error)
    return figure


@_styled
def curves(lines: Sequence[Line], ylabel: str, title: str) -> Figure:
    """Mean over seeds with a band of one sample standard deviation, at the steps that every seed has.

    A line of a single seed has no band. Lines without a common step are left out of the picture.
    """
    figure, axes = _figure(3.6)
    banded = False
    for index, line in enumerate(lines):
        steps, mean, spread = mean_and_spread(line.curves)
        if not len(steps):
            continue
        colour = COLOURS[index % len(COLOURS)]
        few = len(steps) <= 25
        axes.plot(
            steps,
            mean,
            color=colour,
            linestyle=_of(DASHES, index),
            linewidth=1.6,
            marker=_of(MARKERS, index) if few else None,
            markersize=4,
            label=line.label,
        )
        if spread is not None:
            banded = True
            axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.16, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel=ylabel, title=title)
    _legend(figure, axes, note="band: one sample standard deviation over seeds" if banded else "")
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


def short_count(value: float) -> str:
    """1234567 as `1.23M`: a count with at most three figures."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def svg(figure: Figure) -> str:
    """The figure as the text of an SVG file; the same figure gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return buffer.getvalue()


def save(figure: Figure, path: Path | str) -> Path:
    """Write the figure as .png (200 dots per inch) or .svg; the file appears whole or not at all."""
    import matplotlib

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lstrip(".") or "png"
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata, bbox_inches="tight")
    write_whole(path, buffer.getvalue())
    return path


def _of(kinds: Sequence[Any], index: int) -> Any:
    """A marker or a dash; where the colours begin anew, they meet other ones."""
    return kinds[(index + index // len(COLOURS)) % len(kinds)]


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _rank_colours(grid: np.ndarray, top: int | None = None) -> dict[str, Any]:
    """Colour map and norm for ranks from 0: grey for 0, then light to dark; whole-number steps up to rank 20."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize

    top = max(1, int(np.nanmax(grid)), top or 0)
    shades = colormaps["YlGnBu"](np.linspace(0.12, 1.0, min(top, 255)))
    colours = ListedColormap(np.vstack([[0.86, 0.86, 0.86, 1.0], shades]))
    if top <= 20:
        return {"cmap": colours, "norm": BoundaryNorm(np.arange(-0.5, top + 1.5), top + 1)}
    return {"cmap": colours, "norm": Normalize(0, top)}


def _ink(image: Any, rank: float) -> str:
    red, green, blue, _ = image.cmap(image.norm(rank))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def _rank_bar(figure: Figure, axes: Axes, image: Any) -> None:
    top = image.norm.vmax if not hasattr(image.norm, "boundaries") else image.norm.boundaries[-1] - 0.5
    bar = figure.colorbar(image, ax=axes, label="rank", aspect=30, pad=0.02)
    bar.set_ticks(list(range(0, int(top) + 1, max(1, -(-int(top) // 10)))))
    bar.ax.minorticks_off()


def _bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(figure: Figure, axes: Axes, note: str = "") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if max(len(label) for label in labels) < 26 else 1
        rows = -(-len(labels) // columns)
        figure.set_figheight(figure.get_figheight() + 0.19 * max(0, rows - 3))  # inches: the axes keep their size
        figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=columns,
            title=note or None,
            fontsize=8.5,
            title_fontsize=8,
            alignment="left",
        )
