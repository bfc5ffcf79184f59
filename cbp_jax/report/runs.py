"""The runs in a folder, and their progress."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cbp_jax import files
from cbp_jax.report.records import duration, seconds_of
from cbp_jax.report.statistics import better, interval_text, is_accuracy, last_tenth, performance
from cbp_jax.report.storage import FILE_NAME, PARTS, load_results
from cbp_jax.report.tables import text_table

if TYPE_CHECKING:
    import xarray as xr


class Run(NamedTuple):
    """A run, as `list_runs` finds it.

    Attributes:
      folder: the folder of the run.
      experiment: its name.
      state: "finished", "running", "failed: ...", or "unfinished: 3 of 10 tasks", of all methods and seeds.
      headline: the best method and its performance in the last tenth of the tasks.
      seconds: the time of all methods, with compilation; NaN if unknown.
    """

    folder: Path
    experiment: str
    state: str
    headline: str
    seconds: float = math.nan


def list_runs(folder: str | Path) -> list[Run]:
    """Find the runs in a folder and its subfolders.

    Args:
      folder: where to look.

    Returns:
      the runs, ordered by folder name. A run that cannot be read has a state that says so.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: there is no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must exist; there is none at {folder}")
    parents = [path.parent for path in folder.rglob(FILE_NAME)]
    # The parts of several processes are one run.
    runs = [_run(run) for run in sorted({path.parents[1] if path.parent.name == PARTS else path for path in parents})]
    if not runs:
        raise ValueError(f"folder must contain runs; neither {folder} nor a folder in it has a {FILE_NAME}")
    return runs


def runs_table(runs: list[Run], folder: str | Path) -> str:
    """Return the runs as a table of text, with names of folders relative to `folder`."""
    table = [("run", "experiment", "state", "best in the last tenth of tasks", "time")]
    for run in runs:
        time = "-" if math.isnan(run.seconds) else duration(run.seconds)
        table.append((str(run.folder.relative_to(folder)), run.experiment, run.state, run.headline, time))
    return "\n".join(text_table(table, left=None))


def _run(folder: Path) -> Run:
    try:
        results = load_results(folder)
        seconds = sum(seconds_of(results).values()) if seconds_of(results) else math.nan
        return Run(folder, results.attrs["experiment"], _state(results, folder), _headline(results), seconds)
    except (ValueError, OSError) as error:
        return Run(folder, "-", f"cannot be read: {error}", "-")


def _state(results: xr.Dataset, folder: Path) -> str:
    done, total = tasks_done(results)
    if _in_use(folder):
        return f"running: {done} of {total} tasks"
    if done == total:
        return "finished"
    failed = f"failed: {results.attrs['failed']}; " if results.attrs.get("failed") else "unfinished: "
    return f"{failed}{done} of {total} tasks"


def tasks_done(results: xr.Dataset) -> tuple[int, int]:
    """Return the number of finished tasks of all methods and seeds, and the number of all tasks."""
    counted = [values for values in results.data_vars.values() if {"seed", "task"} <= set(values.dims)]
    counted = [values.isel({dim: 0 for dim in set(values.dims) - {"method", "seed", "task"}}) for values in counted]
    counts = [(int(values.notnull().sum()), values.size) for values in counted]
    return max(counts, default=(0, 0), key=lambda count: count[0] / max(count[1], 1))


def _in_use(folder: Path) -> bool:
    if not (folder / files.LOCK_FILE).exists():
        return False
    try:
        with files.locked(folder):
            return False
    except OSError:  # BlockingIOError; or the folder belongs to another user
        return True


def _headline(results: xr.Dataset) -> str:
    try:
        measure = performance(results)
    except ValueError:
        return "-"
    scale, sign = 100 if is_accuracy(measure) else 1, better(measure)
    finals: Mapping[str, Any] = {m: scale * last_tenth(results, m) for m in results.method.values.tolist()}
    finals = {method: values for method, values in finals.items() if np.isfinite(values).any()}
    if not finals:
        return "-"
    best = max(finals, key=lambda method: sign * np.nanmean(finals[method]))
    digits = {"loss": 3, "episode_return": 0}.get(measure, 2)
    return f"{best}: {measure.replace('_', ' ')} {interval_text(finals[best], digits)}{'%' * is_accuracy(measure)}"
