"""What the pictures share: labels, scales, bands over seeds, shaded phases, PNG files."""

import io
import itertools
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

_SHADE = "#f2c14e"
# The first eight of matplotlib's own colors.
_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
# With more configs than colors, the colors repeat with other dashes.
_DASHES = ("-", "--", ":")
# More points per line than this cannot be seen: no picture is so many pixels wide.
_MOST_POINTS = 2000
_MOST_SHADES = 64


class Style(NamedTuple):
    """How one config is drawn in every picture.

    Attributes:
      color: of its lines and bands.
      dashes: a line style of matplotlib's.
    """

    color: str
    dashes: str


def style_of(place: int) -> Style:
    """Return the style of the config at a place of a comparison."""
    return Style(_COLORS[place % len(_COLORS)], _DASHES[place // len(_COLORS) % len(_DASHES)])


def label_axis(axis: Any, x: str, y: str) -> None:
    """Label both directions and draw a faint grid."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)


def draw_band(axis: Any, x: np.ndarray, values: np.ndarray, **line: Any) -> None:
    """Draw mean and range of ``values``, one row per seed; ``line`` goes to ``axis.plot``."""
    stride = max(1, len(x) // _MOST_POINTS)
    x, values = x[::stride], values[:, ::stride]
    axis.plot(x, values.mean(axis=0), lw=1.4, **line)
    if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axis.fill_between(x, low, high, color=line.get("color"), alpha=0.15, lw=0)


def shade_phases(axis: Any, steps: np.ndarray, phases: np.ndarray) -> None:
    """Shade the stretches in which the second stage acts, a blend more lightly.

    Args:
      axis: where to shade.
      steps: the steps, in order.
      phases: the phase at each step, from 0 to 1; NaN counts as 0.
    """
    phases = np.nan_to_num(phases)
    edges = np.flatnonzero(np.diff(phases)) + 1
    bounds = [0, *edges.tolist(), len(phases)]
    # A long blend changes at every step, but a few bands show it just as well.
    if len(bounds) > _MOST_SHADES:
        places = np.linspace(0, len(bounds) - 1, _MOST_SHADES)
        bounds = sorted({bounds[round(i)] for i in places})
    for start, stop in itertools.pairwise(bounds):
        if stop > start and phases[start] > 0:
            right = steps[min(stop, len(steps) - 1)]
            axis.axvspan(steps[start], right, color=_SHADE, alpha=0.3 * phases[start], lw=0)


def log_scale(axis: Any, highest: float = 0.0) -> None:
    """Make the axis of losses logarithmic, and end it just above ``highest`` if that is given."""
    axis.set_yscale("log")
    if highest > 0:
        axis.set_ylim(top=1.15 * highest)
    plain_ticks(axis)


def plain_ticks(axis: Any) -> None:
    """Write losses as plain numbers where the axis spans too little for powers of ten."""
    low, high = axis.get_ylim()
    if high < 300 * low:
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 8 * low else (1, 2, 5)
        axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def add_title_and_legend(figure: Figure, axis: Any, title: str) -> None:
    """Put the title above the figure and one legend, of the lines of ``axis``, below it."""
    handles, names = axis.get_legend_handles_labels()
    figure.suptitle(title, fontsize="medium")
    if names:
        # An inch has room for about twelve letters. Handle and gap take as much as eight.
        columns = max(1, int(12 * figure.get_figwidth()) // (8 + max(map(len, names))))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize="small")


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file, at its own resolution."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi="figure", format="png")
    return buffer.getvalue()
