"""The folder of a run: locking, and resuming an earlier run."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax import files

STATE_FILE = "state.msgpack"


@contextlib.contextmanager
def opened(results: Any, out: Path) -> Iterator[Any]:
    """Locks a folder for a run until its end, and loads the results of an earlier run.

    Args:
      results: empty results of the run; see `report.new_results`.
      out: the folder; created if needed.

    Yields:
      the results in the folder if they belong to this run, otherwise `results`.

    Raises:
      BlockingIOError: another run is using the folder.
      ValueError: the folder has results that cannot be read, or results of a different run. They are not changed.
    """
    with files.locked(out):
        found = _found(out)
        if found is None:
            (out / STATE_FILE).unlink(missing_ok=True)  # useless without the earlier results
            yield results
            return
        _refuse_other(found, out, results.attrs["experiment"], results.attrs["settings"])
        if differing := _differing_shapes(found, results):
            raise ValueError(
                f"{out} holds {_finished(found)} of a run by another version of cbp_jax: {'; '.join(differing)}. "
                + _ways_out(out)
            )
        yield found


def check(out: Path, experiment: str, settings: Any) -> None:
    """Raises if a folder holds anything but an earlier run of the same settings, or is in use.

    Args:
      out: the folder.
      experiment: name of the experiment.
      settings: its settings, a dataclass.

    Raises:
      BlockingIOError: another run is using the folder.
      NotADirectoryError: it is a file.
      ValueError: it holds other things.
    """
    from cbp_jax import report

    name = report.results.FILE_NAME
    left_by_a_kill = {files.LOCK_FILE, files.partial(out / name).name}
    if not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= left_by_a_kill):
        return
    with files.locked(out):
        found = _found(out)
    if found is None:
        raise ValueError(f"{out} is not empty and holds no run: it has no {name}; choose another folder by --out")
    _refuse_other(found, out, experiment, report.results.settings_json(settings))


def digest(results: Any, methods: Sequence[str], tasks: int) -> bytes:
    """A checksum of the results of some methods on the first tasks."""
    found = hashlib.sha256()
    for name, values in results.data_vars.items():
        kept = values.loc[{"method": list(methods)}].isel(task=slice(tasks)).values
        found.update(name.encode() + np.where(np.isnan(kept), np.nan, kept).astype(kept.dtype).tobytes())
    return found.digest()


def _found(out: Path) -> Any:
    from cbp_jax import report

    try:
        return report.load_results(out)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}. It is left as it is. {_ways_out(out)}") from error


def _refuse_other(found: Any, out: Path, experiment: str, settings: str) -> None:
    if found.attrs["experiment"] != experiment:
        raise ValueError(f"{out} holds another experiment, {found.attrs['experiment']!r}. {_ways_out(out)}")
    try:
        old, new = json.loads(found.attrs["settings"]), json.loads(settings)
        keys = sorted(old.keys() | new.keys())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{out} holds a file that is not a results file of cbp_jax: its settings cannot be read. {_ways_out(out)}"
        ) from error
    shown = lambda of, key: json.dumps(of[key]) if key in of else "unknown"
    both = {key: (shown(old, key), shown(new, key)) for key in keys}
    differing = [f"{key} is {there} there and {now} now" for key, (there, now) in both.items() if there != now]
    if differing:
        raise ValueError(
            f"{out} holds {_finished(found)} of a run with other settings ({'; '.join(differing)}). {_ways_out(out)}"
        )


def _differing_shapes(found: Any, results: Any) -> list[str]:
    """Differences between runs of the same settings by two versions of the library."""
    differing = []
    old, new = list(found.data_vars), list(results.data_vars)
    if set(old) != set(new):
        only = lambda names, others: ", ".join(name for name in names if name not in others) or "none"
        differing.append(f"measures only there: {only(old, new)}, only now: {only(new, old)}")
    for dim in dict.fromkeys((*found.dims, *results.dims)):
        if dim not in found.indexes or dim not in results.indexes:
            differing.append(f"{dim} is only {'there' if dim in found.dims else 'now'}")
        elif not found.indexes[dim].equals(results.indexes[dim]):
            differing.append(f"each {dim} is named otherwise, or there are {found.sizes[dim]} and {results.sizes[dim]}")
    return differing


def _finished(results: Any) -> str:
    others = lambda values: [dim for dim in values.dims if dim not in ("method", "task")]
    counts = [int(values.notnull().any(others(values)).sum()) for values in results.data_vars.values()]
    return f"{max(counts, default=0)} finished tasks"


def _ways_out(out: Path) -> str:
    from cbp_jax import report

    kept = [path for path in (out / report.results.FILE_NAME, out / STATE_FILE) if path.exists()]
    return f"Choose another folder (--out), or move {' and '.join(map(str, kept))} away to start anew here"
