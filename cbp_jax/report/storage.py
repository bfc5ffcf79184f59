"""Results on disk: one netCDF file for each run, which is written atomically.

While several processes share a run, each has its own file, and `load_results` joins them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from cbp_jax import files
from cbp_jax.report.extra import require
from cbp_jax.report.joining import with_parts

if TYPE_CHECKING:
    import xarray as xr

FILE_NAME = "results.nc"
PARTS = "processes"  # folder of an unfinished run in which each process has a folder with its results


def save_results(results: xr.Dataset, run_dir: str | Path) -> Path:
    """Write the results of a run to ``run_dir/results.nc`` atomically.

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
    # A loaded dataset remembers the lengths of its texts in the file, and longer ones would be cut to them.
    files.write_whole(path, results.drop_encoding().to_netcdf(engine="h5netcdf", encoding=checked))
    return path


def load_results(path: str | Path) -> xr.Dataset:
    """Read the results of a run, complete or not.

    If several processes share the run, the dataset includes what each of them has finished.

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
    # Parts are read first: the process that joins them writes the file before it removes them.
    parts = _load_parts(path) if path.is_dir() else []
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        if parts:
            return with_parts(parts[0], parts[1:], path)
        reason = f"the folder {path} has no {FILE_NAME}" if path.is_dir() else f"{path} does not exist"
        raise FileNotFoundError(f"no results to load: {reason}; give the folder of a run, or its {FILE_NAME}")
    results = _load_file(file)
    return with_parts(results, parts, path) if parts else results


def part_files(run_dir: Path) -> list[Path]:
    """Return the files of results that the processes of a run keep, the oldest first."""
    found = []
    for file in (Path(run_dir) / PARTS).glob(f"*/{FILE_NAME}"):
        with contextlib.suppress(FileNotFoundError):  # was removed meanwhile
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
