"""How all pictures look: matplotlib without a display, figures, titles, legends, SVG and pixels.

Figures are five inches wide, so that their text is still ten pixels tall on a phone. Methods differ by colour
(those of Okabe and Ito, which colour-blind readers can separate), marker and dash at once, chosen by their `look`: one
method has one look in all pictures of a task.
"""

from __future__ import annotations

import functools
import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from rankwise.errors import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
WIDTH = 5.0  # inches
LONGEST = 44  # characters of a name in a legend
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
    "text.parse_math": False,  # a name may hold dollar signs
}


P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run `draw` with this page's style: matplotlib reads it whenever an artist is made."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with need("matplotlib", "bench").rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


@contextmanager
def _drawing() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; the page has the name as text too.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def svg(figure: Figure) -> str:
    """The figure as the text of an SVG file; the same figure gives the same text."""
    buffer = io.StringIO()
    with _drawing():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return buffer.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """The figure in 160 pixels an inch, (height, width, 3) bytes of red, green and blue."""
    figure.set_dpi(160)
    with _drawing():
        figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]  # Agg's canvas


def new_figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of so many inches, and the axes in it."""
    figure = bare_figure(height, width)
    return figure, figure.add_subplot()


def bare_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure of so many inches, without axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def look_of(kinds: Sequence[Any], look: int) -> Any:
    """A marker or a dash, shifted each time the colours repeat."""
    return kinds[(look + look // len(COLOURS)) % len(kinds)]


def short(name: str, longest: int = LONGEST) -> str:
    """A name that fits into a picture: one line, printable, not too long."""
    name = "".join(letter for letter in " ".join(name.split()) if letter.isprintable())
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def wrapped(title: str, characters: float) -> str:
    """The title in lines of so many characters, three at most; only what can be printed."""
    plain = "".join(letter for letter in " ".join(title.split()) if letter.isprintable())
    return textwrap.fill(plain, int(characters), max_lines=3, placeholder=" …")


def set_title(axes: Axes, title: str) -> None:
    """A title that fits the picture: one that sticks out would shrink all the rest."""
    axes.set_title(wrapped(title, 52))


def legend(figure: Figure, axes: Axes, note: str = "", handles: Mapping[str, Any] | None = None) -> None:
    """Names of what is drawn in `axes`, or of `handles` by name, below the figure under the title `note`."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) if handles is None else handles
    if handles:
        # of a mark with a bar only the mark, which the bar would hide
        marks = [handle[0] if isinstance(handle, tuple) else handle for handle in handles.values()]
        longest = max(map(len, handles))
        width = figure.get_figwidth()
        columns = max(1, int(width / (0.55 + 0.085 * longest)))  # inches: a handle, and a letter
        rows = -(-len(handles) // columns)
        figure.set_figheight(figure.get_figheight() + 0.19 * max(0, rows - 3))  # inches: the axes keep their size
        figure.legend(
            marks,
            list(handles),
            loc="outside lower left",
            ncols=columns,
            title=note or None,
            fontsize=8.5,
            title_fontsize=8,
            alignment="left",
        )
