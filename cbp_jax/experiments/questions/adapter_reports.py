"""Table and picture of `question_adapters`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.experiments import learners
from cbp_jax.experiments.questions.adapter_learners import LEARNERS, is_fresh
from cbp_jax.experiments.questions.drawing import draw_tasks, mean_of, note, values_of
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
from cbp_jax.report.looks import GRAY, names_of, styles_of
from cbp_jax.report.statistics import blocks_of_tasks, bootstrap_text, finished_tasks
from cbp_jax.report.tables import text_table

_PANELS = {
    "accuracy": ("Online accuracy (%)", 100.0),
    "less_fresh": ("Accuracy minus fresh\nadapter's (points)", 100.0),
    "change_rank": ("Effective rank of\nthe change", 1.0),
    "dormant_components": ("Dormant\ncomponents (%)", 100.0),
    "effective_rank": ("Effective rank of\nrepresentation (%)", 100.0),
    "dead_units": ("Dead units (%)", 100.0),
}


def fresh_of(results: Any) -> str:
    """Return the first method with a fresh adapter for each task."""
    given = json.loads(results.attrs["settings"])["methods"]
    for method in learners.read_methods(given, known=LEARNERS):
        if is_fresh(method) and method.label in results.method.values:
            return method.label
    raise ValueError(f"results have no fresh adapter among their methods {results.method.values.tolist()}")


def measured(results: Any) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
    """Return the values that the table and the picture show.

    Args:
      results: results of a run, finished or not.

    Returns:
      methods that have begun; and values by name and method, [seeds, tasks that all of these have finished]: the
      measures, and `less_fresh`, the accuracy minus that of the fresh adapter on the same task with the same seed (NaN
      until that has run).
    """
    methods = [method for method in results.method.values.tolist() if finished_tasks(results, method)[1]]
    if not methods:
        return [], {}
    tasks = min(finished_tasks(results, method)[1] for method in methods)
    fresh = values_of(results, "accuracy", fresh_of(results))[:, :tasks]
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in _PANELS}
    for method in methods:
        for name in _PANELS:
            found[name][method] = (
                values_of(results, "accuracy", method)[:, :tasks] - fresh
                if name == "less_fresh"
                else values_of(results, name, method)[:, :tasks]
            )
    return methods, found


def summary(results: Any) -> str:
    """Return the table of a run, finished or not: the first and the last tenth of the tasks.

    For each method it shows the accuracy; the difference to the fresh adapter's accuracy on the same tasks with the
    same seed, and how much this fell; and, for the last tenth, the rank of the change, dormant components and the rank
    of the representation.
    """
    methods, found = measured(results)
    title = f"{results.attrs['experiment']}: mean over seeds [its 95% bootstrap interval], accuracies in percent"
    if not methods:
        return title
    tasks = found["accuracy"][methods[0]].shape[1]
    first, last = (blocks_of_tasks(tasks)[place] for place in (0, -1))
    head = (
        "",
        "accuracy, first tenth",
        "last tenth",
        "minus fresh, first",
        "minus fresh, last",
        "fell by",
        "change rank",
    )
    rows = [(*head, "dormant (%)", "effective rank (%)", "dead units (%)")]
    for method in methods:
        at = lambda name, block, method=method: mean_of(found[name][method][:, block])
        accuracy, more = ([100 * at(name, block) for block in (first, last)] for name in ("accuracy", "less_fresh"))
        cells = [bootstrap_text(values, 1) for values in (*accuracy, *more, more[0] - more[1])]
        cells.append(bootstrap_text(at("change_rank", last), 2))
        cells += [
            bootstrap_text(100 * at(name, last), 1) for name in ("dormant_components", "effective_rank", "dead_units")
        ]
        rows.append((method, *cells))
    return "\n".join([title, f"{tasks} tasks; compared with {fresh_of(results)}", "", *text_table(rows)])


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw accuracy, its difference to the fresh adapter's, and measures of changes and representations.

    Args:
      results: results of a run, finished or not.
      out: folder for the picture.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      paths of the picture.

    Raises:
      ValueError: no method has finished a task.
    """
    from cbp_jax.report.extra import require

    require("matplotlib")
    from matplotlib.figure import Figure

    results = learners.with_looks(results, LEARNERS)
    methods, found = measured(results)
    if not methods:
        raise ValueError("results: no method has finished a task, so there is nothing to draw")
    styles, names = styles_of(results, methods), names_of(results, methods)
    with style_of_pictures():
        figure = Figure(figsize=(COLUMN, 3 * PANEL + 1.1), layout="constrained")
        axes = figure.subplots(3, 2, sharex=True).ravel()
        for letter, ax, (name, (label, scale)) in zip("abcdef", axes, _PANELS.items(), strict=True):
            for method, title in zip(methods, names, strict=True):
                values = found[name][method]
                if np.isfinite(values).any():
                    draw_tasks(ax, scale * values, styles[method], title)
            if name == "less_fresh":
                ax.axhline(0.0, color=GRAY.color, linewidth=0.8)
            if name == "change_rank":
                log_ticks(ax)
            label_height(ax, label)
            write_letter(ax, letter)
            few_ticks(ax, whole=True)
        for ax in axes[-2:]:
            ax.set_xlabel("Task")
        legend_above(figure, axes[0])
        note(figure, results)
        return save_figures({"adapters": figure}, Path(out), formats)
