"""Results of a run: one ``xarray.Dataset``, stored in one netCDF file that is written atomically.

The dataset is filled with NaN before the first task, and values are written as tasks end. So a killed run leaves a
readable file in which NaN means "not run".
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from cbp_jax import by_path, files
from cbp_jax.report import looks as looks_lib

if TYPE_CHECKING:
    import xarray as xr

    from cbp_jax.report.looks import Look

FILE_NAME = "results.nc"
PARTS = "processes"  # where the processes of a run that is not finished keep their parts, each a folder with that file

#: Measures of each task, for each method and seed: name of the data variable, and its meaning.
MEASURES: dict[str, str] = {
    "accuracy": "fraction of the task's examples classified correctly, each before learning from it",
    "loss": "mean loss of the task's examples, each before learning from it",
    "dead_units": "fraction of hidden units that are zero on every measured example, before the task",
    "weight_magnitude": "mean absolute weight, before the task",
    "effective_rank": "effective rank over the number of units, mean over hidden layers, before the task",
    "stable_rank": "stable rank over the number of units, mean over hidden layers, before the task",
    "replaced_units": "units replaced during the task",
}

#: Additional measures if updates are measured; see :func:`stream_measures`.
UPDATE_MEASURES: dict[str, str] = {
    "plasticity": "1 - loss after / loss before the update, clipped to [0, 1], mean over examples",
    "gradient_l0": "fraction of gradients that are not 0, mean over measured updates",
    "gradient_l1": "L1 norm of the gradient, mean over measured updates",
    "gradient_l2": "L2 norm of the gradient, mean over measured updates",
    "weight_rank": "sum of the kernels' ranks over the largest possible, before the task",
    "weight_effective_rank": "sum of the kernels' effective ranks over the largest possible, before the task",
    "weight_sparsity": "fraction of weights of at most a hundredth of their kernel's root mean square, before the task",
    "weight_l1": "L1 norm of the weights, before the task",
    "weight_l2": "L2 norm of the weights, before the task",
}

#: Additional measures if tasks have test examples.
TEST_MEASURES: dict[str, str] = {
    "test_accuracy": "fraction of the task's test examples classified correctly, after the task",
    "test_loss": "mean loss of the task's test examples, after the task",
}

#: Additional measures if weights are chosen by validation examples.
VALIDATION_MEASURES: dict[str, str] = {
    "validation_accuracy": "fraction of the task's validation examples classified correctly, after the task",
}

#: Additional measures if a threshold for dormant units is given.
DORMANT_MEASURES: dict[str, str] = {
    "dormant_units": "fraction of hidden units of small activation, relative to their layer's, before the task",
}

_DIMS = ("method", "seed", "task")


def stream_measures(
    *, accuracy: bool = True, updates: bool = False, test: bool = False, dormant: bool = False
) -> dict[str, str]:
    """The measures on a stream of tasks.

    Args:
      accuracy: whether tasks are classifications.
      updates: whether plasticity and gradients are measured, and the weights as matrices.
      test: whether tasks have test examples.
      dormant: whether dormant units are counted.

    Returns:
      name of each measure, and its meaning.

    Example:
      >>> [name for name in stream_measures(accuracy=False) if "accuracy" in name]
      []
    """
    measures = MEASURES | (TEST_MEASURES if test else {}) | (DORMANT_MEASURES if dormant else {})
    measures |= UPDATE_MEASURES if updates else {}
    return {name: meaning for name, meaning in measures.items() if accuracy or "accuracy" not in name}


def require(module: str) -> ModuleType:
    """Imports a module of the ``report`` extra.

    Args:
      module: the module's full name, such as ``"matplotlib.figure"``.

    Returns:
      The module.

    Raises:
      ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'reports need {package}: pip install "cbp-jax[report]"') from error


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
) -> xr.Dataset:
    """Allocates the results of a run, NaN everywhere.

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

    Returns:
      A dataset with a float32 variable [method, seed, task] for each measure; the coordinates ``method`` and
      ``learner`` (strings) and one float64 coordinate for each hyperparameter along ``method`` (NaN where a
      method has no such hyperparameter), ``seed`` and ``task`` (integers); and the attributes ``experiment``,
      ``settings``, ``versions``, ``device``, ``command`` and ``commit`` (see :func:`records.origin`) and, if given,
      ``looks``. Of these, settings, versions and looks are JSON.

    Raises:
      ValueError: a label is given twice, the lengths differ, there is nothing to run, or a hyperparameter is not a
        number or its name is already used in the dataset.

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
    if not methods or len(set(methods)) != len(methods):
        raise ValueError(f"methods must be labels, at least one and all different; got {methods}")
    for name, values in (("learners", learners), ("hyperparameters", hyperparameters)):
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

    from cbp_jax.report import records  # which reads results

    shape = (len(methods), len(seeds), tasks)
    return xr.Dataset(
        {
            name: (_DIMS, np.full(shape, np.nan, np.float32), {"long_name": meaning})
            for name, meaning in measures.items()
        },
        coords={
            "method": methods,
            "learner": ("method", learners),
            **{name: ("method", column) for name, column in columns.items()},
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
    """Writes the measurements of one task into the results, in place.

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
    """Writes what was measured of one task in some lanes into the results, in place.

    Args:
      results: a dataset as :func:`new_results` makes it.
      task: the task's index, from 0.
      values: name of a measure -> array [lanes], and further axes where the measure has them.
      lanes: method and seed of each.

    Raises:
      ValueError: an unknown task, measure, method or seed, or an array of another shape. Nothing has been
        written then.

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
    """The indices of lanes, methods and seeds, along `method` and `seed`.

    Raises:
      ValueError: a lane is not there.
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


def save_results(results: xr.Dataset, run_dir: str | Path) -> Path:
    """Writes the results of a run to ``run_dir/results.nc`` atomically.

    The file is made in memory, written to a temporary file and then moved, so that a reader, a killed run or a full
    disk leaves either the previous results or these. Data are stored with checksums, and :func:`load_results` rejects
    damaged files. Writing takes about a tenth of a second.

    Args:
      results: the dataset to write.
      run_dir: folder of the run; created if needed.

    Returns:
      The path of the file (netCDF 4).

    Raises:
      NotADirectoryError: ``run_dir`` is a file.
      OSError: the file cannot be written, for example on a full disk. The previous results are not changed.
    """
    require("xarray")
    require("h5netcdf")
    require("h5py")
    run_dir = Path(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise NotADirectoryError(f"run_dir must be a folder; {run_dir} is a file")
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / FILE_NAME
    checked = {name: {"fletcher32": True} for name, values in results.data_vars.items() if values.size and values.ndim}
    files.write_whole(path, results.to_netcdf(engine="h5netcdf", encoding=checked))
    return path


def load_results(path: str | Path) -> xr.Dataset:
    """Reads the results of a run, complete or not.

    Where several processes are at work, or were, what each of them has finished is in the dataset.

    Args:
      path: the folder of the run, or its ``results.nc``.

    Returns:
      The dataset, in memory; see :func:`new_results`. NaN means that a task has not run. Select a method by
      ``results.loc[{"method": "cbp"}]``: in ``results.sel(method="cbp")`` xarray interprets ``method`` as its own
      option, and selects nothing.

    Raises:
      FileNotFoundError: there is no such file, or no results in that folder.
      ValueError: the file holds something else.
    """
    require("xarray")
    require("h5netcdf")
    require("h5py")
    path = Path(path)
    # Parts come first: who joins them writes the file before removing them.
    parts = _load_parts(path) if path.is_dir() else []
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        if parts:
            return _with_parts(parts[0], parts[1:], path)
        reason = f"the folder {path} has no {FILE_NAME}" if path.is_dir() else f"{path} does not exist"
        raise FileNotFoundError(f"no results to load: {reason}; give the folder of a run, or its {FILE_NAME}")
    results = _load_file(file)
    return _with_parts(results, parts, path) if parts else results


def part_files(run_dir: Path) -> list[Path]:
    """The files of results that the processes of a run keep, the oldest first."""
    found = []
    for file in (Path(run_dir) / PARTS).glob(f"*/{FILE_NAME}"):
        with contextlib.suppress(FileNotFoundError):  # removed by now
            found.append((file.stat().st_mtime_ns, file))
    return [file for _, file in sorted(found)]


def _load_parts(run_dir: Path) -> list[xr.Dataset]:
    parts = []
    for file in part_files(run_dir):
        try:
            parts.append(_load_file(file))
        except ValueError:
            if file.exists():
                raise
    return parts


def _with_parts(results: xr.Dataset, parts: Sequence[xr.Dataset], run_dir: Path) -> xr.Dataset:
    """Fills in what the processes of a run have measured; where two have a number, the later one's is taken."""
    from cbp_jax.report import divergence, records  # which read results

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


def _load_file(file: Path) -> xr.Dataset:
    try:
        results = require("xarray").load_dataset(file, engine="h5netcdf")
    except PermissionError:
        raise
    except Exception as error:  # the type depends on the damage
        raise ValueError(f"{file} is not a results file: it cannot be read as netCDF 4 ({error})") from error
    missing = [name for name in ("experiment", "settings") if name not in results.attrs]
    missing += [name for name in ("seed", "task") if name not in results.dims]
    if missing:
        raise ValueError(f"{file} is not a results file of cbp_jax: it is netCDF, but has no {', '.join(missing)}")
    return results


def join_results(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Joins results of one experiment with different seeds or methods.

    Args:
      parts: datasets of :func:`load_results`, each with seeds or methods that no other has.

    Returns:
      the joined dataset; NaN if a method was not run with a seed. Its attributes are those of the first part, except
      that the times of methods are added.

    Raises:
      ValueError: there are no parts, they are of several experiments, or two have the same method and seed.

    Example:
      >>> run = lambda seeds: new_results(["bp"], ["bp"], [{}], seeds=seeds, tasks=10, settings={}, experiment="mine")
      >>> join_results([run([0, 1]), run([5])]).seed.values.tolist()
      [0, 1, 5]
    """
    from cbp_jax.report import records  # which reads results

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
    for part in parts[1:]:
        for method, seconds in records.seconds_of(part).items():
            records.add_seconds(joined, [method], seconds)
    return joined.assign_coords(
        {name: ("method", [values.get(method, np.nan) for method in methods]) for name, values in columns.items()}
    )


def settings_json(settings: Any) -> str:
    """The settings of an experiment, a dataclass or a mapping, as JSON for results."""
    return json.dumps(_plain(settings), sort_keys=True)


def _plain(value: Any) -> Any:
    """Converts settings for JSON: dataclasses become dicts, arrays lists, and other objects text."""
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
