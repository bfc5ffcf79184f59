"""Lanes that diverge, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cbp_jax.report.results import positions_of

if TYPE_CHECKING:
    import xarray as xr

#: The coordinate [method, seed] of results in which lanes diverged: the task, or NaN for lanes that did not diverge.
COORDINATE = "diverged"
_LOSSES = ("loss", "policy_loss", "value_loss", "td_error")


def mark_diverged(
    results: xr.Dataset,
    task: int,
    methods: Sequence[str] | None = None,
    lanes: Sequence[tuple[str, int]] | None = None,
) -> list[tuple[str, int]]:
    """Mark lanes whose loss has become infinite or NaN, in place.

    Args:
      results: results of a run. If a loss has further dimensions, such as several orders of the tasks, a lane diverges
        if any of its values is infinite or NaN.
      task: index of the task that has just been recorded.
      methods: labels of the methods that have finished it, by default all.
      lanes: method and seed of each lane that has finished it, by default all seeds of the methods.

    Returns:
      method and seed of each lane that diverged in this task and not in an earlier one.

    Example:
      >>> from cbp_jax.report import new_results, record_task
      >>> results = new_results(["bp"], ["bp"], [{}], seeds=2, tasks=3, settings={}, experiment="mine")
      >>> record_task(results, 1, {"loss": [[0.5, np.inf]]})
      >>> mark_diverged(results, 1), results.diverged.values.tolist()
      ([('bp', 1)], [[nan, 1.0]])
    """
    methods = results.method.values.tolist() if methods is None else list(methods)
    names = [name for name in _LOSSES if name in results and set(results[name].dims) >= {"method", "seed", "task"}]
    if not names:
        return []
    if lanes is not None:
        methods = list(dict.fromkeys(label for label, _ in lanes))
    rows = results.indexes["method"].get_indexer(methods)
    place = results.indexes["task"].get_loc(task)
    bad = np.zeros((len(rows), results.sizes["seed"]), bool)
    for name in names:
        values = results[name].transpose("method", "seed", "task", ...).values[rows, :, place]
        bad |= ~np.isfinite(values).reshape(*bad.shape, -1).all(-1)
    if lanes is not None:
        done = set(lanes)
        bad &= [[(label, seed) in done for seed in results.seed.values.tolist()] for label in methods]
    if not bad.any():
        return []
    if COORDINATE not in results.coords:
        shape = (results.sizes["method"], results.sizes["seed"])
        results.coords[COORDINATE] = (("method", "seed"), np.full(shape, np.nan))
    since = results[COORDINATE].transpose("method", "seed").values
    new = [(row, seed) for row, seed in zip(*np.nonzero(bad), strict=True) if np.isnan(since[rows[row], seed])]
    for row, seed in new:
        since[rows[row], seed] = task
    return [(methods[row], int(results.seed.values[seed])) for row, seed in new]


def diverged_tasks(results: xr.Dataset, method: str) -> np.ndarray:
    """Return when the lanes of a method diverged.

    Args:
      results: results of a run.
      method: label of the method.

    Returns:
      for each seed the index of the task, float64; NaN if it did not diverge.
    """
    if COORDINATE not in results.coords:
        return np.full(results.sizes["seed"], np.nan)
    return results[COORDINATE].loc[{"method": method}].values.astype(np.float64)


def diverged_by(results: xr.Dataset, task: int, lanes: Sequence[tuple[str, int]]) -> np.ndarray:
    """Return which lanes, methods with seeds, diverged in a task or an earlier one, bool [lanes]."""
    if COORDINATE not in results.coords:
        return np.zeros(len(lanes), bool)
    since = results[COORDINATE].transpose("method", "seed").values[positions_of(results, lanes)]
    return since <= task  # NaN is not


def before_divergence(results: xr.Dataset, method: str, measure: str) -> np.ndarray:
    """Return a measure of a method [seed, task], float64; NaN from the task in which a seed diverged."""
    values = results[measure].loc[{"method": method}].transpose("seed", "task").values.astype(np.float64)
    diverged = diverged_tasks(results, method)
    return np.where(
        np.arange(values.shape[1]) < np.where(np.isnan(diverged), np.inf, diverged)[:, None], values, np.nan
    )


def without_diverged(results: xr.Dataset) -> xr.Dataset:
    """Return the results of the seeds with which no method diverged, for tables and pictures that compare methods seed
    by seed; all results if no seed would be left."""
    if COORDINATE not in results.coords:
        return results
    healthy = np.flatnonzero(results[COORDINATE].isnull().all("method").values)
    return results.isel(seed=healthy) if healthy.size else results


def left_out_note(results: xr.Dataset) -> str:
    """Return the end of a picture's note on what `without_diverged` leaves out; "" if no lane diverged."""
    if COORDINATE not in results.coords or not results[COORDINATE].notnull().any():
        return ""
    left_out = results.sizes["seed"] - without_diverged(results).sizes["seed"]
    if not left_out:
        return "; with every seed a method diverged, so none is left out"
    return f"; {left_out} of {results.sizes['seed']} seeds left out, because a method diverged"


def told(results: xr.Dataset, paired: bool = False) -> list[str]:
    """Return a line for each method with diverged lanes.

    Args:
      results: results of a run.
      paired: whether their seeds are left out for all methods, by `without_diverged`.
    """
    what = "and are left out"
    if paired and without_diverged(results).sizes["seed"] < results.sizes["seed"]:
        what += " for all methods"
    elif paired:
        what = "and are not left out, because no seed would be left"
    lines = []
    for method in results.method.values.tolist():
        diverged = diverged_tasks(results, method)
        lanes = [f"seed {results.seed.values[i]} in task {int(diverged[i]) + 1}" for i in np.flatnonzero(diverged >= 0)]
        if lanes:
            shown = ", ".join(lanes[:5]) + (", ..." if len(lanes) > 5 else "")
            lines.append(f"{method}: {len(lanes)} of {len(diverged)} seeds diverged {what} ({shown})")
    return lines
