"""Pictures of a run, after those of "Loss of plasticity in deep continual learning" (Dohare et al., 2024)."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbp_jax.report.divergence import before_divergence, diverged_tasks
from cbp_jax.report.drawing import (
    COLUMN,
    CROSS,
    PANEL,
    check_formats,
    cut_off,
    few_ticks,
    label_height,
    legend_columns,
    mark_values,
    marker,
    save_figures,
    style_of_pictures,
    write_letter,
    write_note,
)
from cbp_jax.report.extra import require
from cbp_jax.report.grids import is_text, plot_grid, swept_settings
from cbp_jax.report.looks import Style, learner_of, look_of, names_of, step_size_note, styles_of
from cbp_jax.report.panels import PANELS, Panel, panels_of
from cbp_jax.report.sensitivity_plots import plot_sensitivity, swept_learners
from cbp_jax.report.statistics import (
    begun,
    better,
    binned,
    diverged_note,
    finished_tasks,
    last_tenth,
    over_steps,
    performance,
    seeds_note,
    started,
    with_diverged,
)
from cbp_jax.report.storage import load_results

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SYMPTOM_PANELS = panels_of("dead_units weight_magnitude effective_rank")
# For tasks with test examples: the first few of these that were measured. As Figure 2 of Dohare et al., Nature 2024.
_TEST_PANELS = panels_of("test_accuracy relative_accuracy dormant_units stable_rank weight_magnitude dead_units")
_MOST_TEST_PANELS = 4
_ALL_TEST_PANELS = panels_of(
    "test_accuracy relative_accuracy accuracy dead_units dormant_units stable_rank effective_rank weight_magnitude "
    "loss",
    accuracy="Training accuracy (%)",
    loss="Training loss",
)
# For agents: as Figures 3 and 4 of Dohare et al., Nature 2024.
_AGENT_PANELS = panels_of(
    "episode_return dormant_units stable_rank weight_magnitude",
    dormant_units="Policy's dormant units (%)",
    stable_rank="Policy's stable rank (%)",
    weight_magnitude="Policy's weight magnitude",
)
# As Figure 5 of Elsayed & Mahmood, ICLR 2024.
_UPDATE_PANELS = panels_of(
    "plasticity loss dead_units weight_rank weight_l1 weight_l2 gradient_l0 gradient_l1 gradient_l2"
)

_MOST_LINES = 8  # more lines are hard to distinguish: then one variant of each learner is drawn


def plot_run(
    run: str | Path | xr.Dataset,
    out: str | Path | None = None,
    *,
    bin_size: int | None = None,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Draw the pictures of a run.

    These are ``tasks``; ``measures``, with more panels, if there are test examples; ``updates`` if these were measured;
    ``sensitivity`` if a learner has several variants; and ``grid`` if several settings of a learner were swept, or one
    that is not a number. They are as wide as a column of a paper.

    Args:
      run: folder of a run, its ``results.nc``, or a dataset of results; the run may be unfinished.
      out: folder for the pictures; by default that of the run.
      bin_size: as in :func:`plot_tasks`.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      Paths of the pictures, ``tasks`` first.

    Raises:
      ValueError: ``run`` is a dataset and ``out`` is missing, no task has finished, or Matplotlib does not write such a
        kind of file.
      FileNotFoundError: there are no results in the folder.
    """
    check_formats(formats)
    if isinstance(run, str | Path):
        results = load_results(run)
        out = out or (Path(run) if Path(run).is_dir() else Path(run).parent)
    else:
        results = run
    if out is None:
        raise ValueError("out must name a folder for the pictures when run is a dataset; got None")
    out = Path(out)
    figures = {"tasks": plot_tasks(results, bin_size=bin_size)}
    if "test_accuracy" in results:
        figures["measures"] = _plot_panels(results, _ALL_TEST_PANELS, None, bin_size)
    if "plasticity" in results:
        figures["updates"] = plot_updates(results, bin_size=bin_size)
    if swept_learners(results):
        figures["sensitivity"] = plot_sensitivity(results)
    swept = swept_settings(results.loc[{"method": started(results)}])
    variants = [variant for of_setting in swept.values() for variant in of_setting]
    if len(set(variants)) < len(variants) or any(is_text(results[name]) for name in swept):
        figures["grid"] = plot_grid(results)
    return save_figures(figures, out, formats)


def plot_tasks(
    results: xr.Dataset,
    *,
    methods: Sequence[str] | None = None,
    bin_size: int | None = None,
    measures: Sequence[str] | None = None,
) -> Figure:
    """Plot performance, dead units, weight magnitude and effective rank over tasks; more with test examples.

    There is one line for each method: the mean over seeds, with a band of one standard error to either side; for agents
    over steps of the environment, with a 95% bootstrap interval. Tasks are averaged in bins, first within each seed. An
    axis is logarithmic if its lines span more than a factor of 30. If an agent's reward falls more than three times as
    far below 0 as the best rises above, the axis ends at minus the best, and says how far the line falls.

    Args:
      results: results of a run. Tasks that have not run, and methods that have not started, are left out.
      methods: labels of the methods to draw, in the order of the legend. By default all, or the :func:`best_variants`
        if there are more than eight.
      bin_size: number of tasks in a bin. By default 1 for up to 100 tasks; for more tasks it gives about 50 bins.
      measures: measures to draw, in a panel each, instead of the above. Missing ones are left out.

    Returns:
      A Matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
      ValueError: a method is unknown, the bin size is less than 1, no task has finished, or the results have neither
        accuracy nor loss.
    """
    judged_by = performance(results)
    if measures is not None:
        panels = panels_of(" ".join(measures))
        return _plot_panels(results, panels, methods, bin_size)
    test_panels = [panel for panel in _TEST_PANELS if panel.measure in results][:_MOST_TEST_PANELS]
    panels = {"test_accuracy": test_panels, "episode_return": _AGENT_PANELS}.get(
        judged_by, (PANELS[judged_by], *_SYMPTOM_PANELS)
    )
    return _plot_panels(results, panels, methods, bin_size)


def plot_updates(results: xr.Dataset, *, methods: Sequence[str] | None = None, bin_size: int | None = None) -> Figure:
    """Plot plasticity, and the sizes of weights and gradients, over tasks.

    Args:
      results: results of a run that measured updates.
      methods: as in :func:`plot_tasks`.
      bin_size: as in :func:`plot_tasks`.

    Returns:
      A Matplotlib figure.

    Raises:
      ValueError: as in :func:`plot_tasks`, or updates were not measured.
    """
    if "plasticity" not in results:
        raise ValueError("results: updates were not measured; run with measure_every")
    return _plot_panels(results, _UPDATE_PANELS, methods, bin_size)


def _plot_panels(
    results: xr.Dataset, panels: Sequence[Panel], methods: Sequence[str] | None, bin_size: int | None
) -> Figure:
    require("matplotlib")
    from matplotlib.figure import Figure

    chosen = methods is None and len(started(results)) > _MOST_LINES
    if methods is None:
        methods = best_variants(results) if chosen else begun(results)
    else:
        for method in methods:
            if method not in results.method.values:
                raise ValueError(f"methods: got {method!r}; these results have {results.method.values.tolist()}")
        methods = [method for method in methods if method in begun(results)]
    if not methods:
        raise ValueError("results: no task has finished, so there is nothing to draw")
    wanted, panels = panels, [panel for panel in panels if panel.measure in results]
    if not panels:
        names = [panel.measure for panel in wanted]
        raise ValueError(f"measures: the results have none of {names}; they have {sorted(map(str, results.data_vars))}")
    tasks = results.sizes["task"]
    bin_size = _default_bin(tasks) if bin_size is None else bin_size
    if bin_size < 1:
        raise ValueError(f"bin_size must be at least 1; got {bin_size}")

    styles = styles_of(results, methods)
    with style_of_pictures():
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        names = names_of(results, methods)
        names_across = legend_columns(names, width=COLUMN)
        legend_rows = math.ceil(len(methods) / names_across)
        height = (PANEL if columns > 1 else 2 * PANEL) * rows + 0.13 * legend_rows + 0.3
        figure = Figure(figsize=(COLUMN, height), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for letter, ax, panel in zip(string.ascii_lowercase, axes, panels, strict=False):
            _draw_panel(ax, results, panel, methods, styles, bin_size)
            write_letter(ax, letter)
            few_ticks(ax, whole=not over_steps(results))
        for ax in axes[len(panels) - columns : len(panels)]:
            ax.set_xlabel("Steps (millions)" if over_steps(results) else "Task")
            ax.tick_params(labelbottom=True)
        for ax in axes[len(panels) :]:
            ax.remove()
        figure.align_ylabels(axes[: len(panels)])
        handles = {line.get_gid(): line for line in axes[0].lines}
        cross_out(axes[0], results, methods, handles)
        figure.legend(
            [handles[method] for method in methods],
            names,
            loc="outside upper center",
            ncols=names_across,
        )
        note = seeds_note(results, methods)
        note += f"; bins of {bin_size} {'intervals' if over_steps(results) else 'tasks'}" if bin_size > 1 else ""
        note += "; the best variant of each learner" if chosen else ""
        note += step_size_note(names)
        write_note(figure, note + diverged_note(results, methods))
    return figure


def best_variants(results: xr.Dataset) -> list[str]:
    """Return the variant of each learner with the best final performance, over the last tenth of the tasks.

    Args:
      results: results of a run. In an unfinished run, the variants of a learner that have progressed furthest are
        compared. Methods without a finished task are left out.

    Returns:
      Labels of methods, in the results' order of learners.
    """
    sign = better(performance(results))
    best: dict[str, tuple[tuple[int, float], str]] = {}
    for method in started(results):
        score = (finished_tasks(results, method)[1], sign * float(last_tenth(results, method).mean()))
        learner = learner_of(results, method)
        if learner not in best or score > best[learner][0]:
            best[learner] = (score, method)
    return [method for _, method in best.values()]


def _draw_panel(
    ax: Axes,
    results: xr.Dataset,
    panel: Panel,
    methods: Sequence[str],
    styles: dict[str, Style],
    bin_size: int,
) -> None:
    means, highs = [], []
    for i, method in enumerate(methods):
        values = before_divergence(results, method, panel.measure)
        task, mean, low, high = binned(panel.scale * values, bin_size, over_steps(results))
        if over_steps(results):
            task = np.interp(task, results.task.values + 1.0, results.step.values / 1e6)
        style, main = styles[method], look_of(results, learner_of(results, method)).strong
        every = max(1, math.ceil(len(task) / 4))
        ax.plot(
            task,
            mean,
            color=style.color,
            linestyle=style.dashes,
            linewidth=1.4 if main else 0.9,
            **marker(style, 3.6 if main else 3),
            # Markers are staggered, so that all of them are visible where lines overlap.
            markevery=(round(every * i / len(methods)) if len(task) > every else 0, every),
            zorder=4 if main else 3,
            gid=method,
        )
        ax.fill_between(task, low, high, color=style.color, alpha=0.2, linewidth=0, zorder=2)
        means.append(mean)
        highs.append(np.fmax(mean, high))
    means = np.concatenate(means)
    low, high = ax.get_ylim()
    if panel.label.endswith("(%)") and means.size and (means.max() < 0.1 or means.min() > 99.9):
        ax.set_ylim(-3, 103)  # none or all
    elif panel.zero:
        top = max(ax.get_ylim()[1], 1.0)
        ax.set_ylim(-0.03 * top, top)  # a line at 0 stays clear of the axis
    elif panel.measure == "episode_return" and means.size and 0 < 3 * means.max() < -means.min():
        # Otherwise a collapse would hide the differences between all other values.
        cut_off(ax, -means.max(), 1.05 * np.concatenate(highs).max())
    elif means.size and 0 < 30 * means.min() < means.max():
        ax.set_yscale("log")
    elif panel.label.endswith("(%)") and means.size and means.max() <= 100 < high:
        ax.set_ylim(low, 100 + 0.03 * (100 - low))
    label_height(ax, panel.label)
    ax.margins(x=0.02)


def cross_out(ax: Axes, results: xr.Dataset, methods: Sequence[str], lines: Mapping[str, Any]) -> None:
    """Draw a cross on a method's line where a seed diverged, or at the bottom if there is no line."""
    for method in with_diverged(results, methods):
        x, y = lines[method].get_data()
        for task in np.unique(diverged_tasks(results, method)[np.isfinite(diverged_tasks(results, method))]):
            at = float(results.step.values[int(task)]) / 1e6 if over_steps(results) else task + 1
            if len(x):
                ax.plot([at], [np.interp(at, x, y)], **CROSS, color=lines[method].get_color())
            else:
                mark_values(ax, [at], lines[method].get_color())


def _default_bin(tasks: int) -> int:
    """Return 1 for up to 100 tasks; for more, a round number that gives about 50 bins."""
    if tasks <= 100:
        return 1
    exact = tasks / 50
    power = 10 ** math.floor(math.log10(exact))
    return int(min((step * power for step in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / exact))))
