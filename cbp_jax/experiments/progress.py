"""Tells callbacks of the progress of a run."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cbp_jax.training import Lane

# Labels of the methods that ran, lanes that finished a task, means of what was measured, over lanes that have a number.
# An object may have methods besides: `task_done(method, task, means)`, called for each method alone, and
# `diverged(method, seed, task)`, in place of a warning where the loss of a lane is not finite any more; tasks from 0.
Progress = Callable[[str, int, dict[str, float]], None]


def labels_of(lanes: Sequence[Lane]) -> str:
    """The labels of the methods of lanes, each once."""
    return ", ".join(dict.fromkeys(label for label, _ in lanes))


def tell(
    progress: Progress | None,
    lanes: Sequence[Lane],
    task: int,
    measured: Mapping[str, np.ndarray],
    diverged: Sequence[tuple[str, int]],
) -> None:
    """Tells of a task that lanes have done, and of those that diverged in it."""
    for method, seed in diverged:
        if hasattr(progress, "diverged"):
            progress.diverged(method, seed, task)
        else:
            warnings.warn(diverged_text(method, seed, task), RuntimeWarning, stacklevel=2)
    if progress is None:
        return
    if hasattr(progress, "task_done"):
        for label in dict.fromkeys(label for label, _ in lanes):
            rows = [row for row, lane in enumerate(lanes) if lane[0] == label]
            progress.task_done(
                label, task, {name: _finite_mean(np.asarray(values)[rows]) for name, values in measured.items()}
            )
    progress(labels_of(lanes), len(lanes), {name: _finite_mean(values) for name, values in measured.items()})


def diverged_text(method: str, seed: int, task: int) -> str:
    """What is said of a lane that diverges; `task` counts from 0, the text from 1."""
    return f"{method} diverged with seed {seed} in task {task + 1}: its loss is not finite; the other lanes go on"


def _finite_mean(values: np.ndarray) -> float:
    """The mean over lanes that have a number."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(np.mean(finite)) if finite.size else math.nan
