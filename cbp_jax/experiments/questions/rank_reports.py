"""Table and pictures of `question_rank`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.experiments.questions.drawing import draw_tasks, mean_of, note, rank_correlation, values_of
from cbp_jax.report.drawing import (
    COLUMN,
    PANEL,
    draw_interval,
    few_ticks,
    fill,
    label_height,
    legend_above,
    marker,
    save_figures,
    style_of_pictures,
    write_letter,
    write_note,
)
from cbp_jax.report.looks import GRAY, UNOWNED, names_of, styles_of
from cbp_jax.report.statistics import bootstrap_interval, bootstrap_text, finished_tasks, mean_and_error
from cbp_jax.report.tables import text_table

#: Predictors and outcomes: names in `aligned`, and names in pictures.
PREDICTORS = {
    "change_rank": "Stable rank of the change",
    "overlap": "Overlap with earlier changes",
    "effective_rank": "Effective rank of representation",
    "stable_rank": "Stable rank of representation",
}
OUTCOMES = {
    "forgetting": "Forgetting",
    "earlier_accuracy": "Accuracy on earlier tasks",
    "next_accuracy": "Accuracy on the next task",
}
KINDS = {"over": "over learners", "within": "within a learner", "detrended": "within, no trend"}
_SCATTER = (
    ("change_rank", "forgetting"),
    ("overlap", "forgetting"),
    ("effective_rank", "next_accuracy"),
    ("change_rank", "next_accuracy"),
)


def aligned(results: Any) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the measures of each task: its change, what the network forgot in it, and the representation after it.

    Args:
      results: results of a run, finished or not.

    Returns:
      labels of the methods that have begun, and measures by name, float64 [methods, seeds, tasks]. There is one task
      less than all methods have finished: ranks of the representation and the online accuracy are those of the next
      task.
    """
    started = [method for method in results.method.values.tolist() if finished_tasks(results, method)[1] > 1]
    if not started:
        return [], {}
    tasks = min(finished_tasks(results, method)[1] for method in started)
    of_next = {"next_accuracy": "accuracy", "effective_rank": "effective_rank", "stable_rank": "stable_rank"}
    found = {}
    for name in (*PREDICTORS, *OUTCOMES):
        values = np.stack([values_of(results, of_next.get(name, name), method)[:, :tasks] for method in started])
        found[name] = values[..., 1:] if name in of_next else values[..., :-1]
    return started, found


def correlations(values: dict[str, np.ndarray]) -> dict[tuple[str, str, str], np.ndarray]:
    """Return the rank correlations of all predictors with all outcomes.

    Args:
      values: output of `aligned`.

    Returns:
      correlations [seeds] by kind (`KINDS`), predictor and outcome: over learners, of means over the second half of the
      tasks; and over the tasks of each learner, with and without the linear trends of both, the mean over learners.
    """
    found = {}
    for predictor in PREDICTORS:
        for outcome in OUTCOMES:
            x, y = values[predictor], values[outcome]
            late = lambda array: mean_of(array[..., array.shape[-1] // 2 :]).T
            within = lambda x, y: mean_of(
                rank_correlation(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])).reshape(x.shape[:2]), 0
            )
            found["over", predictor, outcome] = rank_correlation(late(x), late(y))
            found["within", predictor, outcome] = within(x, y)
            found["detrended", predictor, outcome] = within(detrended(x), detrended(y))
    return found


def detrended(values: np.ndarray) -> np.ndarray:
    """Return the residuals of a linear regression of values [..., tasks] on the number of the task; NaN stays NaN.

    >>> detrended(np.array([[1.0, 2.0, 3.0]])).round(6).tolist()
    [[0.0, 0.0, 0.0]]
    """
    some = np.isfinite(values)
    count = np.maximum(some.sum(-1, keepdims=True), 1)
    centered = lambda array: np.where(some, array - np.where(some, array, 0).sum(-1, keepdims=True) / count, 0)
    task = centered(np.broadcast_to(np.arange(values.shape[-1], dtype=float), values.shape))
    y = centered(values)
    slope = (task * y).sum(-1, keepdims=True) / np.maximum((task**2).sum(-1, keepdims=True), 1e-300)
    left = y - slope * task
    # The residuals of values on a line are rounding errors, whose ranks mean nothing.
    left = np.where(np.abs(left) > 1e-9 * np.abs(y).max(-1, keepdims=True), left, 0)
    return np.where(some, left, np.nan)


def summary(results: Any) -> str:
    """Return the tables of a run, finished or not: means over the second half of the tasks, and all correlations."""
    methods, values = aligned(results)
    title = f"{results.attrs['experiment']}: mean over seeds [its 95% bootstrap interval]"
    if not methods:
        return title
    tasks = values["forgetting"].shape[-1]
    late = {name: mean_of(array[..., tasks // 2 :]) for name, array in values.items()}
    lines = [title, "", f"In percent, means over the second half of {tasks + 1} tasks"]
    names = {**PREDICTORS, **OUTCOMES}
    rows = [("", *names.values())]
    for number, method in enumerate(methods):
        rows.append((method, *(bootstrap_text(100 * late[name][number], 1) for name in names)))
    lines += text_table(rows)
    found = correlations(values)
    for kind, title in KINDS.items():
        lines += ["", f"Rank correlation {title}"]
        rows = [("", *OUTCOMES.values())]
        for predictor, label in PREDICTORS.items():
            rows.append((label, *(bootstrap_text(found[kind, predictor, outcome]) for outcome in OUTCOMES)))
        lines += text_table(rows)
    return "\n".join(lines)


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw a scatter plot of learners, all correlations, and the measures along the stream.

    Args:
      results: results of a run, finished or not.
      out: folder for the pictures.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      paths of the pictures.

    Raises:
      ValueError: no method has finished two tasks.
    """
    from cbp_jax.report.extra import require

    require("matplotlib")
    methods, values = aligned(results)
    if not methods:
        raise ValueError("results: no method has finished two tasks, so there is nothing to draw")
    styles = styles_of(results, methods)
    names = dict(zip(methods, names_of(results, methods), strict=True))
    with style_of_pictures():
        figures = {
            "learners": _learners(results, methods, values, styles, names),
            "correlations": _correlations(results, correlations(values)),
            "tasks": _tasks(results, methods, values, styles, names),
        }
        return save_figures(figures, Path(out), formats)


def _of_panel(label: str) -> str:
    """Return the label of an axis, in percent, for a panel of half a column."""
    short = label.replace("Stable rank of the", "Stable rank of").replace("with earlier changes", "of changes")
    return f"{short} (%)"


def _learners(results: Any, methods: Sequence[str], values: Any, styles: Any, names: Any) -> Any:
    """Draw a point for each learner: means over seeds of its second half, with bars of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN, 3.1 + 0.06 * len(methods)), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    labels = {**PREDICTORS, **OUTCOMES}
    for letter, ax, (x, y) in zip("abcd", axes, _SCATTER, strict=True):
        for number, method in enumerate(methods):
            point = []
            for name in (x, y):
                late = values[name][number]
                point.append(mean_and_error(100 * mean_of(late[:, late.shape[1] // 2 :])))
            style = styles[method]
            ax.errorbar(
                point[0][0], point[1][0], point[1][1], point[0][1], color=style.color, **marker(style, 4),
                linestyle="none", elinewidth=0.7, label=names[method],
            )  # fmt: skip
        ax.set_xlabel(fill(_of_panel(labels[x]), 26))
        label_height(ax, _of_panel(labels[y]))
        write_letter(ax, letter)
        few_ticks(ax)
    legend_above(figure, axes[0], lines=False)
    seeds = results.sizes["seed"]
    text = f"Second half of the tasks; mean and one standard error of {seeds} seeds" if seeds > 1 else "One seed"
    write_note(figure, text)
    return figure


def _correlations(results: Any, found: dict[tuple[str, str, str], np.ndarray]) -> Any:
    """Draw a panel for each outcome, with a row for each predictor and a marker for each kind of correlation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN, 2.4), layout="constrained")
    axes = figure.subplots(1, len(OUTCOMES), sharey=True)
    for ax, (outcome, title) in zip(axes, OUTCOMES.items(), strict=True):
        for shift, ((kind, label), style) in enumerate(zip(KINDS.items(), UNOWNED, strict=False)):
            for row, predictor in enumerate(PREDICTORS):
                each = found[kind, predictor, outcome]
                mean, _ = mean_and_error(each)
                low, high = bootstrap_interval(each[:, None])
                place = row + 0.2 * (shift - 1)
                draw_interval(ax, mean, low[0], high[0], place, style, label=label if row == 0 else None)
        ax.axvline(0.0, color=GRAY.color, linewidth=0.8)
        ax.set_xlim(-1.05, 1.05)
        ax.set_xticks((-1, 0, 1))
        ax.set_title(fill(title, 15))
    axes[1].set_xlabel("Rank correlation")
    axes[0].set_yticks(range(len(PREDICTORS)), [fill(name, 17) for name in PREDICTORS.values()])
    axes[0].invert_yaxis()
    legend_above(figure, axes[0], columns=3, lines=False, markerscale=1.5)
    note(figure, results)
    return figure


def _tasks(results: Any, methods: Sequence[str], values: Any, styles: Any, names: Any) -> Any:
    """Draw the measures along the stream, in at most 25 bins of tasks."""
    from matplotlib.figure import Figure

    panels = {**PREDICTORS, **OUTCOMES}
    figure = Figure(figsize=(COLUMN, 4 * PANEL + 0.3), layout="constrained")
    axes = figure.subplots(4, 2, sharex=True).ravel()
    for letter, ax, (name, label) in zip("abcdefg", axes, panels.items(), strict=False):
        for number, method in enumerate(methods):
            draw_tasks(ax, 100 * values[name][number], styles[method], names[method], band=len(methods) <= 6)
        label_height(ax, _of_panel(label))
        write_letter(ax, letter)
        few_ticks(ax)
    for ax in axes[len(panels) - 2 : len(panels)]:
        ax.set_xlabel("Task")
        ax.tick_params(labelbottom=True)
    handles, texts = axes[0].get_legend_handles_labels()
    axes[-1].axis("off")
    axes[-1].legend(handles, texts, loc="center", fontsize=5.5 if len(methods) > 8 else 6.5)
    return figure
