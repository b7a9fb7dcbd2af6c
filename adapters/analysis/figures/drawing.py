"""What all figures share: matplotlib, colours, type, and figures as SVG and PNG.

Convention: a figure is one column wide, so that a phone shows it whole; a colour stands for one method. Every colour
that the page changes with its theme is in ``THEME``. Such a colour is used for nothing else, because the page replaces
it wherever it occurs.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from adapters.analysis.groups import SERIES
from adapters.analysis.tables import printable

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "THEME",
    "Figure",
    "figure_text",
    "heat_map",
    "inline_svg",
    "label_bars",
    "label_points",
    "legend",
    "new_figure",
    "number_tasks",
    "picture",
    "styled",
    "themed_svg",
]

INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#fffffe"
# name of the CSS variable: (light, dark)
THEME = {
    "ink": (INK, "#e6edf3"),
    "muted": (MUTED, "#9aa5b1"),
    "grid": (GRID, "#373e47"),
    "paper": (PAPER, "#161b22"),
    **{
        f"series-{place}": colours
        for place, colours in enumerate(
            zip(SERIES, ("#4db2f0", "#ff8a47", "#2fd1a0", "#e79ac6", "#f0b429", "#a5d8ff", "#b3a4e8"), strict=True)
        )
    },
}
_STYLE: Any = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "text.color": INK,
    "text.usetex": False,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "svg.fonttype": "none",
}
styled = mpl.rc_context(_STYLE)  # a decorator of whatever draws
_WIDTH = 5.2  # inches
_LEGIBLE = 14  # columns of a heat map that leave room for numbers


def new_figure(
    height: float, rows: int = 1, columns: int = 1, *, grid: str = "", **subplots: Any
) -> tuple[Figure, NDArray[Any]]:
    """Return a figure of that height in inches and its axes [rows, columns]; ``grid`` is "x", "y" or "both"."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    for each in axes.flat:
        each.tick_params(colors=INK, labelsize=8, color=MUTED, length=3)
        if grid:
            each.grid(visible=True, axis=grid)
    return figure, np.asarray(axes)


def figure_text(text: str, longest: int = 34) -> str:
    """Return text from a file for a figure: shortened, and never read as a formula."""
    text = printable(text)
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return text.replace("$", r"\$")


def legend(figure: Figure, axes: Axes) -> None:
    """Place the legend of these axes above the figure."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = 1 if longest > 28 else 2 if longest > 15 else 3 if longest > 10 else 4
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)), labelcolor=INK)


def number_tasks(axes: Axes, tasks: int, label: str) -> None:
    """Make a horizontal axis count tasks from 1."""
    axes.set_xlim(0.7, tasks + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel(label)


def label_bars(axes: Axes, values: list[float], texts: list[str], beyond: list[float], base: float = 0.0) -> None:
    """Write a text at the end of each horizontal bar, past what else is drawn there, and leave room for it.

    Args:
        axes: where the bars are.
        values: the end of each bar.
        texts: what to write.
        beyond: how far to the right something is drawn in each row.
        base: where the bars begin.
    """
    low, high = min(base, *values), max(base, *values, *beyond)
    span = (high - low) or 1.0
    for row, (value, text, at) in enumerate(zip(values, texts, beyond, strict=True)):
        place: Any = {"xytext": (6 if at > value else 3, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (max(value, at, base), row), **place, fontsize=8)
    axes.set_xlim(low - 0.03 * span * (low < base), high + span * (0.05 + 0.024 * max(map(len, texts))))


@contextmanager
def _with_any_letters() -> Iterator[None]:
    """Be silent about a name in letters that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


@_with_any_letters()
def label_points(axes: Axes, texts: Sequence[str], points: NDArray[np.float64], others: NDArray[np.float64]) -> None:
    """Write a text beside each point, where it covers no mark, no other text and no edge; a line leads to one far off.

    The limits of the axes stay as they are. Where there is no such place, the text covers as little as it can.

    Args:
        axes: where the points are.
        texts: one for each point.
        points: [n, 2], in the units of the axes.
        others: [m, 2], smaller marks, which a text should not cover and a line may cross.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # so that the axes are where they will be
    axes.autoscale(enable=False)  # or a line would move their limits
    frame, places = axes.get_window_extent(), axes.transData.transform(points)
    small = axes.transData.transform(others)[:, None] + [[-3, -3], [3, 3]]
    taken = places[:, None] + [[-5, -5], [5, 5]]  # [marks, texts and lines; lower and upper corner; x and y]
    angles, gaps = (grid.ravel() for grid in np.meshgrid(np.arange(16) * np.pi / 8, np.arange(6, 206, 8)))
    towards, steps = np.stack([np.cos(angles), np.sin(angles)], axis=1), np.linspace(0, 1, 12)[:, None]
    for text, point, place in zip(texts, points, places, strict=True):
        label = axes.annotate(text, tuple(point), (0, 0), textcoords="offset points", fontsize=8, annotation_clip=False)
        label.set_in_layout(False)
        extent = label.get_window_extent()
        half = np.array([extent.width + 4, extent.height]) / 2
        centres = place + towards * (half + gaps[:, None])  # [places where the text can be, 2]
        low, high = centres - half, centres + half
        lines = place + steps * (np.clip(place, low, high) - place)[:, None]  # [places, points of a line, 2]
        ahead = taken[(place < taken[:, 0]).any(axis=1) | (place > taken[:, 1]).any(axis=1)]
        cost = gaps + 1e6 * ((low < frame.min) | (high > frame.max)).any(axis=1)
        for boxes, weight in ((taken, 1e5), (small, 1e4)):
            cost += weight * ((low[:, None] < boxes[:, 1]) & (high[:, None] > boxes[:, 0])).all(axis=2).sum(axis=1)
        crossed = ((lines[:, :, None] > ahead[:, 0]) & (lines[:, :, None] < ahead[:, 1])).all(axis=3).any(axis=1)
        cost += 100 * crossed.sum(axis=1)
        best = np.argmin(cost)
        # A reader's font may be narrower: the text must keep to the side where its point is.
        side = int(np.sign(np.round(towards[best, 0], 1)))
        shift = (centres[best] - place - [side * (half[0] - 2), 0]) * 72 / figure.dpi
        label.set(ha=("center", "left", "right")[side], va="center", position=tuple(shift))
        taken = np.concatenate([taken, [[low[best], high[best]]]])
        if gaps[best] > 6:
            taken = np.concatenate([taken, lines[best][:, None] + [[-1, -1], [1, 1]]])
            ends = axes.transData.inverted().transform(lines[best][[0, -1]])
            axes.plot(*ends.T, color=MUTED, linewidth=0.6, zorder=1)


def heat_map(
    axes: Axes, values: NDArray[np.float64], texts: list[list[str]], limits: tuple[float, float], scale: str
) -> None:
    """Draw a matrix, its first row on top, NaN left out; its numbers in it, or a scale beside it if it is large."""
    rows, columns = values.shape
    low, high = limits if limits[0] < limits[1] else (limits[0] - 1, limits[1] + 1)
    colours, norm = mpl.colormaps["cividis"], Normalize(low, high)
    mesh = axes.pcolormesh(
        np.arange(columns + 1) + 0.5,
        np.arange(rows + 1) + 0.5,
        np.ma.masked_invalid(values),
        cmap=colours,
        norm=norm,
        edgecolors=PAPER,
        linewidth=0.8,
    )
    axes.set_ylim(rows + 0.5, 0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=15, integer=True, min_n_ticks=1))
    if columns > _LEGIBLE:
        bar = axes.figure.colorbar(mesh, ax=axes, label=scale, pad=0.02)
        bar.ax.tick_params(colors=INK, labelsize=8)
        bar.outline.set_visible(False)
        return
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        light = np.dot(colours(norm(values[row, column]))[:3], (0.299, 0.587, 0.114)) > 0.5
        colour = "#000000" if light else "#ffffff"
        size = 8 if columns <= 10 else 6
        axes.text(column + 1, row + 1, texts[row][column], ha="center", va="center", fontsize=size, color=colour)


def picture(figure: Figure, kind: str, **options: Any) -> bytes:
    """Return a figure as a file of that kind, ``png`` or ``svg``; the same figure gives the same file."""
    target = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else {"Software": None}
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "became"}), _with_any_letters():
        if figure.get_layout_engine() is not None:
            # The layout takes most of the time: it is computed once, not for each kind of file.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(target, format=kind, metadata=metadata, **{"dpi": 200, "facecolor": "white", **options})
    return target.getvalue()


def themed_svg(svg: bytes) -> bytes:
    """Return a figure as an SVG file that follows its reader's theme, on whatever page it stands.

    Colours stay written as they are, for programs that know no themes; the style sheet replaces them in the dark.
    """
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark} !important}}'
        for light, dark in THEME.values()
        for what in ("fill", "stroke")
    )
    style = f"<style>svg{{color-scheme:light dark}}@media (prefers-color-scheme: dark){{{rules}}}</style>"
    text = svg.decode("utf-8").replace("fill: #ffffff", "fill: none", 1)  # the background
    end = text.index(">", text.index("<svg")) + 1
    return (text[:end] + style + text[end:]).encode("utf-8")


def inline_svg(svg: bytes, name: str, description: str) -> str:
    """Return a figure as an element of an HTML page that follows the page's theme.

    Args:
        svg: the figure as ``picture`` gives it.
        name: no other figure on the page has it; letters, digits and dashes.
        description: the figure in words, for readers who do not see it; already escaped.
    """
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :].replace("fill: #ffffff", "fill: none", 1)  # the background
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    for variable, (light, _) in THEME.items():
        text = text.replace(light, f"var(--{variable})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    head = f'<svg {box[0]} role="img" aria-label="{description}">'
    return head + text[text.index(">", box.end()) + 1 :].strip()
