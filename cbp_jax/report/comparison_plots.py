"""Pictures of comparisons: differences paired by seed, and configurations of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cbp_jax.report.comparisons import (
    Estimate,
    best_candidate,
    chosen_settings,
    of_seeds,
    paired_differences,
    scaled,
    tried_settings,
    tuning_scores,
)
from cbp_jax.report.drawing import COLUMN, draw_interval, style_of_pictures, write_note
from cbp_jax.report.extra import require
from cbp_jax.report.looks import name_of, names_of, readable, style_of
from cbp_jax.report.panels import PANELS
from cbp_jax.report.statistics import better, is_accuracy, performance

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_differences(results: xr.Dataset, baselines: Sequence[str]) -> Figure:
    """Plot differences between methods, paired by seed, over all tasks.

    There is a panel for each baseline and a row for each method, the best on top, with the mean difference and its 95%
    bootstrap interval. Markers are hollow if the interval includes 0.

    Args:
      results: results of a run.
      baselines: methods with which the others are compared; missing ones are ignored.

    Returns:
      A Matplotlib figure.

    Raises:
      ValueError: no baseline or no other method has finished.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    measure = performance(results)
    scale = 100 if is_accuracy(measure) else 1
    results = scaled(results, measure, scale)
    means = {method: of_seeds(results, method).mean() for method in results.method.values.tolist()}
    methods = sorted((m for m in means if math.isfinite(means[m])), key=lambda m: better(measure) * means[m])
    baselines = [baseline for baseline in baselines if baseline in methods]
    if not baselines or len(methods) < 2:
        raise ValueError(f"baselines: no method to compare has finished among {list(means)}")
    settings = chosen_settings(results)
    at_edge = any(settings[method].at_edge for method in methods)
    hollow = False
    with style_of_pictures():
        figure = Figure(figsize=(COLUMN, 0.8 + 0.15 * len(methods)), layout="constrained")
        axes = figure.subplots(1, len(baselines), sharey=True, squeeze=False).ravel()
        for ax, baseline in zip(axes, baselines, strict=True):
            found = paired_differences(results, baseline)
            rows = [(i, m, found[m]) for i, m in enumerate(methods) if m != baseline]
            _draw_differences(ax, results, rows)
            hollow |= any(not estimate.excludes_zero for _, _, estimate in rows)
            ax.axvline(0, color="black", linewidth=0.8, zorder=1)
            ax.set_title(f"minus {name_of(results, baseline)}")
            ax.grid(axis="y", visible=False)
            ax.locator_params(axis="x", nbins=3)
        # Three labels would overlap.
        for ax in axes if len(axes) < 3 else axes[len(axes) // 2 :][:1]:
            ax.set_xlabel("Difference (points)" if scale == 100 else "Difference")
        names = zip(methods, names_of(results, methods), strict=True)
        axes[0].set_yticks(range(len(methods)), [name + " !" * settings[m].at_edge for m, name in names])
        axes[0].set_ylim(-0.6, len(methods) - 0.4)
        what = "Accuracy" if scale == 100 else _label(measure)
        note = f"{what} over {results.sizes['task']:,} tasks, paired over {results.sizes['seed']} seeds; "
        note += "95% bootstrap intervals"
        note += "\nhollow: the interval includes 0" * hollow
        note += "\n!: best setting at the end of the range tried" * at_edge
        write_note(figure, note)
    return figure


def plot_search(results: xr.Dataset) -> Figure:
    """Plot the configurations of a search: performance with the tuning seeds, a panel for each method.

    The horizontal axis is the first setting of the search, logarithmic, with a line for each value of the others.
    Values are means over tuning seeds and all tasks. A ring marks the chosen configuration.

    Args:
      results: results of a comparison with an equal budget, see `experiments.tuning`.

    Returns:
      A Matplotlib figure.

    Raises:
      ValueError: no method has a finished search.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    methods = [m for m in results.method.values.tolist() if best_candidate(results, m) is not None]
    methods = [method for method in methods if tried_settings(results, method)[0]]
    if not methods:
        raise ValueError("results: no search has ended, so there is nothing to draw")
    columns = min(2, len(methods))
    rows = math.ceil(len(methods) / columns)
    with style_of_pictures():
        figure = Figure(figsize=(COLUMN, 1.4 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for i, (ax, method) in enumerate(zip(axes, methods, strict=False)):
            _draw_search(ax, results, method)
            ax.set_ylabel(_label(performance(results)) if i % columns == 0 else "")
        for ax in axes[len(methods) :]:
            ax.remove()
        seeds = results.sizes["tuning_seed"]
        note = (
            f"Mean over {seeds} tuning seed{'s' * (seeds > 1)} and all tasks; ring: chosen, then run with other seeds"
        )
        write_note(figure, note)
    return figure


def _draw_differences(ax: Axes, results: xr.Dataset, rows: Sequence[tuple[int, str, Estimate]]) -> None:
    for i, method, found in rows:
        style, hollow = style_of(results, method), not found.excludes_zero
        draw_interval(ax, found.mean, found.low, found.high, i, style, hollow=hollow, marker="o")


def _draw_search(ax: Axes, results: xr.Dataset, method: str) -> None:
    scale = 100 if is_accuracy(performance(results)) else 1
    tried, best = tried_settings(results, method), best_candidate(results, method)
    scores = scale * tuning_scores(results, method)[: len(tried)]
    axis = next(iter(tried[0]))
    others = lambda i: ", ".join(f"{readable(name)} {value}" for name, value in tried[i].items() if name != axis)
    for line in dict.fromkeys(map(others, range(len(tried)))):
        points = sorted((tried[i][axis], scores[i]) for i in range(len(tried)) if others(i) == line)
        ax.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=line)
    ax.plot(tried[best][axis], scores[best], "o", markersize=7.5, markerfacecolor="none", markeredgecolor="black")
    ax.set_xscale("log")
    ax.set_xlabel(readable(axis))
    ax.set_title(name_of(results, method))
    if others(0):
        ax.legend(fontsize=5.5, handlelength=1.5)


def _label(measure: str) -> str:
    return PANELS[measure].label
