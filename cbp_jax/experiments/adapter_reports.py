"""Table and pictures of `continual_lora`."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.experiments.adapter_methods import read_methods
from cbp_jax.experiments.text_reports import at, heat_maps, interval
from cbp_jax.report.divergence import left_out_note, told, without_diverged
from cbp_jax.report.drawing import fill
from cbp_jax.report.looks import number_text, readable
from cbp_jax.report.tables import text_table

_NAMES = {
    "sequential": "One adapter",
    "per_task": "One per task",
    "per_task_l1": "One per task",
    "added": "All added",
    "added_l1": "All added",
    "o_lora": "O-LoRA",
    "full": "All weights",
    "joint": "Joint training",
}


def scores(accuracy: np.ndarray, alone: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return average accuracy, forgetting and forward transfer.

    Args:
      accuracy: [..., tasks, tasks], accuracy after the task of the second to last axis on the task of the last axis;
        NaN if not measured.
      alone: [..., tasks], accuracy of each task learned alone.

    Returns:
      for each sequence, [...]: "average", the mean of the last row; "forgetting", the mean over all but the last task
      of its best accuracy before the last task minus its final one; "transfer", the mean over all but the first task of
      its accuracy right after learning it minus that of learning it alone. NaN if there are no values.

    Example:
      >>> found = scores(np.array([[0.9, np.nan], [0.6, 0.8]]), np.array([0.9, 0.7]))
      >>> {name: round(float(value), 6) for name, value in found.items()}
      {'average': 0.7, 'forgetting': 0.3, 'transfer': 0.1}
    """
    count = accuracy.shape[-1]
    nothing = np.full(accuracy.shape[:-2], np.nan)
    found = {"average": accuracy[..., -1, :].mean(-1), "forgetting": nothing, "transfer": nothing}
    if count > 1:
        last = accuracy[..., -1, :-1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # for sequences that have not begun
            found["forgetting"] = (np.nanmax(accuracy[..., :-1, :-1], -2) - last).mean(-1)
        if alone is not None:
            found["transfer"] = (np.diagonal(accuracy, axis1=-2, axis2=-1) - alone)[..., 1:].mean(-1)
    return found


def _accuracy(results: Any, method: str) -> np.ndarray:
    return at(results, "accuracy", method, "order", "seed", "task", "other")


def _alone(results: Any, method: str) -> np.ndarray | None:
    """Return accuracies [order, seed, task] of adapters trained on each task alone, with the same kind of head."""
    methods = results.method.values.tolist()
    heads = {label: one.head for label, one in zip(methods, read_methods(methods).values(), strict=True)}
    for label in methods:
        if label.partition("(")[0] == "per_task" and heads[label] == heads[method]:
            return np.diagonal(_accuracy(results, label), axis1=-2, axis2=-1)
    return None


def summary(results: Any) -> str:
    """Return the results of `continual_lora` as a text table.

    Args:
      results: results of a run, finished or not.

    Returns:
      for each method the measures described in the module `adapters`: means over sequences (orders times seeds) and
      half the width of their 95% interval, which treats orders as independent. Seeds with which some method diverged
      are left out, and listed below.
    """
    notes, results = told(results, paired=True), without_diverged(results)
    encoder = results.attrs.get("encoder", "an encoder")
    count = results.sizes["order"] * results.sizes["seed"]
    title = f"continual_lora, encoder {encoder}: means over {count} sequences of {results.sizes['task']} tasks ± half "
    rows = [("method", "average (%)", "forgetting", "transfer", "rank", "sparse (%)", "overlap", "collisions")]
    for method in results.method.values.tolist():
        found = scores(_accuracy(results, method), _alone(results, method))
        flat = {name: at(results, name, method, "order", "seed", "task") for name in ("rank", "sparsity")}
        pairs = {
            name: at(results, name, method, "order", "seed", "task", "other") for name in ("overlap", "collisions")
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # for missing measurements
            cells = [interval(found[name], 100, 1) for name in ("average", "forgetting", "transfer")]
            cells.append(interval(np.nanmean(flat["rank"], -1), 1, 1))
            cells.append(interval(np.nanmean(flat["sparsity"], -1), 100, 1))
            cells += [interval(np.nanmean(pairs[name], (-2, -1)), 1, 2) for name in ("overlap", "collisions")]
        rows.append((method, *cells))
    return "\n".join([f"{title}their 95% interval", "", *text_table(rows), *([""] if notes else []), *notes])


def _title(method: str) -> str:
    """Return the name of a method for readers, in lines as wide as a panel.

    >>> _title("per_task_l1(l1=0.0001, head=shared)"), _title("o_lora(form=squared)")
    ('One per task,\\nL1\xa0of\xa01e-4, one head', 'O-LoRA, form squared')
    """
    (settings,) = read_methods([method]).values()
    name, _, inside = method.removesuffix(")").partition("(")
    parts = [_NAMES.get(name, readable(name)), *([f"L1\u00a0of\u00a0{settings.l1:g}"] if settings.l1 else ())]
    others = [text.replace("=", " ") for text in inside.split(", ") if text and not text.startswith(("l1=", "head="))]
    parts += [*others, *(["one head"] if settings.head == "shared" else ())]
    return fill(number_text(", ".join(parts)), 20)


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Plot the accuracy on every task after every other: a matrix for each method, averaged over orders and seeds.

    Seeds with which some method diverged are left out.

    Args:
      results: results of a run of `continual_lora`, finished or not.
      out: folder for the picture.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      paths of the picture.
    """
    results, left_out = without_diverged(results), left_out_note(results)
    tasks = [str(number + 1) for number in range(results.sizes["task"])]
    panels = {}
    for method in results.method.values.tolist():
        panels[_title(method)] = 100 * _accuracy(results, method).mean((0, 1))
    note = "Accuracy (%) on each task (column) after each task (row), by position in the sequence"
    if any("one head" in title for title in panels):
        note += "; one head: over all classes"
    note += left_out
    return heat_maps(panels, tasks, tasks, note, "continual_lora", out, formats, digits=0)
