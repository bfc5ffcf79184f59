"""Tables and pictures of the experiments on texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.report import looks
from cbp_jax.report.divergence import left_out_note, told, without_diverged
from cbp_jax.report.drawing import COLUMN, legend_above, save_figures, style_of_pictures, write_note
from cbp_jax.report.statistics import mean_and_error
from cbp_jax.report.tables import text_table

PROBE = "probe"
#: Of the accuracy that fine-tuning adds to the probe's, the fraction that must be kept.
KEPT = 0.99


def short(name: str) -> str:
    """Return the name of a task in pictures and tables.

    >>> short("texts/films.jsonl.gz"), short("docstrings/kind"), short("glue/sst2")
    ('films', 'docstrings/kind', 'glue/sst2')
    """
    end = name.rpartition("/")[2]
    for ending in (".gz", ".jsonl", ".csv"):
        end = end.removesuffix(ending)
    return end if end != name.rpartition("/")[2] else name


def interval(values: np.ndarray, scale: float = 1.0, digits: int = 1) -> str:
    """Return the mean of finite values and half the width of its 95% interval (Student's t).

    >>> interval(np.array([0.5, 0.7]), 100), interval(np.array([0.5]), 100), interval(np.array([np.nan]))
    ('60.0 ± 127.1', '50.0', '-')
    """
    from scipy import stats

    values = scale * np.asarray(values, np.float64).ravel()
    values = values[np.isfinite(values)]
    if not values.size:
        return "-"
    mean, error = mean_and_error(values)
    if values.size < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {stats.t.ppf(0.975, values.size - 1) * error:.{digits}f}"


def at(results: Any, name: str, method: str, *dims: str) -> np.ndarray:
    """Return the values of one method, with these dimensions in order."""
    return results[name].loc[{"method": method}].transpose(*dims).values.astype(np.float64)


def least(results: Any, method: str, measure: str, dim: str) -> np.ndarray:
    """Return the smallest density, or number of dimensions, that keeps what fine-tuning adds to a linear probe.

    Args:
      results: results of `dominant_tickets`.
      method: one with tickets.
      measure: accuracies along `dim`.
      dim: "density" or "dimensions".

    Returns:
      array [tasks]: the smallest value such that there, and for all larger values, the mean accuracy over seeds is at
      least that of the probe plus `KEPT` times what fine-tuning without a pull adds; NaN if there is no such value, or
      if fine-tuning adds nothing.
    """
    values = results[dim].values
    order = np.argsort(-values)
    kept = at(results, measure, method, "task", dim, "seed").mean(-1)[:, order]
    probe = at(results, "accuracy", PROBE, "task", "seed").mean(-1)
    full = at(results, "accuracy", _plain(results), "task", "seed").mean(-1)
    enough = (kept >= (probe + KEPT * (full - probe))[:, None]) & (full > probe)[:, None]
    count = enough.cumprod(1).sum(1)
    return np.array([values[order][n - 1] if n else np.nan for n in count], np.float64)


def _plain(results: Any) -> str:
    """Return the method with the weakest pull."""
    methods = [method for method in results.method.values.tolist() if method != PROBE]
    strengths = [float(results.strength.loc[{"method": method}]) for method in methods]
    return methods[int(np.argmin(strengths))]


def summary_of_tickets(results: Any) -> str:
    """Return the results of `dominant_tickets` as text tables.

    Args:
      results: results of a run, finished or not.

    Returns:
      for each method and task the accuracy in percent, the weights that changed, and the smallest density and number of
      dimensions that keep 99% of what fine-tuning adds to a probe; then, for tickets that were trained alone, their
      accuracy, and that with their changes in fine-tuning; then the overlap of tasks' tickets relative to chance. Seeds
      with which some method diverged are left out, and listed below.
    """
    notes, results = told(results, paired=True), without_diverged(results)
    tasks, methods = results.name.values.tolist(), results.method.values.tolist()
    encoder = results.attrs.get("encoder", "an encoder")
    lines = [f"dominant_tickets, encoder {encoder}: means over seeds ± half their 95% interval"]
    rows = [("method", "task", "accuracy (%)", "changed (%)", "density (%)", "dimensions")]
    with np.errstate(invalid="ignore"):
        for method in methods:
            accuracy, changed = (at(results, name, method, "task", "seed") for name in ("accuracy", "changed"))
            if method == PROBE or not np.isfinite(accuracy).any():
                found = [np.full(len(tasks), np.nan)] * 2
            else:
                found = [
                    least(results, method, "ticket_accuracy", "density"),
                    least(results, method, "dimension_accuracy", "dimensions"),
                ]
            for number, task in enumerate(tasks):
                density, count = found[0][number], found[1][number]
                rows.append((
                    method, task, interval(accuracy[number], 100), interval(changed[number], 100, 2),
                    f"{100 * density:g}" if np.isfinite(density) else "-", f"{count:g}" if np.isfinite(count) else "-",
                ))  # fmt: skip
    lines += ["", *text_table(rows)]
    if np.isfinite(results.retrained_accuracy).any():
        title = "Correct (%) with only a ticket's changes: of fine-tuning all weights, and of training the ticket alone"
        lines += ["", title, "", *text_table(_rows_of_retrained(results, methods, tasks))]
    lines += ["", "Weights that tickets of two tasks share, over what chance gives them"]
    rows = [("method", "tasks", "by size", "by rows and columns", "shared of either (%)")]
    for method in methods:
        shared, size, marginals, jaccard = (
            at(results, name, method, "task", "other", "seed")
            for name in ("shared", "by_size", "by_marginals", "jaccard")
        )
        for a in range(len(tasks)):
            for b in range(a):
                if np.isfinite(shared[a, b]).any():
                    ratios = [
                        interval(shared[a, b] / np.maximum(chance[a, b], 1e-9), 1, 2) for chance in (size, marginals)
                    ]
                    rows.append((method, f"{tasks[b]}, {tasks[a]}", *ratios, interval(jaccard[a, b], 100, 2)))
    lines += text_table(rows) if len(rows) > 1 else ["(not measured)"]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _rows_of_retrained(results: Any, methods: Sequence[str], tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the head and the rows of the table of tickets that were trained alone."""
    rows = [("method", "task", "density (%)", "of all", "trained alone")]
    for method in methods:
        kept, alone = (
            at(results, name, method, "task", "density", "seed") for name in ("ticket_accuracy", "retrained_accuracy")
        )
        for number, task in enumerate(tasks):
            for place, density in enumerate(results.density.values):
                if np.isfinite(alone[number, place]).any():
                    cells = (interval(values[number, place], 100) for values in (kept, alone))
                    rows.append((method, task, f"{100 * density:g}", *cells))
    return rows


def plot_tickets(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Plot accuracy against density and against the number of dimensions, and the overlap of tasks' tickets.

    Seeds with which some method diverged are left out.

    Args:
      results: results of a run of `dominant_tickets`, finished or not.
      out: folder for the pictures.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      paths of the pictures.
    """
    from cbp_jax.report.extra import require

    require("matplotlib")
    from matplotlib.figure import Figure

    results, left_out = without_diverged(results), left_out_note(results)
    tasks = results.name.values.tolist()
    methods = [method for method in results.method.values.tolist() if method != PROBE]
    names = {method: _name_of_strength(results, method) for method in methods}
    # A scale from dark to light, because methods differ in strength only.
    colors = require("matplotlib").colormaps["viridis"](np.linspace(0, 0.8, len(methods)))
    with style_of_pictures():
        figure = Figure(figsize=(COLUMN, 1.05 * len(tasks) + 0.7), layout="constrained")
        axes = figure.subplots(len(tasks), 2, sharex="col", sharey="row", squeeze=False)
        for column, (measure, dim) in enumerate((("ticket_accuracy", "density"), ("dimension_accuracy", "dimensions"))):
            for row, task in enumerate(tasks):
                ax, x = axes[row, column], (100 if dim == "density" else 1) * results[dim].values
                for method, color, style in zip(methods, colors, looks.PALETTE, strict=False):
                    values = 100 * at(results, measure, method, "task", "seed", dim)[row]
                    mean, error = mean_and_error(values)
                    ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
                    ax.plot(
                        x,
                        mean,
                        color=color,
                        linestyle=style.dashes,
                        marker=style.marker,
                        markersize=2.5,
                        label=names[method],
                    )
                    if dim == "density":
                        alone, _ = mean_and_error(
                            100 * at(results, "retrained_accuracy", method, "task", "seed", dim)[row]
                        )
                        ax.plot(x, alone, "*", color=color, markerfacecolor="white", markersize=6)
                levels = ((PROBE, looks.GRAY.color, ":"), (_plain(results), looks.BLACK.color, "--"))
                for method, color, dashes in levels:
                    mean = 100 * np.mean(at(results, "accuracy", method, "task", "seed")[row])
                    ax.axhline(mean, color=color, linestyle=dashes, linewidth=0.8)
                ax.update_datalim([(x.min(), 0), (x.max(), 0)], updatey=False)  # also where no value is finite
                ax.set_xscale("log")
                ax.xaxis.set_minor_formatter("")
                ax.set_ylabel(f"{looks.readable(task)}\naccuracy (%)" if column == 0 else "")
            axes[-1, column].set_xlabel("Density (%)" if dim == "density" else "Dimensions of each matrix")
        legend_above(figure, axes[0, 0], columns=4)
        note = f"Mean and one standard error of {results.sizes['seed']} seeds{left_out}"
        note += "; dashed: all weights, dotted: linear probe"
        if np.isfinite(results.retrained_accuracy).any():
            note += "\nStars: only the ticket is trained, from the start"
        write_note(figure, note)
        paths = save_figures({"dominant_tickets": figure}, Path(out), formats)
    panels = {}
    for method in methods:
        chance = at(results, "by_size", method, "task", "other", "seed").mean(-1)
        shared = at(results, "shared", method, "task", "other", "seed").mean(-1)
        panels[names[method]] = shared / np.where(chance > 0, chance, np.nan)
    numbers = [str(number + 1) for number in range(len(tasks))]
    rows = [f"{looks.readable(task)}  {number}" for task, number in zip(tasks, numbers, strict=True)]
    note = f"Weights that tickets of two tasks share, over what chance gives tickets of these sizes{left_out}"
    return paths + heat_maps(panels, rows, numbers, note, "dominant_tickets_overlap", out, formats)


def _name_of_strength(results: Any, method: str) -> str:
    """Return a method's name in pictures."""
    strength = float(results.strength.loc[{"method": method}])
    return f"L1 of {strength:g}" if strength else "No L1"


def heat_maps(
    panels: dict[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    note: str,
    name: str,
    out: Path,
    formats: Sequence[str],
    digits: int = 1,
) -> list[Path]:
    """Draw matrices side by side, with their numbers, and a note on what these are. Return the paths of the picture."""
    from cbp_jax.report.extra import require

    require("matplotlib")
    from matplotlib.figure import Figure

    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    with style_of_pictures():
        lines = 1 + max((title.count("\n") for title in panels), default=0)
        figure = Figure(figsize=(COLUMN, (0.14 * len(rows) + 0.2 + 0.1 * lines) * down + 0.3), layout="constrained")
        axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        finite = np.concatenate([panel[np.isfinite(panel)] for panel in panels.values()] or [np.zeros(0)])
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        for ax, (title, panel) in zip(axes, panels.items(), strict=False):
            ax.imshow(panel, vmin=low, vmax=high, cmap="cividis", aspect="auto")
            for (i, j), value in np.ndenumerate(panel):
                if np.isfinite(value):
                    color = "black" if value > (low + high) / 2 else "white"
                    ax.text(j, i, f"{value:.{digits}f}", ha="center", va="center", fontsize=5, color=color)
            ax.set_xticks(range(len(columns)), columns, fontsize=6)
            ax.set_yticks(range(len(rows)), rows, fontsize=6)
            ax.set_title(title, fontsize=6.5)
            ax.grid(False)
        for ax in axes[len(panels) :]:
            ax.axis("off")
        write_note(figure, note)
        return save_figures({name: figure}, Path(out), formats)
