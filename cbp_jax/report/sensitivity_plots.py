"""Pictures of the final performance against a hyperparameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cbp_jax.report.drawing import COLUMN, mark_values, style_of_pictures, write_note
from cbp_jax.report.extra import require
from cbp_jax.report.looks import Style, learner_of, learner_styles, look_of, number_text, readable
from cbp_jax.report.panels import PANELS, performance_label
from cbp_jax.report.statistics import (
    better,
    diverged_note,
    last_tenth,
    mean_and_error,
    performance,
    seeds_note,
    started,
    unfinished,
    with_diverged,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_sensitivity(results: xr.Dataset, *, hyperparameter: str | None = None) -> Figure:
    """Plot the final performance against the values of a hyperparameter.

    There is one line for each learner: the mean over seeds of the accuracy, or the loss, over the last tenth of the
    tasks, with one standard error. If a learner was run with several other settings at one value, the best of them is
    drawn. A variant that has not finished its tasks is drawn hollow. The axis of the hyperparameter is logarithmic,
    except at 0.

    Args:
      results: results of a run.
      hyperparameter: name of the coordinate to draw; by default a panel for each swept one.

    Returns:
      A Matplotlib figure.

    Raises:
      ValueError: no learner has finished tasks with several values of the hyperparameter.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    swept = swept_learners(results)
    if hyperparameter is not None:
        if hyperparameter not in swept:
            raise ValueError(f"hyperparameter: got {hyperparameter!r}; these results have {list(swept)}")
        swept = {hyperparameter: swept[hyperparameter]}
    if not swept:
        raise ValueError("results: no learner has finished tasks with several values of a hyperparameter")
    all_learners = [learner for learners in swept.values() for learner in learners]
    label = performance_label(results)
    styles = learner_styles(results, list(dict.fromkeys(all_learners)))
    with style_of_pictures():
        columns = {1: 1, 2: 2, 4: 2}.get(len(swept), 3)
        rows = math.ceil(len(swept) / columns)
        figure = Figure(figsize=(COLUMN * max(1, columns / 2), 1.9 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for i, (name, learners) in enumerate(swept.items()):
            _draw_sensitivity(axes[i], results, name, learners, styles)
            axes[i].set_ylabel(label if i % columns == 0 else "")
        for ax in axes[len(swept) :]:
            ax.remove()
        swept_methods = [method for method in started(results) if learner_of(results, method) in all_learners]
        note = seeds_note(results, swept_methods)
        if any(unfinished(results, method) for method in swept_methods):
            note += "; hollow: unfinished"
        note += diverged_note(results, [m for m in results.method.values if learner_of(results, m) in all_learners])
        write_note(figure, note)
    return figure


def _draw_sensitivity(
    ax: Axes, results: xr.Dataset, hyperparameter: str, learners: Sequence[str], styles: dict[str, Style]
) -> None:
    smallest = math.inf
    zero = False
    panel = PANELS[performance(results)]
    sign = better(panel.measure)
    titles = [look_of(results, learner).title for learner in learners]
    for learner, title in zip(learners, titles, strict=True):
        points: dict[float, tuple[float, float, bool]] = {}
        for method in started(results):
            x = float(results[hyperparameter].loc[{"method": method}])
            if learner_of(results, method) != learner or math.isnan(x):
                continue
            mean, error = mean_and_error(panel.scale * last_tenth(results, method))
            if x not in points or sign * mean > sign * points[x][0]:
                points[x] = (float(mean), float(np.nan_to_num(error)), unfinished(results, method))
        x = np.array(sorted(points))
        y, error, hollow_at = map(np.array, zip(*(points[value] for value in x), strict=True))
        style = styles[learner]
        line = {"color": style.color, "linestyle": style.dashes, "linewidth": 1.2}
        marker = {"marker": style.marker, "markersize": 4.5, "markeredgecolor": style.color}
        ax.plot(x, y, **line, zorder=3)
        ax.errorbar(x, y, error, color=style.color, linestyle="none", linewidth=1, capsize=4, zorder=3)
        for hollow in (False, True):
            some, face = hollow_at == hollow, "white" if hollow else style.color
            ax.plot(x[some], y[some], **marker, markerfacecolor=face, linestyle="none", zorder=4)
        ax.plot([], [], **line, **marker, label=title if titles.count(title) == 1 else learner)
        zero |= x[0] <= 0
        smallest = min(smallest, *np.abs(x[x != 0]))
    if zero:
        ax.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    else:
        ax.set_xscale("log")
    of_learners = [method for method in results.method.values.tolist() if learner_of(results, method) in learners]
    diverged = {
        float(results[hyperparameter].loc[{"method": method}]) for method in with_diverged(results, of_learners)
    }
    mark_values(ax, sorted(value for value in diverged if not math.isnan(value)))
    tried = sorted({x for line in ax.lines for x in line.get_xdata()})
    if len(tried) <= 6:  # more would overlap, unlike the powers of ten
        ax.set_xticks(tried, [number_text(f"{value:g}") for value in tried])
        ax.set_xticks([], minor=True)
    ax.set_xlabel(readable(hyperparameter))
    ax.margins(y=0.1)
    ax.legend()


def swept_learners(results: xr.Dataset) -> dict[str, list[str]]:
    """Return the learners that have finished tasks with several values of a hyperparameter, by hyperparameter."""
    methods = started(results)
    swept: dict[str, list[str]] = {}
    for name, column in results.coords.items():
        if column.dims != ("method",) or column.dtype.kind != "f":
            continue
        tried: dict[str, set[float]] = {}
        for method in methods:
            value = float(column.loc[{"method": method}])
            if not math.isnan(value):
                tried.setdefault(learner_of(results, method), set()).add(value)
        learners = [learner for learner, values in tried.items() if len(values) > 1]
        if learners:
            swept[str(name)] = learners
    return swept
