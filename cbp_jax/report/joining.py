"""Joins results: of runs with other seeds or methods, and of the processes of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbp_jax.report import divergence, records
from cbp_jax.report.extra import require

if TYPE_CHECKING:
    import xarray as xr


def join_results(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join results of one experiment with different seeds or methods.

    Args:
      parts: datasets of :func:`load_results`, each with seeds or methods that no other has.

    Returns:
      the joined dataset; NaN if a method was not run with a seed. Its attributes are those of the first part, except
      that the times of methods are added, and that the commit names those of all parts, separated by commas.

    Raises:
      ValueError: there are no parts, they are of several experiments, or two have the same method and seed.

    Example:
      >>> from cbp_jax.report import new_results
      >>> run = lambda seeds: new_results(["bp"], ["bp"], [{}], seeds=seeds, tasks=10, settings={}, experiment="mine")
      >>> join_results([run([0, 1]), run([5])]).seed.values.tolist()
      [0, 1, 5]
    """
    xr = require("xarray")
    if not parts:
        raise ValueError("parts must be results, got none")
    experiments = sorted({part.attrs["experiment"] for part in parts})
    if len(experiments) > 1:
        raise ValueError(f"parts must be of one experiment, got {experiments}")
    if len(parts) == 1:
        return parts[0]
    seen: set[tuple[str, int]] = set()
    for part in parts:
        runs = {(method, seed) for method in part.method.values.tolist() for seed in part.seed.values.tolist()}
        if runs & seen:
            raise ValueError(f"parts must have different methods or seeds, got {min(runs & seen)} twice")
        seen |= runs
    of_methods = {name for part in parts for name in part.coords if part[name].dims == ("method",) and name != "method"}
    columns = {name: {} for name in of_methods}
    for part in parts:
        for name in of_methods & set(part.coords):
            columns[name] |= dict(zip(part.method.values.tolist(), part[name].values.tolist(), strict=True))
    bare = [part.drop_vars(of_methods & set(part.coords)) for part in parts]
    joined = xr.merge(bare, join="outer", compat="no_conflicts", combine_attrs="override")
    methods = list(dict.fromkeys(method for part in parts for method in part.method.values.tolist()))
    joined = joined.loc[{"method": methods}]
    joined.attrs = dict(parts[0].attrs)
    if commits := [commit for part in parts if (commit := part.attrs.get("commit"))]:
        joined.attrs["commit"] = ", ".join(dict.fromkeys(commits))
    for part in parts[1:]:
        for method, seconds in records.seconds_of(part).items():
            records.add_seconds(joined, [method], seconds)
    return joined.assign_coords(
        {name: ("method", [values.get(method, np.nan) for method in methods]) for name, values in columns.items()}
    )


def with_parts(results: xr.Dataset, parts: Sequence[xr.Dataset], run_dir: Path) -> xr.Dataset:
    """Fill in the measurements of a run's processes; if two have the same one, the later is taken."""
    for part in parts:
        same = part.attrs["settings"] == results.attrs["settings"] and part.sizes == results.sizes
        if not same or part.attrs["experiment"] != results.attrs["experiment"]:
            raise ValueError(f"{run_dir} is not the folder of one run: its processes ran with different settings")
        for name, values in results.data_vars.items():
            values.values[...] = np.where(np.isnan(part[name].values), values.values, part[name].values)
        if divergence.COORDINATE in part.coords:
            since = part[divergence.COORDINATE]
            if divergence.COORDINATE in results.coords:
                since = results[divergence.COORDINATE].fillna(since)
            results = results.assign_coords({divergence.COORDINATE: since})
        for method, seconds in records.seconds_of(part).items():
            records.add_seconds(results, [method], seconds)
        if "failed" in part.attrs:
            results.attrs["failed"] = part.attrs["failed"]
    return results
