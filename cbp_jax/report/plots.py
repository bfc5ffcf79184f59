"""Pictures of a run, after those of "Loss of plasticity in deep continual learning" (Dohare et al., 2024).

Figures are created as objects and drawn by Agg. Nothing here touches pyplot, its backend or its settings, so pictures
can be made on a server, in a thread, and alongside the user's own figures.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cbp_jax.report.divergence import before_divergence, diverged_tasks
from cbp_jax.report.grids import plot_grid, swept_settings
from cbp_jax.report.looks import PALETTE, Look, Style, looks_of, readable
from cbp_jax.report.results import load_results, require
from cbp_jax.report.statistics import (
    better,
    bootstrap_interval,
    finished_tasks,
    is_accuracy,
    last_tenth,
    mean_and_error,
    performance,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Panel(NamedTuple):
    measure: str
    label: str
    scale: float
    zero: bool  # whether the axis starts at 0


_PANELS = {
    panel.measure: panel
    for panel in (
        _Panel("episode_return", "Reward per episode", 1.0, False),
        _Panel("test_accuracy", "Correct, test examples (%)", 100.0, False),
        _Panel("relative_accuracy", "Correct, less retrained (%)", 100.0, False),
        _Panel("accuracy", "Correct (%)", 100.0, False),
        _Panel("loss", "Loss", 1.0, False),
        _Panel("plasticity", "Plasticity", 1.0, False),
        _Panel("dead_units", "Dead units (%)", 100.0, True),
        _Panel("dormant_units", "Dormant units (%)", 100.0, True),
        _Panel("stable_rank", "Stable rank (scaled, 0-100)", 100.0, False),
        _Panel("effective_rank", "Effective rank (scaled, 0-100)", 100.0, False),
        _Panel("weight_magnitude", "Mean weight magnitude", 1.0, False),
        _Panel("weight_rank", "Weight rank (%)", 100.0, False),
        _Panel("weight_effective_rank", "Effective rank of weights (%)", 100.0, False),
        _Panel("weight_sparsity", "Weights near 0 (%)", 100.0, True),
        _Panel("weight_l1", "L1 norm of weights", 1.0, False),
        _Panel("weight_l2", "L2 norm of weights", 1.0, False),
        _Panel("gradient_l0", "Gradients not 0 (%)", 100.0, False),
        _Panel("gradient_l1", "L1 norm of gradients", 1.0, False),
        _Panel("gradient_l2", "L2 norm of gradients", 1.0, False),
    )
}


def _panels(measures: str, **labels: str) -> tuple[_Panel, ...]:
    """The panels of some measures, optionally with their own labels."""
    return tuple(_PANELS[name]._replace(label=labels.get(name, _PANELS[name].label)) for name in measures.split())


_SYMPTOM_PANELS = _panels("dead_units weight_magnitude effective_rank")
# For tasks with test examples.
_TEST_PANELS = _panels(
    "test_accuracy relative_accuracy accuracy dead_units dormant_units stable_rank effective_rank weight_magnitude "
    "loss",
    accuracy="Correct in training (%)",
    loss="Loss in training",
)
# For agents, as in Figures 3 and 4 of Dohare et al., Nature 2024.
_AGENT_PANELS = _panels(
    "episode_return dormant_units stable_rank weight_magnitude",
    dormant_units="Policy's dormant units (%)",
    stable_rank="Policy's stable rank (scaled, 0-100)",
    weight_magnitude="Policy's mean weight magnitude",
)
# As in Figure 5 of Elsayed & Mahmood, ICLR 2024.
_UPDATE_PANELS = _panels(
    "plasticity loss dead_units weight_rank weight_l1 weight_l2 gradient_l0 gradient_l1 gradient_l2"
)


_MOST_LINES = 8  # with more lines, only one variant of each learner is drawn
_CROSS = {"marker": "x", "markersize": 6, "markeredgewidth": 1.5, "linestyle": "none", "zorder": 5, "gid": "diverged"}
_HANDLE = 3.6  # length of a line in the legend, in ems, so that its dashes repeat

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


def plot_run(
    run: str | Path | xr.Dataset,
    out: str | Path | None = None,
    *,
    bin_size: int | None = None,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Draws the pictures of a run.

    These are ``tasks``; ``updates`` if these were measured; ``sensitivity`` if a learner has several variants; and
    ``grid`` if several settings of a learner were swept.

    Args:
      run: folder of a run, its ``results.nc``, or a dataset of results; the run may be unfinished.
      out: folder for the pictures; by default that of the run.
      bin_size: as in :func:`plot_tasks`.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      Paths of the pictures, ``tasks`` first.

    Raises:
      ValueError: ``run`` is a dataset and ``out`` is missing, or no task has finished.
      FileNotFoundError: there are no results in the folder.
    """
    if isinstance(run, str | Path):
        results = load_results(run)
        out = out or (Path(run) if Path(run).is_dir() else Path(run).parent)
    else:
        results = run
    if out is None:
        raise ValueError("out must name a folder for the pictures when run is a dataset; got None")
    out = Path(out)
    figures = {"tasks": plot_tasks(results, bin_size=bin_size)}
    if "plasticity" in results:
        figures["updates"] = plot_updates(results, bin_size=bin_size)
    if _swept(results):
        figures["sensitivity"] = plot_sensitivity(results)
    swept = [variant for variants in swept_settings(results, _started(results)).values() for variant in variants]
    if len(set(swept)) < len(swept):
        figures["grid"] = plot_grid(results)
    return save_figures(figures, out, formats)


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


def plot_tasks(
    results: xr.Dataset,
    *,
    methods: Sequence[str] | None = None,
    bin_size: int | None = None,
    measures: Sequence[str] | None = None,
) -> Figure:
    """Plots performance, dead units, weight magnitude and effective rank over tasks; more with test examples.

    There is one line for each method: the mean over seeds, with a band of one standard error to either side; for agents
    over steps of the environment, with a 95% bootstrap interval. Tasks are averaged in bins, first within each seed. An
    axis is logarithmic if its lines span more than a factor of 30.

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
        panels = _panels(" ".join(measures))
        return _plot_panels(results, panels, methods, bin_size, columns=2 if len(panels) <= 4 else 3)
    panels = {"test_accuracy": _TEST_PANELS, "episode_return": _AGENT_PANELS}.get(
        judged_by, (_PANELS[judged_by], *_SYMPTOM_PANELS)
    )
    return _plot_panels(results, panels, methods, bin_size, columns=2)


def plot_updates(results: xr.Dataset, *, methods: Sequence[str] | None = None, bin_size: int | None = None) -> Figure:
    """Plots plasticity, and the sizes of weights and gradients, over tasks.

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
    return _plot_panels(results, _UPDATE_PANELS, methods, bin_size, columns=3)


def _plot_panels(
    results: xr.Dataset, panels: Sequence[_Panel], methods: Sequence[str] | None, bin_size: int | None, columns: int
) -> Figure:
    require("matplotlib")
    from matplotlib.figure import Figure

    chosen = methods is None and len(_started(results)) > _MOST_LINES
    if methods is None:
        methods = best_variants(results) if chosen else _begun(results)
    else:
        for method in methods:
            _check(method in results.method.values, "methods", method, results.method.values.tolist())
        methods = [method for method in methods if method in _begun(results)]
    if not methods:
        raise ValueError("results: no task has finished, so there is nothing to draw")
    panels = [panel for panel in panels if panel.measure in results]
    tasks = results.sizes["task"]
    bin_size = _default_bin(tasks) if bin_size is None else bin_size
    if bin_size < 1:
        raise ValueError(f"bin_size must be at least 1; got {bin_size}")

    styles = _styles(results, methods)
    with style_of_pictures():
        columns = min(columns, len(panels))
        rows = math.ceil(len(panels) / columns)
        width = 3.6 * columns if columns < 3 else 3.0 * columns
        names = _names(results, methods)
        legend_columns = _legend_columns(names, width=width)
        legend_rows = math.ceil(len(methods) / legend_columns)
        height = 2.25 if columns < 3 else 1.9
        figure = Figure(figsize=(width, height * rows + 0.17 * legend_rows + 0.25), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for letter, ax, panel in zip("abcdefghi", axes, panels, strict=False):
            _draw_panel(ax, results, panel, methods, styles, bin_size)
            ax.set_title(letter, loc="left", fontweight="bold", fontsize=9, pad=3)
        for ax in axes[len(panels) - columns : len(panels)]:
            ax.set_xlabel("Steps of the environment (millions)" if _over_steps(results) else "Task")
            ax.tick_params(labelbottom=True)
        for ax in axes[len(panels) :]:
            ax.remove()
        handles = {line.get_gid(): line for line in axes[0].lines}
        _mark_diverged(axes[0], results, methods, handles)
        figure.legend(
            [handles[method] for method in methods],
            names,
            loc="outside upper center",
            ncols=legend_columns,
            handlelength=_HANDLE,
            columnspacing=1.6,
        )
        note = _seeds_note(results, methods)
        note += f"; bins of {bin_size} {'intervals' if _over_steps(results) else 'tasks'}" if bin_size > 1 else ""
        note += "; the best variant of each learner" if chosen else ""
        note += _diverged_note(results, methods)
        figure.supxlabel(note, x=0.99, ha="right", fontsize=6.5, color="#666666")
    return figure


def plot_sensitivity(results: xr.Dataset, *, hyperparameter: str | None = None) -> Figure:
    """Plots the final performance against the values of a hyperparameter.

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

    swept = _swept(results)
    if hyperparameter is not None:
        _check(hyperparameter in swept, "hyperparameter", hyperparameter, list(swept))
        swept = {hyperparameter: swept[hyperparameter]}
    if not swept:
        raise ValueError("results: no learner has finished tasks with several values of a hyperparameter")
    all_learners = [learner for learners in swept.values() for learner in learners]
    label = performance_label(results)
    styles = _learner_styles(results, list(dict.fromkeys(all_learners)))
    with style_of_pictures():
        columns = {1: 1, 2: 2, 4: 2}.get(len(swept), 3)
        rows = math.ceil(len(swept) / columns)
        figure = Figure(figsize=(7.2 if columns > 1 else 3.6, 2.5 * rows + 0.25), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for i, (name, learners) in enumerate(swept.items()):
            _draw_sensitivity(axes[i], results, name, learners, styles)
            axes[i].set_ylabel(label if i % columns == 0 else "")
        for ax in axes[len(swept) :]:
            ax.remove()
        swept_methods = [method for method in _started(results) if _learner(results, method) in all_learners]
        note = _seeds_note(results, swept_methods)
        if any(_unfinished(results, method) for method in swept_methods):
            note += "; hollow: unfinished"
        note += _diverged_note(results, [m for m in results.method.values if _learner(results, m) in all_learners])
        figure.supxlabel(note, x=0.99, ha="right", fontsize=6.5, color="#666666")
    return figure


def performance_label(results: xr.Dataset) -> str:
    """The label of an axis of the final performance."""
    if is_accuracy(performance(results)):
        return "Correct, last tenth of tasks (%)"
    return _PANELS[performance(results)].label + ", last tenth" + " of tasks" * (not _over_steps(results))


def best_variants(results: xr.Dataset) -> list[str]:
    """For each learner the variant with the best final performance, over the last tenth of the tasks.

    Args:
      results: results of a run. In an unfinished run, the variants of a learner that have progressed furthest are
        compared. Methods without a finished task are left out.

    Returns:
      Labels of methods, in the results' order of learners.
    """
    sign = better(performance(results))
    best: dict[str, tuple[tuple[int, float], str]] = {}
    for method in _started(results):
        score = (finished_tasks(results, method)[1], sign * float(last_tenth(results, method).mean()))
        learner = _learner(results, method)
        if learner not in best or score > best[learner][0]:
            best[learner] = (score, method)
    return [method for _, method in best.values()]


def _draw_panel(
    ax: Axes,
    results: xr.Dataset,
    panel: _Panel,
    methods: Sequence[str],
    styles: dict[str, Style],
    bin_size: int,
) -> None:
    means = []
    for i, method in enumerate(methods):
        values = before_divergence(results, method, panel.measure)
        task, mean, low, high = _binned(panel.scale * values, bin_size, _over_steps(results))
        if _over_steps(results):
            task = np.interp(task, results.task.values + 1.0, results.step.values / 1e6)
        style, main = styles[method], _look(results, _learner(results, method)).strong
        every = max(1, math.ceil(len(task) / 6))
        ax.plot(
            task,
            mean,
            color=style.color,
            linestyle=style.dashes,
            linewidth=1.8 if main else 1.2,
            marker=style.marker,
            markersize=4.5 if main else 4,
            markerfacecolor="white" if style.hollow else style.color,
            markeredgecolor=style.color if style.hollow else "white",
            markeredgewidth=1 if style.hollow else 0.5,
            # Staggered, so that markers are visible even where lines overlap.
            markevery=(round(every * i / len(methods)) if len(task) > every else 0, every),
            zorder=4 if main else 3,
            gid=method,
        )
        ax.fill_between(task, low, high, color=style.color, alpha=0.2, linewidth=0, zorder=2)
        means.append(mean)
    means = np.concatenate(means)
    if panel.zero:
        top = max(ax.get_ylim()[1], 1.0)
        ax.set_ylim(-0.03 * top, top)  # so that a line at 0 does not coincide with the axis
    elif means.size and 0 < 30 * means.min() < means.max():
        ax.set_yscale("log")
    ax.set_ylabel(panel.label)
    ax.margins(x=0.02)


def _draw_sensitivity(
    ax: Axes, results: xr.Dataset, hyperparameter: str, learners: Sequence[str], styles: dict[str, Style]
) -> None:
    smallest = math.inf
    zero = False
    panel = _PANELS[performance(results)]
    sign = better(panel.measure)
    titles = [_look(results, learner).title for learner in learners]
    for learner, title in zip(learners, titles, strict=True):
        points: dict[float, tuple[float, float, bool]] = {}
        for method in _started(results):
            x = float(results[hyperparameter].loc[{"method": method}])
            if _learner(results, method) != learner or math.isnan(x):
                continue
            mean, error = mean_and_error(panel.scale * last_tenth(results, method))
            if x not in points or sign * mean > sign * points[x][0]:
                points[x] = (float(mean), float(np.nan_to_num(error)), _unfinished(results, method))
        x = np.array(sorted(points))
        y, error, unfinished = map(np.array, zip(*(points[value] for value in x), strict=True))
        style = styles[learner]
        line = {"color": style.color, "linestyle": style.dashes, "linewidth": 1.2}
        marker = {"marker": style.marker, "markersize": 4.5, "markeredgecolor": style.color}
        ax.plot(x, y, **line, zorder=3)
        ax.errorbar(x, y, error, color=style.color, linestyle="none", linewidth=1, capsize=4, zorder=3)
        for hollow in (False, True):
            some, face = unfinished == hollow, "white" if hollow else style.color
            ax.plot(x[some], y[some], **marker, markerfacecolor=face, linestyle="none", zorder=4)
        ax.plot([], [], **line, **marker, label=title if titles.count(title) == 1 else learner)
        zero |= x[0] <= 0
        smallest = min(smallest, *np.abs(x[x != 0]))
    if zero:
        ax.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    else:
        ax.set_xscale("log")
    of_learners = [method for method in results.method.values.tolist() if _learner(results, method) in learners]
    diverged = {
        float(results[hyperparameter].loc[{"method": method}]) for method in _with_diverged(results, of_learners)
    }
    mark_values(ax, sorted(value for value in diverged if not math.isnan(value)))
    tried = sorted({x for line in ax.lines for x in line.get_xdata()})
    if len(tried) <= 6:  # more would overlap, unlike the powers of ten
        ax.set_xticks(tried, [f"{value:g}" for value in tried])
        ax.set_xticks([], minor=True)
    ax.set_xlabel(readable(hyperparameter))
    ax.margins(y=0.1)
    ax.legend(handlelength=_HANDLE)


def _over_steps(results: xr.Dataset) -> bool:
    """Whether "tasks" are intervals of an agent's life."""
    return performance(results) == "episode_return"


def _binned(values: np.ndarray, bin_size: int, bootstrap: bool = False) -> tuple[np.ndarray, ...]:
    """Bins of values [seeds, tasks]: their centers, with tasks counted from 1, means over seeds, and ends of the
    band."""
    seeds, tasks = values.shape
    bins = math.ceil(tasks / bin_size)
    # Padded with NaN, which means ignore, like tasks that have not run.
    values = np.pad(values, ((0, 0), (0, bins * bin_size - tasks)), constant_values=np.nan)
    task = np.broadcast_to(np.arange(1.0, bins * bin_size + 1), values.shape)
    task = np.where(np.isfinite(values), task, np.nan)
    per_seed, _ = mean_and_error(values.reshape(seeds, bins, bin_size), axis=2)
    mean, error = mean_and_error(per_seed, axis=0)
    middle, _ = mean_and_error(task.reshape(seeds, bins, bin_size).swapaxes(0, 1).reshape(bins, -1), axis=1)
    some = np.isfinite(mean)
    low, high = bootstrap_interval(per_seed) if bootstrap else (mean - error, mean + error)
    return middle[some], mean[some], low[some], high[some]


def _default_bin(tasks: int) -> int:
    """1 for up to 100 tasks; for more, a round number that gives about 50 bins."""
    if tasks <= 100:
        return 1
    exact = tasks / 50
    power = 10 ** math.floor(math.log10(exact))
    return int(min((step * power for step in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / exact))))


def _swept(results: xr.Dataset) -> dict[str, list[str]]:
    """Hyperparameters for which a learner has finished tasks with several values, and those learners."""
    methods = _started(results)
    swept: dict[str, list[str]] = {}
    for name, column in results.coords.items():
        if column.dims != ("method",) or column.dtype.kind != "f":
            continue
        tried: dict[str, set[float]] = {}
        for method in methods:
            value = float(column.loc[{"method": method}])
            if not math.isnan(value):
                tried.setdefault(_learner(results, method), set()).add(value)
        learners = [learner for learner, values in tried.items() if len(values) > 1]
        if learners:
            swept[str(name)] = learners
    return swept


def _styles(results: xr.Dataset, methods: Sequence[str]) -> dict[str, Style]:
    """A style for each method: that of its learner; further variants are paler, with other dashes, and alternately
    hollow.

    More than two shades of a color are hard to distinguish. Then variants use the styles of learners that are not
    drawn, as long as there are any.
    """
    from matplotlib.colors import to_hex, to_rgb

    learners: dict[str, list[str]] = {}
    for method in methods:
        learners.setdefault(_learner(results, method), []).append(method)
    base = _learner_styles(results, list(learners))
    dashes = list(dict.fromkeys(style.dashes for style in (*PALETTE, *base.values())))
    spare = [style for style in PALETTE if style not in base.values()]
    styles = {}
    for learner, variants in learners.items():
        if 2 < len(variants) <= 1 + len(spare):
            styles |= dict(zip(variants, [base[learner], *spare], strict=False))
            spare = spare[len(variants) - 1 :]
            continue
        for i, method in enumerate(variants):
            pale = 0.5 * i / len(variants)
            color = to_hex((1 - pale) * np.array(to_rgb(base[learner].color)) + pale)
            first = dashes.index(base[learner].dashes)
            styles[method] = base[learner]._replace(
                color=color,
                dashes=dashes[(first + i) % len(dashes)],
                hollow=base[learner].hollow ^ (i % 2 == 1),
            )
    return styles


def _learner_styles(results: xr.Dataset, learners: Sequence[str]) -> dict[str, Style]:
    """The learner's own style, so that it looks the same in every picture; other learners get unused styles."""
    own = {learner: _look(results, learner).style for learner in learners}
    unused = [style for style in PALETTE if style not in own.values()]
    spare = itertools.cycle([*unused, *(style._replace(hollow=True) for style in PALETTE)])
    return {learner: style or next(spare) for learner, style in own.items()}


def _names(results: xr.Dataset, methods: Sequence[str]) -> list[str]:
    """Different labels for readers: "Continual backprop (replacement rate 1e-5)" for "cbp(replacement_rate=1e-05)"."""
    names = [_name(results, method) for method in methods]
    return [name if names.count(name) == 1 else method for name, method in zip(names, methods, strict=True)]


def _name(results: xr.Dataset, method: str) -> str:
    learner = _learner(results, method)
    if not method.startswith(learner):
        return readable(method)
    rest = re.sub(r"e([+-])0+(\d)", r"e\1\2", method[len(learner) :])
    return f"{_look(results, learner).title} {rest.replace('_', ' ').replace('=', ' ')}".strip()


def _look(results: xr.Dataset, learner: str) -> Look:
    return looks_of(results).get(learner) or Look(readable(learner))


def _legend_columns(names: Sequence[str], width: float) -> int:
    """The largest number of columns, up to four, that fit ``width`` in inches, filled column by column."""
    em = _RC["legend.fontsize"] / 72
    for columns in range(min(4, len(names)), 1, -1):
        rows = math.ceil(len(names) / columns)
        longest = [max(map(len, names[start : start + rows])) for start in range(0, len(names), rows)]
        if em * sum(0.58 * length + _HANDLE + 2.4 for length in longest) < width:
            return columns
    return 1


def _seeds_note(results: xr.Dataset, methods: Sequence[str]) -> str:
    counts = {len(finished_tasks(results, method)[0]) for method in methods}
    if counts == {1}:
        return "One seed"
    seeds = str(counts.pop()) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    band = "a 95% bootstrap interval" if _over_steps(results) else "one standard error"
    return f"Mean and {band} of {seeds} seeds"


def _learner(results: xr.Dataset, method: str) -> str:
    return str(results.learner.loc[{"method": method}].item())


def _started(results: xr.Dataset) -> list[str]:
    """Methods that have finished a task with every seed that was started."""
    return [method for method in results.method.values.tolist() if finished_tasks(results, method)[1]]


def _begun(results: xr.Dataset) -> list[str]:
    """Those, and methods whose seeds have all diverged."""
    started = _started(results)
    all_diverged = lambda method: np.isfinite(diverged_tasks(results, method)).all()
    return [method for method in results.method.values.tolist() if method in started or all_diverged(method)]


def _with_diverged(results: xr.Dataset, methods: Sequence[str]) -> list[str]:
    return [method for method in methods if np.isfinite(diverged_tasks(results, method)).any()]


def _diverged_note(results: xr.Dataset, methods: Sequence[str]) -> str:
    return "; cross: a seed diverged, and is left out" if _with_diverged(results, methods) else ""


def _mark_diverged(ax: Axes, results: xr.Dataset, methods: Sequence[str], lines: Mapping[str, Any]) -> None:
    """Draws a cross on a method's line where a seed diverged, or at the bottom if there is no line."""
    for method in _with_diverged(results, methods):
        x, y = lines[method].get_data()
        for task in np.unique(diverged_tasks(results, method)[np.isfinite(diverged_tasks(results, method))]):
            at = float(results.step.values[int(task)]) / 1e6 if _over_steps(results) else task + 1
            if len(x):
                ax.plot([at], [np.interp(at, x, y)], **_CROSS, color=lines[method].get_color())
            else:
                mark_values(ax, [at], lines[method].get_color())


def mark_values(ax: Axes, values: Sequence[float], color: str = "black") -> None:
    """Draws crosses at the bottom of a panel, at values of its horizontal axis."""
    if len(values):
        heights = np.full(len(values), 0.03)
        ax.plot(values, heights, **_CROSS, color=color, transform=ax.get_xaxis_transform(), clip_on=False)


def _unfinished(results: xr.Dataset, method: str) -> bool:
    return finished_tasks(results, method)[1] < results.sizes["task"]


def _check(good: bool, name: str, value: object, allowed: list) -> None:
    if not good:
        raise ValueError(f"{name}: got {value!r}; these results have {allowed}")


def style_of_pictures() -> AbstractContextManager:
    """Uses our settings while drawing, and then restores the user's."""
    matplotlib = require("matplotlib")
    # Without the backend, which rc_context does not restore.
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    return matplotlib.rc_context({**defaults, **_RC})
