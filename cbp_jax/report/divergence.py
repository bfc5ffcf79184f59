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
      results: results of a run.
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
    names = [name for name in _LOSSES if name in results and set(results[name].dims) == {"method", "seed", "task"}]
    if not names:
        return []
    if lanes is not None:
        methods = list(dict.fromkeys(label for label, _ in lanes))
    rows = results.indexes["method"].get_indexer(methods)
    place = results.indexes["task"].get_loc(task)
    values = [results[name].transpose("method", "seed", "task").values[rows, :, place] for name in names]
    bad = ~np.isfinite(values).all(0)
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


def told(results: xr.Dataset) -> list[str]:
    """Return a line for each method with diverged lanes."""
    lines = []
    for method in results.method.values.tolist():
        diverged = diverged_tasks(results, method)
        lanes = [f"seed {results.seed.values[i]} in task {int(diverged[i]) + 1}" for i in np.flatnonzero(diverged >= 0)]
        if lanes:
            shown = ", ".join(lanes[:5]) + (", ..." if len(lanes) > 5 else "")
            lines.append(f"{method}: {len(lanes)} of {len(diverged)} seeds diverged and are left out ({shown})")
    return lines
