"""Pictures and tables of lottery tickets, after Figures 1, 3 and 4 of Frankle & Carbin (ICLR 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbp_jax.report.divergence import left_out_note, told, without_diverged
from cbp_jax.report.drawing import (
    COLUMN,
    check_formats,
    draw_caps,
    label_height,
    marker,
    save_figures,
    style_of_pictures,
    write_letter,
    write_note,
)
from cbp_jax.report.extra import require
from cbp_jax.report.looks import SELDOM, UNOWNED, Style, look_of
from cbp_jax.report.statistics import interval_text
from cbp_jax.report.tables import text_table

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The densities of the paper's Figure 3.
_DENSITIES = ((1.0, 0.513, 0.211), (1.0, 0.07, 0.036, 0.019), (0.513, 0.211))
_BARS = 12  # error bars along a curve
_SMOOTHED = 1 / 50  # of the iterations, for running means of curves
# Of densities, which are not learners; those of kinds of networks come last.
_DENSITY_STYLES = (*SELDOM, *UNOWNED)
_PANELS = {
    "stop_iteration": "Early-stopping iteration",
    "stop_test_accuracy": "Accuracy at early stopping (%)",
    "test_accuracy": "Accuracy at the last iteration (%)",
}


def plot_tickets(results: xr.Dataset, out: str | Path, *, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw the pictures of a run: ``density``, and ``accuracy`` if there are tickets.

    Args:
      results: results of an experiment on lottery tickets, finished or not.
      out: folder for the pictures.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      Paths of the pictures.

    Raises:
      ValueError: no round has finished, or Matplotlib does not write such a kind of file.
    """
    check_formats(formats)
    figures = {"density": plot_densities(results)}
    if "ticket" in results.method.values:
        figures["accuracy"] = plot_accuracies(results)
    return save_figures(figures, Path(out), formats)


def plot_densities(results: xr.Dataset) -> Figure:
    """Plot early stopping and accuracy against density, from dense to sparse: the paper's Figures 1 and 4.

    There is one line for each kind of network: the mean over seeds, with bars from the smallest to the largest value.
    Seeds with which some kind diverged are left out.

    Args:
      results: results of an experiment on lottery tickets.

    Returns:
      A Matplotlib figure.

    Raises:
      ValueError: no round has finished.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    results, left_out = without_diverged(results), left_out_note(results)
    rounds = _finished(results)
    with style_of_pictures():
        figure = Figure(figsize=(COLUMN, 3.1), layout="constrained")
        axes = figure.subplots(2, 2).ravel()
        for letter, ax, (measure, label) in zip("abc", axes, _PANELS.items(), strict=False):
            for number, method in enumerate(results.method.values.tolist()):
                density = 100 * _values(results, "density", method)[:, :rounds].mean(0)
                values = _values(results, measure, method)[:, :rounds] * (100 if "accuracy" in measure else 1)
                shift = 1 + 0.012 * (number - (results.sizes["method"] - 1) / 2)  # so that bars do not overlap
                _draw(ax, results, method, density * shift, values)
            ax.set_xscale("log")
            ax.invert_xaxis()
            ticks = density[:: math.ceil(rounds / 4)]
            ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
            ax.set_xticks([], minor=True)
            ax.set_xlabel("Weights remaining (%)")
            label_height(ax, label)
            write_letter(ax, letter)
        figure.align_ylabels(axes[:-1])
        axes[-1].axis("off")
        axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center")
        _note(figure, results, left_out)
    return figure


def plot_accuracies(results: xr.Dataset) -> Figure:
    """Plot test accuracy during training for tickets of selected densities: the paper's Figure 3.

    The three panels show tickets of high density, tickets of low density, and tickets together with their reinitialized
    networks, or with another control if these are missing. Lines are means over seeds, with bars from the smallest to
    the largest value, of running means over a fiftieth of the iterations: without these, noise hides the curves. Seeds
    with which some kind diverged are left out.

    Args:
      results: results of an experiment on lottery tickets, with "ticket" among its methods.

    Returns:
      A Matplotlib figure.

    Raises:
      ValueError: there are no tickets, or no round has finished.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    methods = results.method.values.tolist()
    if "ticket" not in methods:
        raise ValueError(f"results: there are no tickets to draw; they have {methods}")
    results, left_out = without_diverged(results), left_out_note(results)
    rounds = _finished(results)
    density = _values(results, "density", "ticket")[:, :rounds].mean(0)
    controls = [method for method in ("reinitialized", "random", *methods) if method in methods and method != "ticket"]
    styles: dict[int, Style] = {}
    panels = []
    for wanted in _DENSITIES:
        chosen = list(dict.fromkeys(int(np.abs(np.log(density / each)).argmin()) for each in wanted))
        panels.append(chosen)
        for number in chosen:
            styles.setdefault(number, _DENSITY_STYLES[len(styles) % len(_DENSITY_STYLES)])
    with style_of_pictures():
        figure = Figure(figsize=(COLUMN, 1.4 * len(panels) + 0.8), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, sharey=True)
        iteration = results.iteration.values
        smoothed = 2 * round(len(iteration) * _SMOOTHED / 2) + 1
        for letter, ax, chosen in zip("abc", axes, panels, strict=True):
            compared = ["ticket", *(controls[:1] if letter == "c" else ())]
            for method in compared:
                curves = 100 * _values(results, "test_accuracy_at", method)
                for number in chosen:
                    style, dashes = styles[number], ":" if method != "ticket" else "-"
                    every = max(1, len(iteration) // _BARS)
                    place = (list(styles).index(number) * every) // len(styles)
                    _line(ax, iteration, _running_mean(curves[:, number], smoothed), style, dashes, place, every)
            write_letter(ax, letter)
            ax.margins(x=0.02)
            ax.set_ylabel("Test accuracy (%)")
        axes[-1].set_xlabel("Training iteration")
        # Without the first steps near chance level, which would compress the rest.
        late = 100 * _values(results, "test_accuracy_at", "ticket")[:, :rounds, len(iteration) // 10 :].mean(0)
        low, high = np.nanmin(late), np.nanmax(late)
        axes[0].set_ylim(low - 0.15 * (high - low) - 0.1, high + 0.05 * (high - low) + 0.1)
        _legend_of_densities(figure, {f"{100 * density[number]:.3g}%": style for number, style in styles.items()})
        step = int(iteration[1] - iteration[0]) if len(iteration) > 1 else 1
        more = f"; running means over {smoothed * step:,} iterations" if smoothed > 1 else ""
        if controls:
            more += f"; dotted: {look_of(results, controls[0]).title.lower()}"
        _note(figure, results, left_out + more)
    return figure


def _legend_of_densities(figure: Figure, styles: dict[str, Style]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=style.color, linewidth=1.1) for style in styles.values()]
    options = {"ncols": 3, "title": "Weights remaining", "title_fontsize": 6.5}
    figure.legend(handles, list(styles), loc="outside upper center", **options)


def _running_mean(curves: np.ndarray, width: int) -> np.ndarray:
    """Return centered means over an odd number of points [..., points], over fewer at the ends; NaN stays NaN.

    >>> _running_mean(np.array([[0.0, 3.0, 6.0, np.nan]]), 3)
    array([[1.5, 3. , 4.5, nan]])
    """
    some = np.isfinite(curves)
    total = lambda values: np.apply_along_axis(np.convolve, -1, values, np.ones(width), "same")
    return np.where(some, total(np.where(some, curves, 0.0)) / np.maximum(total(some.astype(float)), 1.0), np.nan)


def summarize_tickets(results: xr.Dataset) -> str:
    """Return the results of a run as text tables, with a row for each round.

    For each kind of network the table shows the mean over seeds ± half its 95% confidence interval (Student's t). A
    second table shows the differences between the ticket and the dense network of the same seed, and between the ticket
    and its reinitialized network. Seeds with which some kind diverged are left out, and listed below.

    Args:
      results: results of an experiment on lottery tickets, finished or not.

    Returns:
      The tables, without a newline at their end.
    """
    notes, results = told(results, paired=True), without_diverged(results)
    methods = results.method.values.tolist()
    rounds = int(np.isfinite(results.density.transpose("task", ...).values).all((1, 2)).sum())
    lines = []
    for measure, label in _PANELS.items():
        scale, digits = (100, 2) if "accuracy" in measure else (1, 0)
        table = [("density", *(look_of(results, method).title for method in methods))]
        values = {method: scale * _values(results, measure, method)[:, :rounds] for method in methods}
        compared: dict[str, Any] = {}
        if "ticket" in methods:
            compared["ticket - dense"] = values["ticket"] - values["ticket"][:, :1]
            if "reinitialized" in methods:
                compared["ticket - reinitialized"] = values["ticket"] - values["reinitialized"]
            table[0] = (*table[0], *compared)
        for number in range(rounds):
            density = 100 * float(results.density.values[:, :, number].mean())
            cells = [interval_text(each[:, number], digits) for each in (*values.values(), *compared.values())]
            table.append((f"{density:.1f}%", *cells))
        lines += ["", label, *text_table(table, left=0)]
    title = f"{results.attrs.get('experiment', 'run')}: mean over seeds ± half its 95% confidence interval"
    return "\n".join([title, *lines, *([""] if notes else []), *notes])


def _finished(results: xr.Dataset) -> int:
    """Return the number of rounds that all kinds and seeds have finished."""
    rounds = int(np.isfinite(results.density.transpose("task", ...).values).all((1, 2)).sum())
    if not rounds:
        raise ValueError("results: no round has finished, so there is nothing to draw")
    return rounds


def _values(results: xr.Dataset, measure: str, method: str) -> np.ndarray:
    """Return a measure of one kind of network, float64 [seeds, rounds, ...]."""
    return results[measure].loc[{"method": method}].transpose("seed", "task", ...).values.astype(np.float64)


def _draw(ax: Axes, results: xr.Dataset, method: str, x: np.ndarray, values: np.ndarray) -> None:
    """Draw a line of means over seeds with a bar at each point."""
    look = look_of(results, method)
    style = look.style or UNOWNED[-1]
    mean = values.mean(0)
    drawn = ax.errorbar(
        x,
        mean,
        [mean - values.min(0), values.max(0) - mean],
        color=style.color,
        linestyle=style.dashes,
        linewidth=1.6 if look.strong else 1.1,
        **marker(style, 3.5),
        elinewidth=0.7,
        capsize=1.5,
        label=look.title,
        zorder=4 if look.strong else 3,
    )
    draw_caps(drawn)


def _line(ax, x, curves, style, dashes, place, every) -> None:
    """Draw a curve of means over seeds with some bars, whose positions differ from those of other curves."""
    some = np.isfinite(curves).all(0)
    x, curves = x[some], curves[:, some]
    mean = curves.mean(0)
    ax.errorbar(
        x,
        mean,
        [mean - curves.min(0), curves.max(0) - mean],
        color=style.color,
        linestyle=dashes,
        linewidth=1.1,
        elinewidth=0.7,
        capsize=1.5,
        errorevery=(min(place, len(x) - 1), every),
    )


def _note(figure: Figure, results: xr.Dataset, more: str = "") -> None:
    seeds = results.sizes["seed"]
    note = f"Mean, smallest and largest value of {seeds} seeds" if seeds > 1 else "One seed"
    write_note(figure, note + more)
