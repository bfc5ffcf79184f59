"""Sweeps: the final performance as an array over swept settings, and its picture."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cbp_jax.report.divergence import diverged_tasks
from cbp_jax.report.drawing import COLUMN, label_height, mark_values, style_of_pictures, write_note
from cbp_jax.report.extra import require
from cbp_jax.report.looks import PALETTE, look_of, readable
from cbp_jax.report.panels import performance_label
from cbp_jax.report.statistics import finished_tasks, is_accuracy, last_tenth, mean_and_error, performance

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def swept_settings(results: xr.Dataset, methods: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Return the swept settings: numbers for which a variant of a learner was run with several values.

    Args:
      results: results of a run.
      methods: labels of the methods to consider, by default all.

    Returns:
      for each swept setting, by name, the variants that were run with several of its values. A variant is a learner
      with its non-numeric settings, such as "cbp(utility=weight)".
    """
    swept: dict[str, list[str]] = {}
    for name, column in results.coords.items():
        if column.dims != ("method",) or column.dtype.kind != "f":
            continue
        tried: dict[str, set[float]] = {}
        for method, value in zip(results.method.values.tolist(), column.values.tolist(), strict=True):
            if not math.isnan(value) and (methods is None or method in methods):
                tried.setdefault(_variant(results, method), set()).add(value)
        if variants := [variant for variant, values in tried.items() if len(values) > 1]:
            swept[str(name)] = variants
    return swept


def sensitivity(results: xr.Dataset) -> xr.Dataset:
    """Return the final performance of a sweep, with an axis for each swept setting.

    Args:
      results: results of a run whose methods differ in numbers, as with `--grid`; finished or not.

    Returns:
      A dataset with the dimension ``variant`` (a learner with its other settings), one dimension for each swept
      setting, whose coordinates are the values in order, and ``seed``. Its variables are the performance, such as
      ``accuracy``, float64, the mean over the last tenth of the tasks that a method has finished, or NaN if a
      combination was not run, or a seed has finished nothing or diverged. Two variables lack the dimension ``seed``:
      ``tasks``, the number of these tasks, and ``diverged``, the number of seeds that diverged. A variant without a
      setting has the same values along the setting's axis.

    Raises:
      ValueError: nothing was swept.

    Example:
      >>> from cbp_jax.report import new_results, record_task
      >>> steps = [{"step_size": 0.1}, {"step_size": 0.01}]
      >>> results = new_results(["bp(step_size=0.1)", "bp"], ["bp", "bp"], steps, seeds=2, tasks=1, settings={},
      ...                       experiment="mine")
      >>> record_task(results, 0, {"accuracy": [[0.5, 0.6], [0.7, 0.8]]})
      >>> sensitivity(results).accuracy.mean("seed").loc[{"variant": "bp"}].round(3).values.tolist()
      [0.75, 0.55]
    """
    xr = require("xarray")
    names = list(swept_settings(results))
    if not names:
        raise ValueError(f"results must be of a sweep, with several values of a number; got {_labels(results)}")
    measure = performance(results)
    variants = list(dict.fromkeys(_variant(results, method) for method in results.method.values.tolist()))
    axes = [np.unique(results[name].values[~np.isnan(results[name].values)]) for name in names]
    shape = (len(variants), *map(len, axes))
    final = np.full((*shape, results.sizes["seed"]), np.nan)
    tasks, diverged = np.zeros(shape, int), np.zeros(shape, int)
    for method in results.method.values.tolist():
        place: list[int | slice] = [variants.index(_variant(results, method))]
        for name, values in zip(names, axes, strict=True):
            value = float(results[name].loc[{"method": method}])
            place.append(slice(None) if math.isnan(value) else int(np.searchsorted(values, value)))
        seeds, done = finished_tasks(results, method)
        of_seeds = np.full(results.sizes["seed"], np.nan)
        of_seeds[seeds] = last_tenth(results, method)[: len(seeds)] if done else np.nan
        final[tuple(place)], tasks[tuple(place)] = of_seeds, done
        diverged[tuple(place)] = np.isfinite(diverged_tasks(results, method)).sum()
    dims = ("variant", *names)
    return xr.Dataset(
        {
            measure: ((*dims, "seed"), final, {"long_name": f"{measure} of the last tenth of the tasks"}),
            "tasks": (dims, tasks, {"long_name": "tasks that a method has finished"}),
            "diverged": (dims, diverged, {"long_name": "seeds that diverged"}),
        },
        coords={"variant": variants, **dict(zip(names, axes, strict=True)), "seed": results.seed.values},
        attrs={name: results.attrs[name] for name in ("experiment", "looks") if name in results.attrs},
    )


def plot_grid(results: xr.Dataset) -> Figure:
    """Plot the final performance against each swept setting, with one line for each combination of the others.

    There is a row for each swept variant of a learner, and a column for each setting. Values are means over seeds with
    95% confidence intervals (Student's t). The axis of a setting is logarithmic, except at 0.

    Args:
      results: results of a run whose methods differ in numbers.

    Returns:
      A Matplotlib figure.

    Raises:
      ValueError: nothing was swept, or no swept method has finished a task.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    found, swept = sensitivity(results), swept_settings(results)
    measure = performance(results)
    panels = [(variant, name) for variant in found.variant.values.tolist() for name in swept if variant in swept[name]]
    panels = [(variant, name) for variant, name in panels if found[measure].loc[{"variant": variant}].notnull().any()]
    if not panels:
        raise ValueError("results: no swept method has finished a task, so there is nothing to draw")
    rows, columns = (list(dict.fromkeys(panel[part] for panel in panels)) for part in (0, 1))
    scale = 100 if is_accuracy(measure) else 1
    with style_of_pictures():
        size = (COLUMN * max(1, len(columns) / 2), 2.0 * len(rows) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(rows), len(columns), sharey="row", squeeze=False)
        for i, variant in enumerate(rows):
            for j, name in enumerate(columns):
                if (variant, name) not in panels:
                    axes[i, j].remove()
                    continue
                others = [other for other in swept if other != name and variant in swept[other]]
                values = scale * found[measure].loc[{"variant": variant}]
                # Settings for which this variant was not swept are not shown.
                values = values.isel({other: 0 for other in swept if other not in (name, *others)})
                _draw(axes[i, j], values, name, others)
                diverged = found.diverged.loc[{"variant": variant}].max([other for other in swept if other != name])
                mark_values(axes[i, j], found[name].values[diverged.values > 0])
                axes[i, j].set_title(_title(results, variant))
            first = axes[i, min(j for j, name in enumerate(columns) if (variant, name) in panels)]
            label_height(first, performance_label(results))
            first.tick_params(labelleft=True)
        seeds = found.sizes["seed"]
        note = f"Mean and 95% confidence interval of {seeds} seeds" if seeds > 1 else "One seed"
        note += "; cross: a seed diverged, and is left out" if found.diverged.any() else ""
        write_note(figure, note)
    return figure


def _draw(ax: Axes, values: xr.DataArray, name: str, others: Sequence[str]) -> None:
    """Draw lines of values [the setting, the others, seed]."""
    from scipy import stats

    values = values.transpose(name, *others, "seed")
    lines = values.stack(line=others, create_index=False) if others else values.expand_dims("line")
    lines = lines.transpose("line", name, "seed")
    for number, style in zip(range(lines.sizes["line"]), PALETTE * (1 + lines.sizes["line"]), strict=False):
        of_line = lines.isel(line=number)
        mean, error = mean_and_error(of_line.values, axis=1)
        count = np.isfinite(of_line.values).sum(1)
        half = np.nan_to_num(stats.t.ppf(0.975, np.maximum(count - 1, 1)) * error)
        some = np.isfinite(mean)
        if not some.any():
            continue
        label = ", ".join(f"{readable(other).lower()} {float(of_line[other]):g}" for other in others)
        ax.errorbar(
            of_line[name].values[some],
            mean[some],
            half[some],
            color=style.color,
            linestyle=style.dashes,
            linewidth=1.2,
            marker=style.marker,
            markersize=3,
            capsize=2,
            label=label or None,
            gid=label,
        )
    tried = values[name].values
    if (tried <= 0).any():
        ax.set_xscale("symlog", linthresh=np.abs(tried[tried != 0]).min(), linscale=0.5)
    else:
        ax.set_xscale("log")
    if len(tried) <= 6:  # more would overlap, unlike the powers of ten
        ax.set_xticks(tried, [f"{value:g}" for value in tried])
        ax.set_xticks([], minor=True)
    ax.set_xlabel(readable(name))
    ax.margins(y=0.1)
    if others:  # below the panel, where it hides no line
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3))


def _variant(results: xr.Dataset, method: str) -> str:
    """Return a method's label without its numbers."""
    learner = str(results.learner.loc[{"method": method}].item())
    numbers = [str(name) for name, column in results.coords.items() if column.dims == ("method",)]
    inside = method.removeprefix(learner).removeprefix("(").removesuffix(")")
    kept = [part for part in re.split(r", (?![^()]*\))", inside) if part and part.partition("=")[0] not in numbers]
    return f"{learner}({', '.join(kept)})" if kept else learner


def _title(results: xr.Dataset, variant: str) -> str:
    learner = variant.partition("(")[0]
    return look_of(results, learner).title + variant[len(learner) :].replace("_", " ")


def _labels(results: xr.Dataset) -> str:
    return ", ".join(results.method.values.tolist())
