"""Common parts of all pictures: their settings, legends, marks and files.

Figures are made as objects and drawn by Agg: nothing here touches pyplot, its backend or its settings, so that
pictures can be made on a server, in a thread, and without affecting the user's own figures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbp_jax.report.extra import require
from cbp_jax.report.looks import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

COLUMN = 3.4  # inches: the width of a column of a paper, for which font sizes here are chosen
PANEL = 1.3  # inches: the height of a panel; two panels are side by side in a column
HANDLE_LENGTH = 3.2  # of a line in the legend, in ems, so that its dashes repeat
CROSS = {"marker": "x", "markersize": 6, "markeredgewidth": 1.5, "linestyle": "none", "zorder": 5, "gid": "diverged"}
_RC = {
    "font.family": "sans-serif",
    "font.size": 6.5,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "axes.titlepad": 3,
    "axes.labelpad": 2,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "legend.labelspacing": 0.3,
    "legend.columnspacing": 1.2,
    "legend.handlelength": HANDLE_LENGTH,
    "lines.linewidth": 1,
    "lines.markersize": 3,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


def style_of_pictures() -> AbstractContextManager:
    """Use our settings while drawing, and then restore the user's."""
    matplotlib = require("matplotlib")
    # Without the backend, which is the only setting that rc_context does not restore.
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    return matplotlib.rc_context({**defaults, **_RC})


def check_formats(formats: Sequence[str]) -> None:
    """Raise a ValueError unless formats are kinds of file that Matplotlib writes."""
    known = sorted(require("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes())
    if isinstance(formats, str) or not {str(kind).lower() for kind in formats} <= set(known):
        raise ValueError(f"formats must be a list of some of {', '.join(known)}; got {formats!r}")


def save_figures(figures: Mapping[str, Figure], out: Path, formats: Sequence[str]) -> list[Path]:
    """Write figures to a folder, by name, in each format.

    Args:
      figures: by name.
      out: the folder; created if needed.
      formats: kinds of file, as Matplotlib names them.

    Returns:
      their paths.

    Raises:
      ValueError: Matplotlib does not write such a kind of file.
    """
    check_formats(formats)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for kind in formats:
            paths.append(out / f"{name}.{kind}")
            with style_of_pictures():
                figure.savefig(paths[-1])
    return paths


def marker(style: Style, size: float) -> dict[str, Any]:
    """Return Matplotlib's options for the markers of a line: with a thin white edge, or hollow."""
    star = style.marker == "*"  # a white edge would cover its rays
    return {
        "marker": style.marker,
        "markersize": 1.5 * size if star else size,
        "markerfacecolor": "white" if style.hollow else style.color,
        "markeredgecolor": style.color if style.hollow else "white",
        "markeredgewidth": 0.7 if style.hollow else 0.0 if star else 0.3,
    }


def draw_interval(
    ax: Axes, mean: float, low: float, high: float, row: float, style: Style, *, hollow: bool = False, **options: Any
) -> None:
    """Draw an interval along a row as a line with caps, and a marker at its mean that is small enough not to hide it.

    Args:
      ax: the panel.
      mean, low, high: the interval; without finite ends only the marker is drawn.
      row: its height.
      style: color and marker.
      hollow: whether the marker is hollow.
      **options: further options of Matplotlib's `plot` for the marker.
    """
    if np.isfinite(low) and np.isfinite(high):
        caps = {"marker": "|", "markersize": 3.5, "markeredgewidth": 0.6}
        ax.plot([low, high], [row, row], color=style.color, linewidth=0.8, **caps, zorder=3)
    options = {"marker": style.marker, "markeredgewidth": 0.5, **options}
    face = "white" if hollow else style.color
    ax.plot(
        [mean], [row], color=style.color, markersize=2.5, markerfacecolor=face, linestyle="none", zorder=4, **options
    )


def draw_caps(bars: ErrorbarContainer) -> None:
    """Draw the caps of error bars visibly, whose thickness is otherwise that of the markers' edges: none for a star."""
    for cap in bars.lines[1]:
        cap.set_markeredgewidth(0.7)


def legend_columns(names: Sequence[str], width: float, handle: float = HANDLE_LENGTH) -> int:
    """Return the largest number of columns, up to four, that fit ``width`` in inches, filled column by column.

    ``handle`` is the length of lines in the legend, in ems.
    """
    em = _RC["legend.fontsize"] / 72
    for columns in range(min(4, len(names)), 1, -1):
        parts = np.array_split(np.array(names, dtype=object), columns)  # as Matplotlib divides them
        longest = [max(map(len, part)) for part in parts]
        if em * sum(0.6 * length + handle + 2.4 for length in longest) < width:
            return columns
    return 1


def legend_above(figure: Figure, ax: Axes, columns: int | None = None, *, lines: bool = True, **options: Any) -> None:
    """Put the legend of one panel above all of them.

    Args:
      figure: the picture.
      ax: the panel.
      columns: number of columns; by default as many as the picture's width has room for.
      lines: whether there are lines; names are closer to markers without a line.
      **options: options of Matplotlib's `legend`.
    """
    handles, names = ax.get_legend_handles_labels()
    length = HANDLE_LENGTH if lines else 1.0
    columns = legend_columns(names, figure.get_figwidth(), length) if columns is None else columns
    figure.legend(handles, names, loc="outside upper center", ncols=columns, handlelength=length, **options)


def write_letter(ax: Axes, letter: str) -> None:
    """Write the letter of a panel above its left corner."""
    ax.set_title(letter, loc="left", fontweight="bold", fontsize=8, pad=2)


def label_height(ax: Axes, label: str) -> None:
    """Label the vertical axis of a panel, on two lines if the label is too long for its height."""
    ax.set_ylabel(label if "\n" in label else fill(label, 21))


def fill(text: str, width: int) -> str:
    """Break a text into as few lines as `textwrap.fill`, but of similar lengths.

    >>> fill("Policy's stable rank (%)", 21).splitlines()
    ["Policy's stable", 'rank (%)']
    """
    lines = textwrap.wrap(text, width)
    while width > 1:
        width -= 1
        shorter = textwrap.wrap(text, width, break_long_words=False)
        if len(shorter) > len(lines) or max(map(len, shorter), default=0) > width:
            break
        lines = shorter
    return "\n".join(lines)


def log_ticks(ax: Axes) -> None:
    """Make the vertical axis of a panel that is drawn logarithmic, with numbers that do not overlap."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0) if high < 10 * low else (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def few_ticks(ax: Axes, *, whole: bool = False) -> None:
    """Show at most five numbers, optionally only whole ones, along the linear horizontal axis of a narrow panel."""
    if ax.get_xscale() == "linear":
        ax.locator_params(axis="x", nbins=4, integer=whole)


def cut_off(ax: Axes, bottom: float, top: float) -> None:
    """Limit the vertical axis, and write how low each line gets that falls below it."""
    low, high = ax.get_xlim()
    ax.set_ylim(bottom, top)
    falling = [line for line in ax.lines if np.min(line.get_ydata(), initial=bottom) < bottom]
    for row, line in enumerate(falling):
        x, y = (np.asarray(values) for values in line.get_data())
        first, last = x[y < bottom][[0, -1]]
        left = first - low > high - last  # there is more room
        ax.annotate(
            f"\u2193 {y.min():,.0f}".replace("-", "\u2212"),
            (first if left else last, 0),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if left else 5, 2 + 8 * row),
            textcoords="offset points",
            ha="right" if left else "left",
            va="bottom",
            fontsize=6,
            color=line.get_color(),
        )


def write_note(figure: Figure, text: str) -> None:
    """Write a note below all panels, such as the meaning of bands and bars, in as many lines as needed."""
    across = int(figure.get_figwidth() / COLUMN * 72)
    lines = "\n".join(fill(line, across) for line in text.split("\n"))
    figure.supxlabel(lines, x=0.99, ha="right", multialignment="right", fontsize=6, color="#666666")


def mark_values(ax: Axes, values: Sequence[float], color: str = "black") -> None:
    """Draw crosses at the bottom of a panel, at values of its horizontal axis."""
    if len(values):
        heights = np.full(len(values), 0.03)
        ax.plot(values, heights, **CROSS, color=color, transform=ax.get_xaxis_transform(), clip_on=False)
