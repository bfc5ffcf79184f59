"""Results of a run: one ``xarray.Dataset``.

The dataset is filled with NaN before the first task, and values are written as tasks end. So a killed run leaves a
readable file in which NaN means "not run".
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cbp_jax import by_path
from cbp_jax.report import looks as looks_lib
from cbp_jax.report import records
from cbp_jax.report.extra import require
from cbp_jax.report.measures import MEASURES

if TYPE_CHECKING:
    import xarray as xr

    from cbp_jax.report.looks import Look

_DIMS = ("method", "seed", "task")


def new_results(
    methods: Sequence[str],
    learners: Sequence[str],
    hyperparameters: Sequence[Mapping[str, float]],
    *,
    seeds: int | Sequence[int],
    tasks: int,
    settings: Any,
    experiment: str,
    measures: Mapping[str, str] = MEASURES,
    looks: Mapping[str, Look] | None = None,
    texts: Sequence[Mapping[str, str]] | None = None,
) -> xr.Dataset:
    """Allocate the results of a run, NaN everywhere.

    Args:
      methods: a label for each method, all different, such as ``"cbp(replacement_rate=1e-05)"``.
      learners: the learner of each method, such as ``"cbp"``; several methods may be variants of one learner.
      hyperparameters: for each method, its numeric settings by name, such as ``{"step_size": 0.01}``. None is ignored.
      seeds: the number of seeds (then they are 0, 1, ...), or the seeds themselves.
      tasks: number of tasks of the complete run.
      settings: the settings of the experiment, a dataclass or a mapping; stored as JSON.
      experiment: the experiment's name.
      measures: the measures of a task: names of the data variables, and their meanings.
      looks: by learner, how it is named and drawn in pictures. Others get a title from their name, and an unused style.
      texts: for each method, its settings that are not numbers, by name, as texts like those in labels, such as
        ``{"utility": "weight"}``.

    Returns:
      A dataset with a float32 variable [method, seed, task] for each measure; the coordinates ``method`` and
      ``learner`` (strings), one float64 coordinate for each hyperparameter along ``method`` (NaN where a method has no
      such hyperparameter) and one of strings for each text (empty where a method has none), ``seed`` and ``task``
      (integers); and the attributes ``experiment``, ``settings``, ``versions``, ``device``, ``command`` and ``commit``
      (see :func:`records.origin`) and, if given, ``looks``. Of these, settings, versions and looks are JSON.

    Raises:
      ValueError: a label is given twice, the lengths differ, there is nothing to run, a hyperparameter is not a number,
        or its name, or that of a text, is already used in the dataset.

    Example:
      >>> results = new_results(
      ...     ["bp", "cbp"], ["bp", "cbp"], [{"step_size": 0.01}, {"replacement_rate": 1e-4}],
      ...     seeds=3, tasks=10, settings={"width": 100}, experiment="online_permuted")
      >>> dict(results.sizes)
      {'method': 2, 'seed': 3, 'task': 10}
      >>> results.replacement_rate.values
      array([   nan, 0.0001])
    """
    xr = require("xarray")
    methods, learners, hyperparameters = list(methods), list(learners), list(hyperparameters)
    texts = [{}] * len(methods) if texts is None else list(texts)
    if not methods or len(set(methods)) != len(methods):
        raise ValueError(f"methods must be labels, at least one and all different; got {methods}")
    for name, values in (("learners", learners), ("hyperparameters", hyperparameters), ("texts", texts)):
        if len(values) != len(methods):
            raise ValueError(f"{name} must have one entry for each of the {len(methods)} methods; got {len(values)}")
    seeds = list(range(seeds)) if isinstance(seeds, int | np.integer) else [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be a positive number of seeds, or seeds that all differ; got {seeds}")
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1; got {tasks}")

    taken = {*_DIMS, "learner", *measures}
    columns: dict[str, np.ndarray] = {}
    for i, one in enumerate(hyperparameters):
        for name, value in one.items():
            if value is None:
                continue
            if name in taken:
                raise ValueError(f"hyperparameters: the name {name!r} is taken; the dataset uses {sorted(taken)}")
            try:
                columns.setdefault(name, np.full(len(methods), np.nan))[i] = float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"hyperparameters: {name} of {methods[i]!r} must be a number; got {value!r}"
                ) from error
    of_texts: dict[str, list[str]] = {}
    for i, given in enumerate(texts):
        for name, text in given.items():
            if name in taken or name in columns:
                raise ValueError(f"texts: the name {name!r} is taken; the dataset uses {sorted(taken | set(columns))}")
            of_texts.setdefault(name, [""] * len(methods))[i] = text

    shape = (len(methods), len(seeds), tasks)
    return xr.Dataset(
        {
            name: (_DIMS, np.full(shape, np.nan, np.float32), {"long_name": meaning})
            for name, meaning in measures.items()
        },
        coords={
            "method": methods,
            "learner": ("method", learners),
            **{name: ("method", column) for name, column in (columns | of_texts).items()},
            "seed": np.asarray(seeds, np.int64),
            "task": np.arange(tasks, dtype=np.int64),
        },
        attrs={
            "experiment": experiment,
            "settings": settings_json(settings),
            "versions": json.dumps(_versions(), sort_keys=True),
            **records.origin(),
            **({looks_lib.ATTRIBUTE: looks_lib.to_json(looks)} if looks else {}),
        },
    )


def record_task(
    results: xr.Dataset,
    task: int,
    values: Mapping[str, Any],
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> None:
    """Write the measurements of one task into the results, in place.

    Args:
      results: a dataset made by :func:`new_results`.
      task: the task's index, from 0.
      values: name of a measure -> array [methods, seeds], with further axes if the measure has them. Other measures are
        not changed.
      methods: labels of the rows; all methods by default.
      seeds: seeds of the columns; all seeds by default.

    Raises:
      ValueError: a task, measure, method or seed is unknown, or an array has another shape. Then nothing is written.

    Example:
      >>> results = new_results(["bp", "cbp"], ["bp", "cbp"], [{}, {}], seeds=3, tasks=10, settings={},
      ...                       experiment="online_permuted")
      >>> record_task(results, 0, {"accuracy": [[0.91, 0.92, 0.93]]}, methods=["cbp"])
      >>> int(results.accuracy.notnull().sum())
      3
    """
    labels = {"task": [task]}
    for dim, chosen in (("method", methods), ("seed", seeds)):
        labels[dim] = results[dim].values if chosen is None else chosen
    position = {}
    for dim, chosen in labels.items():
        index = results.indexes[dim].get_indexer(np.asarray(chosen))
        if (index < 0).any() or len(set(index)) != len(index):
            raise ValueError(
                f"{dim}: got {_listed(chosen)}; these results have, once each, {_listed(results[dim].values)}"
            )
        position[dim] = index
    shape = (len(labels["method"]), len(labels["seed"]))
    arrays = {}
    for name, value in values.items():
        if name not in results.data_vars or results[name].dims[: len(_DIMS)] != _DIMS:
            raise ValueError(f"values: unknown measure {name!r}; these results have {list(results.data_vars)}")
        arrays[name] = np.asarray(value, dtype=results[name].dtype)
        further = results[name].shape[len(_DIMS) :]
        if arrays[name].shape != (*shape, *further):
            raise ValueError(
                f"values: {name} must have the shape {['methods', 'seeds', *results[name].dims[len(_DIMS) :]]} = "
                f"{(*shape, *further)}; got {arrays[name].shape}"
            )
    where = np.ix_(position["method"], position["seed"], position["task"])
    for name, array in arrays.items():
        results[name].values[where] = array[:, :, None]


def record_lanes(results: xr.Dataset, task: int, values: Mapping[str, Any], lanes: Sequence[tuple[str, int]]) -> None:
    """Write the measurements of one task in some lanes into the results, in place.

    Args:
      results: a dataset made by :func:`new_results`.
      task: the task's index, from 0.
      values: name of a measure -> array [lanes], with further axes if the measure has them.
      lanes: method and seed of each lane.

    Raises:
      ValueError: a task, measure, method or seed is unknown, or an array has another shape. Then nothing is written.

    Example:
      >>> results = new_results(["bp", "cbp"], ["bp", "cbp"], [{}, {}], seeds=3, tasks=10, settings={},
      ...                       experiment="online_permuted")
      >>> record_lanes(results, 0, {"accuracy": [0.91, 0.92]}, [("bp", 0), ("cbp", 2)])
      >>> int(results.accuracy.notnull().sum())
      2
    """
    rows, columns = positions_of(results, lanes)
    (place,) = results.indexes["task"].get_indexer([task])
    if place < 0:
        raise ValueError(f"task: got {task}; these results have {_listed(results.task.values)}")
    arrays = {}
    for name, value in values.items():
        if name not in results.data_vars or results[name].dims[: len(_DIMS)] != _DIMS:
            raise ValueError(f"values: unknown measure {name!r}; these results have {list(results.data_vars)}")
        arrays[name] = np.asarray(value, dtype=results[name].dtype)
        expected = (len(rows), *results[name].shape[len(_DIMS) :])
        if arrays[name].shape != expected:
            raise ValueError(f"values: {name} must have the shape {expected}; got {arrays[name].shape}")
    for name, array in arrays.items():
        results[name].values[rows, columns, place] = array


def positions_of(results: xr.Dataset, lanes: Sequence[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of lanes, methods and seeds, along `method` and `seed`.

    Raises:
      ValueError: a lane is not in the results.
    """
    rows = results.indexes["method"].get_indexer([label for label, _ in lanes])
    columns = results.indexes["seed"].get_indexer([seed for _, seed in lanes])
    for lane, row, column in zip(lanes, rows, columns, strict=True):
        if row < 0 or column < 0:
            raise ValueError(
                f"lanes: got {lane}; these results have {_listed(results.method.values)}, each with seeds "
                f"{_listed(results.seed.values)}"
            )
    return rows, columns


def settings_json(settings: Any) -> str:
    """Return the settings of an experiment, a dataclass or a mapping, as JSON for results."""
    return json.dumps(_plain(settings), sort_keys=True)


def _plain(value: Any) -> Any:
    """Convert settings for JSON: dataclasses become dicts, arrays lists, and other objects text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    if callable(value):
        return by_path.path_of(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("cbp-jax", "jax", "flax", "optax", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def _listed(values: Any) -> str:
    values = np.asarray(values).tolist()
    return str(values) if len(values) <= 12 else f"{values[0]!r} ... {values[-1]!r} ({len(values)})"
