"""Provenance of results, and a list of runs."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from cbp_jax import files
from cbp_jax.report.results import FILE_NAME, PARTS, load_results
from cbp_jax.report.statistics import better, interval_text, is_accuracy, last_tenth, performance

if TYPE_CHECKING:
    import xarray as xr

_PACKAGE = Path(__file__).parents[1]


def origin() -> dict[str, str]:
    """The provenance of results made in this process, as attributes.

    Returns:
      ``device``, such as "cpu x 2"; ``command``, the command line of the process; and ``commit``, the commit of the
      package's checkout, followed by " with changes" if files differ from it, or "" if the package is not in a checkout
      or git is not available.
    """
    devices = jax.local_devices()
    several = f" x {len(devices)}" if len(devices) > 1 else ""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
    return {"device": devices[0].device_kind + several, "command": command, "commit": commit_of(_PACKAGE)}


@functools.cache
def commit_of(folder: Path) -> str:
    """The git commit of a folder in a checkout.

    Args:
      folder: the folder of a package.

    Returns:
      its hash, followed by " with changes" if the folder differs from it; "" if the folder is not in a checkout, is not
      tracked by it, or git is not available.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # fails in an environment inside of another project's checkout
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def resume(results: xr.Dataset) -> None:
    """Records, in place, that a run is resumed, if the command, device or commit has changed.

    Args:
      results: results of the run, as found in its folder. Their attribute ``resumed`` gets an entry.
    """
    now = origin()
    entries = json.loads(results.attrs.get("resumed", "[]"))
    last = entries[-1] if entries else {name: results.attrs.get(name) for name in now}
    if last != now:
        results.attrs["resumed"] = json.dumps([*entries, now])


def add_seconds(results: xr.Dataset, methods: list[str], seconds: float) -> None:
    """Adds to the time of methods, in place. Methods that run together get equal shares.

    Args:
      results: results whose attribute ``seconds``, JSON, has the time of each method.
      methods: labels of the methods that ran together.
      seconds: their total time.
    """
    kept = seconds_of(results)
    kept |= {method: kept.get(method, 0.0) + seconds / len(methods) for method in methods}
    results.attrs["seconds"] = json.dumps({method: round(value, 3) for method, value in kept.items()})


def seconds_of(results: xr.Dataset) -> dict[str, float]:
    """The time of each method, in seconds of the process, including compilation; empty if unknown."""
    return json.loads(results.attrs.get("seconds", "{}"))


class Run(NamedTuple):
    """A run, as `list_runs` finds it.

    Attributes:
      folder: of the run.
      experiment: its name.
      state: "finished", "running", "failed: ...", or "unfinished: 3 of 10 tasks", of all methods and seeds.
      headline: the best method and its performance in the last tenth of the tasks.
    """

    folder: Path
    experiment: str
    state: str
    headline: str


def list_runs(folder: str | Path) -> list[Run]:
    """Finds the runs in a folder and its subfolders.

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
        raise FileNotFoundError(f"folder must be that of runs; there is none at {folder}")
    parents = [path.parent for path in folder.rglob(FILE_NAME)]
    # The parts of several processes are one run.
    runs = [_run(run) for run in sorted({path.parents[1] if path.parent.name == PARTS else path for path in parents})]
    if not runs:
        raise ValueError(f"folder must have runs in it, and {folder} has no {FILE_NAME}, nor has a folder below it")
    return runs


def runs_table(runs: list[Run], folder: str | Path) -> str:
    """The runs as a table of text, with names of folders as seen from one."""
    table = [("run", "experiment", "state", "best in the last tenth of tasks")]
    table += [(str(run.folder.relative_to(folder)), *run[1:]) for run in runs]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    return "\n".join([rows[0], "-" * max(map(len, rows)), *rows[1:]])


def _run(folder: Path) -> Run:
    try:
        results = load_results(folder)
        return Run(folder, results.attrs["experiment"], _state(results, folder), _headline(results))
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
    """Number of finished tasks of all methods and seeds, and number of all tasks."""
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
