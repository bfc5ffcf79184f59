"""Reports the progress of a run to callbacks."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cbp_jax.training import Lane

# Takes labels of the methods that ran, the number of lanes that finished a task, and means of the measures over lanes.
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
    diverged: Sequence[tuple[str, int]],
) -> None:
    """Report a task that lanes have done, and the lanes that diverged in it."""
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


def note(progress: Progress | None, text: str) -> None:
    """Tell the user something about the run."""
    if hasattr(progress, "note"):
        progress.note(text)
    else:
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def diverged_text(method: str, seed: int, task: int) -> str:
    """Return the message about a lane that diverges; `task` counts from 0, the message from 1."""
    return f"{method} diverged with seed {seed} in task {task + 1}: its loss is not finite; the other lanes continue"


def _finite_mean(values: np.ndarray) -> float:
    """Return the mean over the lanes with a finite value."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(np.mean(finite)) if finite.size else math.nan
