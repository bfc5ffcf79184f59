"""The picture of a benchmark."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cbp_jax.report import aggregates
from cbp_jax.report.benchmarks import BASELINE, Standing, overall, standing
from cbp_jax.report.drawing import COLUMN, fill, style_of_pictures, write_note
from cbp_jax.report.extra import require
from cbp_jax.report.looks import looks_of, name_of, readable
from cbp_jax.report.panels import PANELS
from cbp_jax.report.statistics import better, is_accuracy

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_benchmark(
    problems: Mapping[str, xr.Dataset], counted: Sequence[str] | None = None, *, baseline: str = BASELINE
) -> Figure:
    """Plot the scores over all problems, and the performance in each: a row for each method, the best on top.

    Shows interquartile means over held-out seeds and their 95% stratified bootstrap intervals, as in `benchmark_table`.
    Methods without results for all counted problems are hollow. A line marks plain backpropagation.

    Args:
      problems: by name, the results of all methods; see `benchmarks.standing`.
      counted: the problems that count in the overall score; all by default.
      baseline: label of plain backpropagation.

    Returns:
      A Matplotlib figure.

    Raises:
      ValueError: there is no problem.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    standings = {name: standing(results, baseline) for name, results in problems.items()}
    rows = overall(standings, counted)[::-1]
    named = {method: results for results in problems.values() for method in results.method.values.tolist()}
    with style_of_pictures():
        panels = len(problems) + 1
        down = -(-panels // 3)
        figure = Figure(figsize=(COLUMN, down * (0.45 + 0.13 * max(len(rows), 3)) + 0.2), layout="constrained")
        axes = figure.subplots(down, -(-panels // down), sharey=True, squeeze=False).ravel()
        for i, row in enumerate(rows):
            if np.isfinite(row.score[0]):
                _draw(axes[0], i, row.score, _color(named[row.method], row.method), hollow=not row.complete)
        axes[0].axvline(0, color="#888888", linewidth=0.8, zorder=1)
        axes[0].set_title("All problems")
        axes[0].set_xlabel("Score", fontsize=6)
        for ax, (name, found) in zip(axes[1:], standings.items(), strict=False):
            _draw_problem(ax, found, [row.method for row in rows], named, baseline)
            ax.set_title(textwrap.fill(readable(name), 13))
        axes[0].set_yticks(range(len(rows)), [name_of(named[row.method], row.method) for row in rows])
        axes[0].set_ylim(-0.6, len(rows) - 0.4)
        for ax in axes[panels:]:
            ax.axis("off")
        for ax in axes:
            ax.locator_params(axis="x", nbins=3)
            ax.tick_params(axis="x", labelsize=5.5)
            ax.tick_params(axis="y", labelsize=6)
        note = "Interquartile mean over held-out seeds, 95% stratified bootstrap interval; line: plain backpropagation"
        note += "; right is better: losses are drawn from high to low" * any(ax.xaxis_inverted() for ax in axes)
        note += "; hollow: not run on all problems" * any(not row.complete for row in rows if np.isfinite(row.score[0]))
        write_note(figure, note)
    return figure


def _draw_problem(
    ax: Axes, found: Standing, rows: Sequence[str], named: Mapping[str, xr.Dataset], baseline: str
) -> None:
    sign = better(found.measure) * (100 if is_accuracy(found.measure) else 1)
    for i, method in enumerate(rows):
        values = found.values[found.methods.index(method)] if method in found.methods else np.array([-np.inf])
        if not np.isfinite(values).all():
            continue
        mean = float(aggregates.interquartile_mean(values))
        if method == baseline:
            ax.axvline(sign * mean, color="#888888", linewidth=0.8, zorder=1)
        ends = aggregates.stratified_bootstrap([values])
        _draw(ax, i, [sign * value for value in (mean, *ends)], _color(named[method], method))
    if found.measure == "loss":
        ax.invert_xaxis()  # in every panel, right is better
    ax.set_xlabel(fill(PANELS[found.measure].label, 13), fontsize=6)


def _draw(ax: Axes, i: int, value: Sequence[float], color: str, hollow: bool = False) -> None:
    mean, low, high = value
    ax.hlines(i, low, high, color=color, linewidth=1, zorder=3)
    ax.plot(mean, i, "o", markersize=2.5, color=color, markerfacecolor="white" if hollow else color, zorder=4)
    ax.grid(axis="y", visible=False)


def _color(results: xr.Dataset, method: str) -> str:
    look = looks_of(results).get(results.learner.loc[{"method": method}].item())
    return look.style.color if look is not None and look.style else "#444444"
