"""Table and pictures of `question_tickets`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.experiments.questions.drawing import (
    differences,
    draw_line,
    mean_of,
    note,
    rank_correlation,
    values_of,
)
from cbp_jax.report.drawing import (
    COLUMN,
    PANEL,
    few_ticks,
    label_height,
    legend_above,
    log_ticks,
    save_figures,
    style_of_pictures,
    write_letter,
)
from cbp_jax.report.looks import GRAY, names_of, step_size_note, styles_of
from cbp_jax.report.statistics import bootstrap_text
from cbp_jax.report.tables import text_table

#: By name and method, [seeds, measurements]; see `tickets.measured`.
Measured = Mapping[str, Mapping[str, np.ndarray]]

_KINDS = {"ticket": "Ticket", "random": "Random mask"}
_PANELS = {
    "log_density": ("Matching\ndensity (%)", 100.0),
    "advantage": ("Ticket minus\nrandom (points)", 100.0),
    "dense_accuracy": ("Dense network's\naccuracy (%)", 100.0),
    "best_accuracy": ("Best ticket's\naccuracy (%)", 100.0),
    "effective_rank": ("Effective rank (%)", 100.0),
    "dead_units": ("Dead units (%)", 100.0),
    "young": ("Weights in new units,\nrelative to chance", 1.0),
}
_MOST = ("log_density", "advantage", "effective_rank", "dead_units")  # shown in the first picture


def finished(measured: Measured) -> tuple[list[str], int]:
    """Return the methods that have been measured, and the number of measurements that all of them have with all
    seeds."""
    done = {method: np.isfinite(values).all(0) for method, values in measured["log_density"].items()}
    begun = [method for method, each in done.items() if each.any()]
    return begun, int(np.logical_and.reduce([done[method] for method in begun]).cumprod().sum()) if begun else 0


def early_and_late(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return means [seeds] over the first and the last third of `count` measurements, at least one each."""
    third = max(1, count // 3)
    return mean_of(values[:, :third]), mean_of(values[:, count - third : count])


def summary(results: Any, measured: Measured) -> str:
    """Return the table of a run, finished or not.

    For each method it shows means over the first and over the last third of the measurements: matching density,
    advantage of tickets in points, accuracy of the dense network and of the best ticket, effective rank and dead units
    in percent, and the young weights of the matching ticket over chance. Then it shows differences from the first
    method within each seed, rank correlations over the measurements of a seed, and the last third minus the first.
    """
    methods, count = finished(measured)
    lines = [f"{results.attrs['experiment']}: mean over seeds [its 95% bootstrap interval]; first and last third of "
             f"{count} measurements"]  # fmt: skip
    if not count:
        return lines[0]
    head = ("", *("density (%)", "advantage", "dense (%)", "best (%)", "effective rank", "dead (%)", "young/chance"))
    shown = ("log_density", "advantage", "dense_accuracy", "best_accuracy", "effective_rank", "dead_units", "young")
    halves = {name: {method: early_and_late(measured[name][method], count) for method in methods} for name in shown}
    scaled = lambda name: lambda value: 100 * (np.exp(value) if name == "log_density" else value)
    rows = [head]
    for number, when in enumerate(("first", "last")):
        for method in methods:
            cells = [bootstrap_text(halves[name][method][number], 1, scaled(name)) for name in shown[:-1]]
            rows.append((f"{method}, {when}", *cells, bootstrap_text(halves["young"][method][number], 2)))
    lines += ["", *text_table(rows), "", f"Last third, against {methods[0]} of the same seed (densities: the ratio)"]
    rows = [("", *head[1:7])]
    late = {name: {method: both[1] for method, both in halves[name].items()} for name in shown[:-1]}
    against = {
        name: differences(late[name], methods[0], 2, np.exp if name == "log_density" else scaled(name))
        for name in shown[:-1]
    }
    rows += [(method, *(against[name][method] for name in shown[:-1])) for method in methods[1:]]
    lines += text_table(rows) if len(rows) > 1 else ["(one method)"]
    lines += ["", "Rank correlation with the effective rank, over the measurements of a seed"]
    rows = [("", "density", "advantage")]
    for method in methods:
        rank = measured["effective_rank"][method][:, :count]
        cells = [bootstrap_text(rank_correlation(measured[name][method][:, :count], rank)) for name in shown[:2]]
        rows.append((method, *cells))
    lines += [*text_table(rows), "", "Last minus first third (densities: the ratio)"]
    rows = [("", *head[1:7])]
    for method in methods:
        cells = []
        for name in shown[:-1]:
            first, last = halves[name][method]
            cells.append(bootstrap_text(last - first, 2, np.exp if name == "log_density" else scaled(name)))
        rows.append((method, *cells))
    return "\n".join([*lines, *text_table(rows)])


def plot(results: Any, measured: Measured, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw the measures along the stream, and accuracy against density early and late in it.

    Args:
      results: results of a run, finished or not.
      measured: values of these results; see `tickets.measured`.
      out: folder for the pictures.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      paths of the pictures.

    Raises:
      ValueError: nothing has been measured.
    """
    from cbp_jax.report.extra import require

    require("matplotlib")

    methods, count = finished(measured)
    if not count:
        raise ValueError("results: no tickets have been searched for yet, so there is nothing to draw")
    styles, names = styles_of(results, methods), names_of(results, methods)
    with style_of_pictures():
        figures = {
            "tickets": _along(results, measured, _MOST, methods, styles, names, count),
            "measures": _along(results, measured, tuple(_PANELS), methods, styles, names, count),
            "curves": _curves(results, methods, styles, names, count, _tasks(results, measured)),
        }
        return save_figures(figures, Path(out), formats)


def _along(
    results: Any,
    measured: Measured,
    shown: Sequence[str],
    methods: Sequence[str],
    styles: Any,
    names: Sequence[str],
    count: int,
) -> Any:
    """Draw the measures along the stream, a panel for each."""
    from matplotlib.figure import Figure

    tasks = _tasks(results, measured)[:count]
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(COLUMN, PANEL * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True).ravel()
    for letter, ax, name in zip("abcdefg", axes, shown, strict=False):
        label, scale = _PANELS[name]
        for method, title in zip(methods, names, strict=True):
            values = measured[name][method][:, :count]
            if np.isfinite(values).any():
                of = (lambda v, s=scale: s * np.exp(v)) if name == "log_density" else (lambda v, s=scale: s * v)
                draw_line(ax, tasks, values, styles[method], title, of=of)
        if name == "log_density":
            log_ticks(ax)
        if name == "young":
            ax.yaxis.set_major_formatter("{x:.2f}")
            ax.axhline(1.0, color=GRAY.color, linestyle=":", linewidth=0.8)
        label_height(ax, label)
        write_letter(ax, letter)
        few_ticks(ax, whole=True)
    for ax in axes[len(shown) - 2 : len(shown)]:
        ax.set_xlabel("Tasks learned so far")
        ax.tick_params(labelbottom=True)
    for ax in axes[len(shown) :]:
        ax.remove()
    legend_above(figure, axes[0])
    note(figure, results, step_size_note(names))
    return figure


def _tasks(results: Any, measured: Measured) -> np.ndarray:
    """Return the tasks before which winning tickets were searched for."""
    total = next(iter(measured["log_density"].values())).shape[1]
    return json.loads(results.attrs["settings"])["every"] * np.arange(total)


def _curves(results: Any, methods: Sequence[str], styles: Any, names: Sequence[str], count: int, tasks: Any) -> Any:
    """Draw accuracy against density: a column for each method, with tickets and random masks, at first and at last."""
    from matplotlib.figure import Figure

    rows = -(-len(methods) // 2)
    figure = Figure(figsize=(COLUMN, 1.5 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, method, title in zip(axes, methods, names, strict=False):
        for place, style in ((0, GRAY), (count - 1, styles[method])):
            density = 100 * values_of(results, "density", method)[:, tasks[place]].mean(0)
            for kind, dashes in (("ticket", "-"), ("random", ":")):
                values = 100 * values_of(results, f"{kind}_accuracy", method)[:, tasks[place]]
                when = "at first" if place == 0 else f"before task {tasks[place]}, in the method's color"
                draw_line(ax, density, values, style, f"{_KINDS[kind]} {when}", dashes=dashes)
            if count == 1:
                break
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_title(title)
        ax.tick_params(labelbottom=True)
    for ax in axes[len(methods) :]:
        ax.remove()
    for ax in axes[max(0, len(methods) - 2) : len(methods)]:
        ax.set_xlabel("Weights remaining (%)")
    for ax in axes[: len(methods) : 2]:
        ax.set_ylabel("Next task (%)")
    axes[0].invert_xaxis()  # shared by all
    legend_above(figure, axes[0], columns=1)
    note(figure, results)
    return figure
