"""Pictures of where the rank is, as a grid of projections and layers, and of how it got there over the steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.pictures.style import WIDTH, bare_figure, new_figure, set_title, short, styled, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAMES = 6
LONGEST = 32  # characters of the name of a projection
ROWS_WITH_NAMES = 80  # above this many sites a heat map names layers only
SAYS_NOTHING = {"dense", "linear"}  # endings of module names


@dataclass(frozen=True)
class Place:
    """Where a site sits: `layer` is None for a weight outside the stack of layers (a pooler, an output head)."""

    layer: int | None
    projection: str


def places(sites: Sequence[str]) -> dict[str, Place]:
    """Layer number and a short, unambiguous projection name for each module name, in the order given.

    The layer is the first number in the dotted name. Of what follows, the shortest ending that no other projection
    shares is kept; an ending that says nothing (`dense` in BERT) is dropped if all names stay unique. Encoder and
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


def rank_grid(ranks: Mapping[str, int]) -> tuple[list[str], list[int | None], np.ndarray]:
    """Projections (rows), layers (columns, None last for sites outside the layers) and their ranks, NaN for no site."""
    where = places(list(ranks))
    rows = list(dict.fromkeys(place.projection for place in where.values()))
    layers: list[int | None] = [*sorted({place.layer for place in where.values() if place.layer is not None})]
    if any(place.layer is None for place in where.values()):
        layers.append(None)
    grid = np.full((len(rows), len(layers)), np.nan)
    for site, rank in ranks.items():
        grid[rows.index(where[site].projection), layers.index(where[site].layer)] = rank
    return rows, layers, grid


def _both_ends(name: str) -> str:
    """A long name without its middle: the ends tell the projections of a U-Net apart."""
    name = short(name, len(name))
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2 - 1]}…{name[-LONGEST // 2 :]}"


def layer_name(layer: int | None) -> str:
    """The number of the layer; `none` for a site outside the layers."""
    return "none" if layer is None else str(layer)


@styled
def rank_picture(
    ranks: Mapping[str, int], title: str = "Rank of every adapted weight", top: int | None = None
) -> Figure:
    """Ranks as a grid, projections down and layers across.

    `ranks` maps a module name to its rank; 0 is an adapter that the search has emptied (grey). A cell without a number
    is a weight that was never adapted. `top` is the highest rank of a colour bar that several pictures share.
    Raises ValueError when `ranks` is empty.
    """
    if not ranks:
        raise ValueError("no ranks to draw: the adapter has no site")
    rows, layers, grid = rank_grid(ranks)
    figure, axes = new_figure(1.5 + 0.34 * len(rows), max(WIDTH, 2.0 + 0.22 * len(layers)))
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
        [layer_name(layers[column]) for column in range(0, len(layers), step)],
    )
    axes.set_yticks([row + 0.5 for row in range(len(rows))], [_both_ends(row) for row in rows])
    axes.set(xlabel="layer (number in the module name)", ylabel="projection")
    set_title(axes, title)
    axes.invert_yaxis()
    _bare(axes)
    _rank_bar(figure, axes, image)
    return figure


@styled
def ranks_in_steps(
    history: Sequence[tuple[int, Mapping[str, int]]], title: str = "Ranks by projection and layer during training"
) -> Figure:
    """The grid of `rank_picture`, small, at the start, at some of the changes and at the end: FRAMES at most.

    `history` holds (step, {site: rank}) at the start and at each change. Raises ValueError for an empty history.
    """
    if not history:
        raise ValueError("no ranks to draw: the history is empty")
    count = min(FRAMES, len(history))
    chosen = sorted({round(place * (len(history) - 1) / max(1, count - 1)) for place in range(count)})
    return rank_pictures({f"step {step}": ranks for step, ranks in (history[place] for place in chosen)}, title)


@styled
def rank_pictures(by_title: Mapping[str, Mapping[str, int]], title: str) -> Figure:
    """The grids of `rank_picture`, small, under a title each; a site that one of them does not have is empty there."""
    sites = dict.fromkeys((site for ranks in by_title.values() for site in ranks), 0)
    rows, layers, _ = rank_grid(sites)
    down = -(-len(by_title) // (3 if len(layers) <= 10 else 2 if len(layers) <= 20 else 1))
    across = -(-len(by_title) // down)
    figure = bare_figure(1.1 + down * (0.35 + 0.15 * len(rows)))
    top = max(max(ranks.values()) for ranks in by_title.values())
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(by_title) :]:
        axes.set_visible(False)
    for axes, (name, ranks) in zip(panels.flat, by_title.items(), strict=False):
        grid = rank_grid(sites | dict(ranks))[2]
        image = axes.pcolormesh(
            np.ma.masked_invalid(grid), edgecolors="white", linewidth=0.5, **_rank_colours(grid, top)
        )
        axes.set_title(name, fontsize=8.5, loc="center")
        _bare(axes)
    gap = -(-len(layers) // (7 * 3 // across))
    shown = range(0, len(layers), gap)
    names = ["–" if layers[column] is None else str(layers[column]) for column in shown]
    panels[0, 0].set_xticks([column + 0.5 for column in shown], names)
    panels[0, 0].set_yticks([row + 0.5 for row in range(len(rows))], [short(row, LONGEST) for row in rows])
    panels[0, 0].invert_yaxis()
    for axes in panels.flat:
        axes.tick_params(labelsize=7)
    figure.supxlabel("layer (number in the module name)", fontsize=8.5)
    figure.suptitle(wrapped(title, 60), fontsize=10.5, x=0.01, ha="left")
    _rank_bar(figure, list(panels.flat), image)
    return figure


@styled
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

    figure, axes = new_figure(1.6 + min(0.165 * len(sites), 12.0))
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
            f"{'' if layers[row] is None else layers[row]}   {short(where[site].projection, LONGEST)}"
            if row in starts
            else short(where[site].projection, LONGEST)
            for row, site in enumerate(sites)
        ]
        axes.set_yticks(np.arange(len(sites)) + 0.5, names, fontsize=7.5)
    else:
        axes.set_yticks([row + 0.5 for row in starts], [layer_name(layers[row]) for row in starts])
    note = f"\nno change after step {changes[-1]}; the run ended at step {end}" if cut < end else ""
    axes.set(xlabel=f"optimizer step (triangles: rank changes){note}", ylabel="layer and projection")
    set_title(axes, title)
    axes.invert_yaxis()
    axes.set_xlim(history[0][0], cut)
    _bare(axes)
    _rank_bar(figure, axes, image)
    return figure


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


def _rank_bar(figure: Figure, axes: Axes | list[Axes], image: Any) -> None:
    top = image.norm.vmax if not hasattr(image.norm, "boundaries") else image.norm.boundaries[-1] - 0.5
    bar = figure.colorbar(image, ax=axes, label="rank", aspect=30, pad=0.02)
    bar.set_ticks(list(range(0, int(top) + 1, max(1, -(-int(top) // 10)))))
    bar.ax.minorticks_off()


def _bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
