"""Sweeps: the final performance as an array over swept settings, and its picture."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cbp_jax.report.divergence import diverged_tasks
from cbp_jax.report.drawing import (
    COLUMN,
    draw_caps,
    fill,
    label_height,
    mark_values,
    marker,
    style_of_pictures,
    write_note,
)
from cbp_jax.report.extra import require
from cbp_jax.report.looks import PALETTE, SELDOM, UNOWNED, activation_name, label_parts, look_of, number_text, readable
from cbp_jax.report.panels import performance_label
from cbp_jax.report.statistics import finished_tasks, is_accuracy, last_tenth, mean_and_error, performance

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def swept_settings(results: xr.Dataset) -> dict[str, list[str]]:
    """Return the swept settings: numbers and texts of which a variant of a learner was run with several values.

    Args:
      results: results of a run.

    Returns:
      for each swept setting, by name, the variants that were run with several of its values. A variant is a learner
      with the texts that were not swept, and the numbers that only some of its methods have, such as
      "cbp(utility=weight)".
    """
    return _sweep(results)[1]


def sensitivity(results: xr.Dataset) -> xr.Dataset:
    """Return the final performance of a sweep, with an axis for each swept setting.

    A number is swept if a variant was run with several values of it. A setting that is not a number, such as
    ``utility``, is swept if several of its values were run with otherwise equal settings; if not, it belongs to the
    variant, as it always does in results of earlier versions. A number that only some methods of a learner have, such
    as ``dropout_rate``, also distinguishes variants: "bp" and "bp(dropout_rate=0.5)", or, if it is swept, "bp" and,
    without it, "bp(dropout_rate=default)".

    Args:
      results: results of a run whose methods differ in settings, as with `--grid`; finished or not.

    Returns:
      A dataset with the dimension ``variant`` (a learner with its other settings), one dimension for each swept
      setting, and ``seed``. The coordinates of a setting are its values: numbers, float64, in ascending order, or
      texts in the order of the methods, where "default" is the value of a method of the variant that was run without
      the setting. The variables are the performance, such as ``accuracy``, float64, the mean over the last tenth of the
      tasks that a method has finished, or NaN if a combination was not run, or a seed has finished nothing or diverged.
      Two variables lack the dimension ``seed``: ``tasks``, the number of these tasks, and ``diverged``, the number of
      seeds that diverged, both int64. A variant without a setting has the same values along the setting's axis.

    Raises:
      ValueError: nothing was swept.

    Example:
      >>> from cbp_jax.report import new_results, record_task
      >>> results = new_results(
      ...     [f"cbp(utility={utility}, step_size={step})" for utility in ("weight", "random") for step in (0.1, 0.01)],
      ...     ["cbp"] * 4, [{"step_size": 0.1}, {"step_size": 0.01}] * 2, seeds=2, tasks=1, settings={},
      ...     experiment="mine", texts=[{"utility": "weight"}] * 2 + [{"utility": "random"}] * 2)
      >>> record_task(results, 0, {"accuracy": [[0.5, 0.6], [0.7, 0.8], [0.1, 0.2], [0.3, 0.4]]})
      >>> found = sensitivity(results).accuracy.mean("seed")
      >>> found.loc[{"variant": "cbp", "utility": "random"}].round(3).values.tolist()  # in the order of step sizes
      [0.35, 0.15]
      >>> found.loc[{"variant": "cbp", "step_size": 0.1}].to_series().round(3).to_dict()
      {'weight': 0.55, 'random': 0.15}
    """
    xr = require("xarray")
    of_methods, swept, settings = _sweep(results)
    if not swept:
        raise ValueError(f"results must be of a sweep, with several values of a setting; got {_labels(results)}")
    measure = performance(results)
    variants = list(dict.fromkeys(of_methods))
    axes: dict[str, list[Any]] = {}
    for name in swept:
        values = [value for value in dict.fromkeys(settings[name]) if value is not None]
        axes[name] = values if is_text(results[name]) else sorted(values)
    shape = (len(variants), *map(len, axes.values()))
    final = np.full((*shape, results.sizes["seed"]), np.nan)
    tasks, diverged = np.zeros(shape, int), np.zeros(shape, int)
    for i, method in enumerate(results.method.values.tolist()):
        place: list[int | slice] = [variants.index(of_methods[i])]
        for name, values in axes.items():
            value = settings[name][i]
            place.append(slice(None) if value is None else values.index(value))
        seeds, done = finished_tasks(results, method)
        of_seeds = np.full(results.sizes["seed"], np.nan)
        of_seeds[seeds] = last_tenth(results, method)[: len(seeds)] if done else np.nan
        final[tuple(place)], tasks[tuple(place)] = of_seeds, done
        diverged[tuple(place)] = np.isfinite(diverged_tasks(results, method)).sum()
    dims = ("variant", *axes)
    return xr.Dataset(
        {
            measure: ((*dims, "seed"), final, {"long_name": f"{measure} of the last tenth of the tasks"}),
            "tasks": (dims, tasks, {"long_name": "tasks that a method has finished"}),
            "diverged": (dims, diverged, {"long_name": "seeds that diverged"}),
        },
        coords={"variant": variants, **axes, "seed": results.seed.values},
        attrs={name: results.attrs[name] for name in ("experiment", "looks") if name in results.attrs},
    )


def plot_grid(results: xr.Dataset) -> Figure:
    """Plot the final performance against each swept setting, with one line for each combination of the others.

    There is a row for each swept variant of a learner, and a column for each setting. Values are means over seeds with
    95% confidence intervals (Student's t). The axis of a number is logarithmic, except at 0. The values of other
    settings are side by side, and are not connected.

    Args:
      results: results of a run whose methods differ in settings; see :func:`sensitivity`.

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
        more = np.zeros(axes.shape)  # inches
        for i, variant in enumerate(rows):
            for j, name in enumerate(columns):
                if (variant, name) not in panels:
                    axes[i, j].remove()
                    continue
                others = [other for other in swept if other != name and variant in swept[other]]
                values = scale * found[measure].loc[{"variant": variant}]
                # Along the settings for which this variant was not swept, it has one value, or the same everywhere.
                values = values.max([other for other in swept if other not in (name, *others)])
                more[i, j] = _draw(axes[i, j], values, name, others, size[0] / len(columns))
                diverged = found.diverged.loc[{"variant": variant}].max([other for other in swept if other != name])
                mark_values(axes[i, j], _places(found[name])[diverged.values > 0])
                axes[i, j].set_title(_title(results, variant))
            first = axes[i, min(j for j, name in enumerate(columns) if (variant, name) in panels)]
            label_height(first, performance_label(results))
            first.tick_params(labelleft=True)
        seeds = found.sizes["seed"]
        note = f"Mean and 95% confidence interval of {seeds} seeds" if seeds > 1 else "One seed"
        note += "; cross: a seed diverged, and is left out" if found.diverged.any() else ""
        write_note(figure, note)
        figure.set_figheight(size[1] + more.max(1).sum())
    return figure


def _draw(ax: Axes, values: xr.DataArray, name: str, others: Sequence[str], width: float) -> float:
    """Draw lines of values [the setting, the others, seed], in a column of this width, in inches.

    Return how many inches the names below the panel need beyond those of numbers.
    """
    from matplotlib.transforms import ScaledTranslation
    from scipy import stats

    values = values.transpose(name, *others, "seed")
    lines = values.stack(line=others, create_index=False) if others else values.expand_dims("line")
    lines = lines.transpose("line", name, "seed")
    places, side_by_side = _places(values[name]), is_text(values[name])
    # Intervals at the same text are next to each other.
    shifts = np.arange(lines.sizes["line"]) - (lines.sizes["line"] - 1) / 2
    shifts *= min(0.12, 0.5 / len(shifts)) if side_by_side else 0
    # No line is a learner's, so the first colors are those that no learner has.
    styles = itertools.cycle((*UNOWNED, *SELDOM, *PALETTE))
    for number, style in zip(range(lines.sizes["line"]), styles, strict=False):
        of_line = lines.isel(line=number)
        mean, error = mean_and_error(of_line.values, axis=1)
        count = np.isfinite(of_line.values).sum(1)
        half = np.nan_to_num(stats.t.ppf(0.975, np.maximum(count - 1, 1)) * error)
        some = np.isfinite(mean)
        if not some.any():
            continue
        label = ", ".join(f"{readable(other).lower()} {_told(other, of_line[other].item())}" for other in others)
        drawn = ax.errorbar(
            places[some] + shifts[number],
            mean[some],
            half[some],
            color=style.color,
            linestyle="none" if side_by_side else style.dashes,
            linewidth=1.2,
            elinewidth=0.8,
            **marker(style, 3),
            capsize=2,
            label=fill(label, 26) or None,
            gid=label,
        )
        draw_caps(drawn)
    tried = values[name].values
    names = [_told(name, value) for value in tried.tolist()]
    higher, slanted = 0.0, {}
    if side_by_side:
        letters = int(15 * width / len(names))  # as many as fit below one of the texts
        if max(len(word) for text in names for word in text.split()) <= letters:
            names = [fill(text, letters) for text in names]
            higher = 0.1 * max(text.count("\n") for text in names)
        else:
            slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
            higher = 0.035 * max(map(len, names))
        ax.set_xlim(-0.5, len(names) - 0.5)
    elif (tried <= 0).any():
        ax.set_xscale("symlog", linthresh=np.abs(tried[tried != 0]).min(), linscale=0.5)
    else:
        ax.set_xscale("log")
    if side_by_side or len(tried) <= 6:  # more would overlap, unlike the powers of ten
        ax.set_xticks(places, names, **slanted)
        ax.set_xticks([], minor=True)
    ax.set_xlabel(readable(name))
    ax.margins(y=0.1)
    if not others:
        return higher
    handle = {"handlelength": 1.0} if side_by_side else {}
    # Below the panel, where it hides no line.
    legend = ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), **handle)
    higher_legend = 0.11 * sum(text.get_text().count("\n") for text in legend.get_texts())
    if higher + higher_legend:  # at a fixed distance, because the layout changes the panel's height
        below = ScaledTranslation(0, -0.36 - higher, ax.figure.dpi_scale_trans)
        legend.set_bbox_to_anchor((0.5, 0), ax.transAxes + below)
    return higher + higher_legend


def _places(axis: xr.DataArray) -> np.ndarray:
    """Return where the values of a setting are drawn."""
    return np.arange(axis.size) if is_text(axis) else axis.values


def _told(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return activation_name(value) if name == "activation" else value.replace("_", " ")
    return number_text(f"{value:g}")


def is_text(values: xr.DataArray) -> bool:
    """Return whether the values of a setting, or along its axis, are texts."""
    return values.dtype.kind in "OU"


def _sweep(results: xr.Dataset) -> tuple[list[str], dict[str, list[str]], dict[str, list[Any]]]:
    """Return the variant of each method; by swept setting, the variants that swept it; and by setting, the value of
    each method, None where it has none."""
    learners = results.learner.values.tolist()
    labels = [label_parts(results, method) for method in results.method.values.tolist()]
    columns = {str(name): column for name, column in results.coords.items() if column.dims == ("method",)}
    # Other texts along methods, such as their learners, are no settings: no label names them.
    named = {name for label in labels for name, _, _ in label}
    texts = [name for name, column in columns.items() if is_text(column) and name in named]
    settings: dict[str, list[Any]] = {
        name: [None if value == "" or value != value else value for value in column.values.tolist()]  # "" and NaN
        for name, column in columns.items()
        if name in texts or column.dtype.kind == "f"
    }
    optional: list[list[str]] = [[] for _ in labels]  # numbers that belong to the variant of each method

    def variant(i: int, left_out: Collection[str]) -> str:
        """Return a method's label without its numbers, except optional ones, and without some texts."""
        kept = [
            f"{name}{equals}{value}"
            for name, equals, value in labels[i]
            if name not in settings
            or settings[name][i] is None  # a text, which is a number for other methods
            or (name in texts and (name not in left_out or value != settings[name][i]))
        ] + optional[i]
        return f"{learners[i]}({', '.join(kept)})" if kept else learners[i]

    bare = [variant(i, texts) for i in range(len(labels))]
    swept_texts: dict[str, set[str]] = {label: set() for label in bare}
    for name in texts:
        tried: dict[tuple, set[str | None]] = {}
        for i, label in enumerate(bare):
            equal = (label, *(values[i] for other, values in settings.items() if other != name))
            tried.setdefault(equal, set()).add(settings[name][i])
        for (label, *_), found in tried.items():
            if len(found - {None}) > 1:
                swept_texts[label].add(name)
    variants = [variant(i, swept_texts[label]) for i, label in enumerate(bare)]
    for name in texts:  # what a method leaves out, and others of its variant set
        set_by = {variants[i] for i, label in enumerate(bare) if name in swept_texts[label] and settings[name][i]}
        settings[name] = [
            "default" if value is None and label in set_by else value
            for label, value in zip(variants, settings[name], strict=True)
        ]
    # A method without a number would have the same places in the array as those of its variant that have one.
    for name in (name for name in settings if name not in texts):
        of_variants = _values_of(variants, settings[name])
        for i, (label, value) in enumerate(zip(variants, settings[name], strict=True)):
            found = of_variants[label]
            if len(found) == 2 and None in found and value is not None:
                optional[i].append(f"{name}={value:g}")
            elif len(found) > 2 and value is None:
                optional[i].append(f"{name}=default")
        variants = [variant(i, swept_texts[label]) for i, label in enumerate(bare)]
    swept: dict[str, list[str]] = {}
    for name, values in settings.items():
        of_variants = _values_of(variants, values)
        if several := [label for label, found in of_variants.items() if len(found - {None}) > 1]:
            swept[name] = several
    return variants, swept, settings


def _values_of(variants: Sequence[str], values: Sequence[Any]) -> dict[str, set[Any]]:
    """Return the values of a setting that the methods of each variant have, None where they have none."""
    found: dict[str, set[Any]] = {label: set() for label in variants}
    for label, value in zip(variants, values, strict=True):
        found[label].add(value)
    return found


def _title(results: xr.Dataset, variant: str) -> str:
    learner = variant.partition("(")[0]
    return look_of(results, learner).title + variant[len(learner) :].replace("_", " ")


def _labels(results: xr.Dataset) -> str:
    return ", ".join(results.method.values.tolist())
