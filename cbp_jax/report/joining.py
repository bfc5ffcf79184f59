"""Joins results: of runs with other seeds or methods, and of the processes of one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbp_jax.report import divergence, records
from cbp_jax.report.extra import require

if TYPE_CHECKING:
    import xarray as xr


# Which runs there are, and how they are run, but not what one of them does.
_OF_THE_WHOLE = {"seeds", "first_seed", "methods", "method", "lanes", "lanes_at_once", "data_dir"}


def compare_results(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join results of runs that may differ in their settings, which then are part of the names of their methods.

    Args:
      parts: as for :func:`join_results`; they may also have the same methods and seeds.

    Returns:
      the joined dataset. If settings differ, a method "bp" is called "bp(hidden=20 20)".

    Raises:
      ValueError: two parts have the same method and seed and do not differ in settings; see also :func:`join_results`.

    Example:
      >>> from cbp_jax.report import new_results
      >>> run = lambda **settings: new_results(
      ...   ["bp"], ["bp"], [{}], seeds=[0], tasks=1, settings=settings, experiment="mine"
      ... )
      >>> compare_results([run(hidden=[5, 5]), run(hidden=[20, 20])]).method.values.tolist()
      ['bp(hidden=5 5)', 'bp(hidden=20 20)']
    """
    settings = [_settings_of(part) for part in parts]
    differing = _differing(settings)
    if not differing:
        return join_results(parts)
    named = []
    for part, own in zip(parts, settings, strict=True):
        words = ", ".join(f"{name}={_written(own.get(name))}" for name in differing)
        labels = [
            f"{method[:-1]}, {words})" if method.endswith(")") else f"{method}({words})"
            for method in part.method.values.tolist()
        ]
        named.append(part.assign_coords(method=labels))
    return join_results(named)


def _settings_of(part: xr.Dataset) -> dict[str, object]:
    found = json.loads(part.attrs.get("settings", "{}"))
    return {name: value for name, value in found.items() if name not in _OF_THE_WHOLE}


def _differing(settings: Sequence[dict[str, object]]) -> list[str]:
    """Return the names of the settings that are not the same in all parts."""
    names = dict.fromkeys(name for own in settings for name in own)
    return [name for name in names if any(own.get(name) != settings[0].get(name) for own in settings)]


def _written(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def join_results(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join results of one experiment with different seeds or methods.

    Args:
      parts: datasets of :func:`load_results`, each with seeds or methods that no other has.

    Returns:
      the joined dataset; NaN if a method was not run with a seed. Its attributes are those of the first part, except
      that the times of methods are added, that the commit and the command name those of all parts, and that settings
      are those that all parts have in common, with the seeds and methods of all.

    Raises:
      ValueError: there are no parts, they are of several experiments, two have the same method and seed, or the same
        method with different settings.

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
            method, seed = min(runs & seen)
            raise ValueError(f"runs must have different methods, seeds or settings, got {method!r}, seed {seed} twice")
        seen |= runs
    for method in dict.fromkeys(method for method, _ in sorted(seen)):
        settings = [_settings_of(part) for part in parts if method in part.method.values]
        if differing := _differing(settings):
            name = differing[0]
            values = " and ".join(dict.fromkeys(_written(own.get(name)) for own in settings))
            raise ValueError(f"runs of a method must have the same settings, got {method!r} with {name}={values}")
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
    for name, separator in (("commit", ", "), ("command", "; ")):
        if found := dict.fromkeys(value for part in parts if (value := part.attrs.get(name))):
            joined.attrs[name] = separator.join(found)
    if "settings" in joined.attrs:
        joined.attrs["settings"] = json.dumps(_joined_settings(parts, joined.seed.values.tolist()), sort_keys=True)
    for part in parts[1:]:
        for method, seconds in records.seconds_of(part).items():
            records.add_seconds(joined, [method], seconds)
    missing = {name: "" if any(isinstance(v, str) for v in of.values()) else np.nan for name, of in columns.items()}
    return joined.assign_coords(
        {name: ("method", [of.get(method, missing[name]) for method in methods]) for name, of in columns.items()}
    )


def _joined_settings(parts: Sequence[xr.Dataset], seeds: list[int]) -> dict[str, object]:
    """Return the settings that all parts have, with the seeds and methods of all."""
    every = [json.loads(part.attrs["settings"]) for part in parts]
    found = {name: value for name, value in every[0].items() if all(own.get(name) == value for own in every)}
    for name, value in (("seeds", len(seeds)), ("first_seed", seeds[0])):
        if name in every[0]:
            found[name] = value
    if "methods" in every[0]:
        found["methods"] = list(dict.fromkeys(method for own in every for method in own["methods"]))
    return found


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
