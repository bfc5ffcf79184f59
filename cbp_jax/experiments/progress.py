"""Reports the progress of a run to callbacks."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cbp_jax.training import Lane

# Takes labels of the methods that ran, the number of lanes that finished a task, and means of the measures over lanes
# that have not diverged, in this task or an earlier one; NaN if all have.
# A callback may also have the methods `task_done(method, task, means)`, called for each method separately,
# `diverged(method, seed, task)`, called instead of a warning when the loss of a lane stops being finite, and
# `note(text)`, called instead of other warnings. Tasks count from 0.
Progress = Callable[[str, int, dict[str, float]], None]


def labels_of(lanes: Sequence[Lane]) -> str:
    """Return the labels of the methods of lanes, each once."""
    return ", ".join(dict.fromkeys(label for label, _ in lanes))


def tell(
    progress: Progress | None,
    lanes: Sequence[Lane],
    task: int,
    measured: Mapping[str, np.ndarray],
    diverged: Sequence[Lane],
    healthy: np.ndarray,
) -> None:
    """Report a task that lanes have done.

    Args:
      progress: the callback.
      lanes: the lanes.
      task: the task.
      measured: name of a measure -> array [lanes].
      diverged: the lanes that diverged in this task.
      healthy: bool [lanes], False for lanes that diverged in this task or an earlier one. Means leave them out.
    """
    for method, seed in diverged:
        if hasattr(progress, "diverged"):
            progress.diverged(method, seed, task)
        else:
            warnings.warn(diverged_text(method, seed, task), RuntimeWarning, stacklevel=2)
    if progress is None:
        return
    if hasattr(progress, "task_done"):
        for label in dict.fromkeys(label for label, _ in lanes):
            progress.task_done(label, task, _means(measured, healthy & [method == label for method, _ in lanes]))
    progress(labels_of(lanes), len(lanes), _means(measured, healthy))


def note(progress: Progress | None, text: str) -> None:
    """Tell the user something about the run."""
    if hasattr(progress, "note"):
        progress.note(text)
    else:
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def diverged_text(method: str, seed: int, task: int) -> str:
    """Return the message about a lane that diverges; `task` counts from 0, the message from 1."""
    return f"{method} diverged with seed {seed} in task {task + 1}: its loss is not finite; the other lanes continue"


def _means(measured: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, float]:
    """Return the mean of each measure over the chosen lanes with a finite value."""
    means = {}
    for name, values in measured.items():
        values = np.asarray(values)[chosen]
        finite = values[np.isfinite(values)]
        means[name] = float(np.mean(finite)) if finite.size else math.nan
    return means
