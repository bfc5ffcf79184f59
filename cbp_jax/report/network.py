"""A picture of the groups of units of a network, and of the kernels that write and read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cbp_jax.report.drawing import COLUMN, style_of_pictures
from cbp_jax.report.extra import require
from cbp_jax.units import LeftOut, UnitGroup, Units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette; groups of unknown kind are gray.
_COLORS = {"residual": "#0072B2", "conv": "#E69F00", "dense": "#009E73", "head": "#CC79A7", "embedding": "#56B4E9"}
_GRAY = "#8C8C8C"
_ROW, _LANE, _LETTER = 0.15, 0.28, 0.055  # inches: between kernels, at least between groups, width of a letter
_BAR = 0.3  # width of a group, in lanes


def plot_units(units: Sequence[UnitGroup], path: str | Path | None = None) -> Figure:
    """Draw the groups of units in a network, with the kernels that write and read them.

    Each row is a kernel, in forward order, and each bar a group of units, from the first kernel that writes it to the
    last that uses it. The row's arrow goes from the groups that the kernel reads to those that it writes: a stage of a
    residual network is a long bar that several kernels write. An arrow from the left edge reads something that is not a
    group, such as the network's input. An arrow to the right edge writes something that is left out. Kernels that use
    none of the groups are not drawn. A group without a name to its right has that of the row. The picture is as wide as
    a column of a paper, or wider if names or groups need it.

    Args:
      units: groups of units, from `discover_units`, all or selected, or written by hand.
      path: a file for the picture; its extension determines the format.

    Returns:
      A Matplotlib figure.

    Raises:
      ValueError: there are no groups.
      ImportError: Matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, cbp_jax
      >>> from cbp_jax import nets, report
      >>> net, x = nets.ConvNet(num_outputs=2), jnp.zeros((1, 32, 32, 3))
      >>> units = cbp_jax.discover_units(net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x)
      >>> figure = report.plot_units(units)
      >>> [label.get_text() for label in figure.axes[0].get_yticklabels()][:2]
      ['params/Conv_0', 'params/Conv_1']
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    units = units if isinstance(units, Units) else Units(units)
    if not units:
        raise ValueError("units is empty: there is nothing to draw; pass the groups of discover_units")
    writes = {group.name: {part.path for part in group.incoming} for group in units}
    reads = {group.name: {consumer.kernel.path for consumer in group.outgoing} for group in units}
    rows = _in_order(units)
    spans = {name: [row for row, kernel in enumerate(rows) if kernel in writes[name] | reads[name]] for name in writes}
    lanes = _lanes(units, {name: (touched[0], touched[-1]) for name, touched in spans.items()})
    notes = _notes(units, rows, writes)
    width = max(lanes.values()) + 1
    left, right = (_LETTER * max(map(len, texts)) for texts in ([_layer(row) for row in rows], notes.values()))
    with style_of_pictures():
        across = max(COLUMN, left + right + _LANE * (width + 1) + 0.2)
        figure = Figure(figsize=(across, _ROW * len(rows) + 0.45), layout="constrained")
        ax = figure.subplots()
        for group in units:
            _draw_group(ax, group, lanes[group.name], spans[group.name])
        for row, kernel in enumerate(rows):
            sources = [lanes[name] for name in reads if kernel in reads[name]]
            targets = [lanes[name] for name in writes if kernel in writes[name]]
            _draw_kernel(ax, row, sources or [-1], targets or [width])
        ax.set(xlim=(-1, width), ylim=(len(rows) - 0.3, -0.7), xticks=[])
        ax.set_yticks(range(len(rows)), [_layer(row) for row in rows])
        ax.tick_params(axis="y", length=0)
        ax.spines[:].set_visible(False)
        beside = ax.secondary_yaxis("right")
        beside.set_yticks(list(notes), list(notes.values()))
        beside.tick_params(length=0)
        beside.spines[:].set_visible(False)
        _draw_legend(figure, units)
        if path is not None:
            figure.savefig(path)
    return figure


def _in_order(units: Units) -> list[str]:
    """Return the kernels that write or read a group, in forward order if known, otherwise group by group."""
    touched = dict.fromkeys(
        path
        for group in units
        for path in (*(part.path for part in group.incoming), *(consumer.kernel.path for consumer in group.outgoing))
    )
    known = [path for path in units.kernels if path in touched]
    return list(dict.fromkeys([*known, *touched]))


def _lanes(units: Units, spans: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Return a column for each group, such that groups with overlapping spans have different columns; residual streams
    leftmost."""
    taken: list[list[tuple[int, int]]] = []
    lanes: dict[str, int] = {}
    first = 0
    for residual in (True, False):
        for group in units:
            if (group.kind == "residual") != residual:
                continue
            start, end = spans[group.name]
            free = (
                lane
                for lane in range(first, len(taken))
                if all(end < other_start or other_end < start for other_start, other_end in taken[lane])
            )
            lane = next(free, len(taken))
            if lane == len(taken):
                taken.append([])
            taken[lane].append((start, end))
            lanes[group.name] = lane
        first = len(taken)
    return lanes


def _notes(units: Units, rows: list[str], writes: dict[str, set[str]]) -> dict[int, str]:
    """Return the text to the right of a row: groups that begin there, and what is left out."""
    notes: dict[int, list[str]] = {}
    for group in units:
        row = next(row for row, kernel in enumerate(rows) if kernel in writes[group.name])
        named = "" if group.name == _layer(rows[row]) else f"{group.name}: "
        notes.setdefault(row, []).append(f"{named}{group.size} {group.kind}".rstrip())
    for row, kernel in enumerate(rows):
        item = _left_out(units, kernel)
        if item is not None and not any(kernel in paths for paths in writes.values()):
            named = "" if _layer(item.name) == _layer(kernel) else f"{item.name}: "
            notes.setdefault(row, []).append(f"{named}{item.size}, left out")
    return {row: ", ".join(texts) for row, texts in notes.items()}


def _left_out(units: Units, kernel: str) -> LeftOut | None:
    return next((item for item in units.left_out if item.name in (kernel, _layer(kernel))), None)


def _layer(path: str) -> str:
    """Return the path of a kernel without the name that Flax gives to all kernels."""
    return path.removesuffix("/kernel").removesuffix("/embedding")


def _draw_group(ax: Axes, group: UnitGroup, lane: int, touched: list[int]) -> None:
    from matplotlib.patches import FancyBboxPatch

    start, end = touched[0] - 0.3, touched[-1] + 0.3
    bar = FancyBboxPatch(
        (lane - _BAR / 2, start),
        _BAR,
        end - start,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=_COLORS.get(group.kind, _GRAY),
        edgecolor="none",
        gid=group.name,
        zorder=2,
    )
    ax.add_patch(bar)


def _draw_kernel(ax: Axes, row: int, sources: list[int], targets: list[int]) -> None:
    """Draw an arrow from the groups that a kernel reads to those that it writes."""
    for source in sources:
        if source >= 0:
            ax.plot(source, row, "o", markersize=3, color="white", zorder=4)
        for target in targets:
            head = target + (0.5 if target < source else -0.5) * _BAR if target != source else target
            ax.annotate(
                "",
                xy=(head, row),
                xytext=(source, row),
                arrowprops={
                    "arrowstyle": "-|>,head_width=0.14,head_length=0.3",
                    "linewidth": 0.8,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
                zorder=3,
            )


def _draw_legend(figure: Figure, units: Units) -> None:
    from matplotlib.patches import Patch

    kinds = dict.fromkeys(group.kind for group in units)
    handles = [Patch(color=_COLORS.get(kind, _GRAY), label=kind or "unknown") for kind in kinds]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1)
