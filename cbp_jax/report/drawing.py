"""What all pictures share: their settings, legends, marks and files.

Figures are made as objects and drawn by Agg: nothing here touches pyplot, its backend or its settings, so that
pictures can be made on a server, in a thread, and beside the user's own figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbp_jax.report.extra import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HANDLE_LENGTH = 3.6  # of a line in the legend, in ems, so that its dashes repeat
CROSS = {"marker": "x", "markersize": 6, "markeredgewidth": 1.5, "linestyle": "none", "zorder": 5, "gid": "diverged"}
_RC = {
    "font.family": "sans-serif",
    "font.size": 7.5,
    "axes.labelsize": 8,
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
    "legend.fontsize": 7.5,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def style_of_pictures() -> AbstractContextManager:
    """Uses our settings while drawing, and then restores the user's."""
    matplotlib = require("matplotlib")
    # Without the backend: rc_context, which puts the rest back, leaves it as it was set last.
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    return matplotlib.rc_context({**defaults, **_RC})


def save_figures(figures: Mapping[str, Figure], out: Path, formats: Sequence[str]) -> list[Path]:
    """Writes figures to a folder, by name, in each format. Returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for kind in formats:
            paths.append(out / f"{name}.{kind}")
            with style_of_pictures():
                figure.savefig(paths[-1])
    return paths


def legend_columns(names: Sequence[str], width: float) -> int:
    """The largest number of columns, up to four, that fit ``width`` in inches, filled column by column."""
    em = _RC["legend.fontsize"] / 72
    for columns in range(min(4, len(names)), 1, -1):
        rows = math.ceil(len(names) / columns)
        longest = [max(map(len, names[start : start + rows])) for start in range(0, len(names), rows)]
        if em * sum(0.58 * length + HANDLE_LENGTH + 2.4 for length in longest) < width:
            return columns
    return 1


def legend_above(figure: Figure, ax: Axes, columns: int | None = None, **options: Any) -> None:
    """Puts the legend of one panel above all of them.

    Args:
      figure: the picture.
      ax: the panel.
      columns: number of columns; by default as many as the picture's width has room for.
      **options: as of Matplotlib's `legend`.
    """
    handles, names = ax.get_legend_handles_labels()
    columns = legend_columns(names, figure.get_figwidth()) if columns is None else columns
    figure.legend(handles, names, loc="outside upper center", ncols=columns, **options)


def write_letter(ax: Axes, letter: str) -> None:
    """Writes the letter of a panel above its left corner."""
    ax.set_title(letter, loc="left", fontweight="bold", fontsize=9, pad=3)


def write_note(figure: Figure, text: str) -> None:
    """Writes a note below all panels, such as what bands and bars are."""
    figure.supxlabel(text, x=0.99, ha="right", fontsize=6.5, color="#666666")


def mark_values(ax: Axes, values: Sequence[float], color: str = "black") -> None:
    """Draws crosses at the bottom of a panel, at values of its horizontal axis."""
    if len(values):
        heights = np.full(len(values), 0.03)
        ax.plot(values, heights, **CROSS, color=color, transform=ax.get_xaxis_transform(), clip_on=False)
