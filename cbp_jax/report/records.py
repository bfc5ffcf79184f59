"""Provenance of results: the device, the command, the commit, and the time of each method."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    import xarray as xr

_PACKAGE = Path(__file__).parents[1]


def origin() -> dict[str, str]:
    """Return the provenance of results made in this process, as attributes.

    Returns:
      ``device``, such as "cpu x 2"; ``command``, the command line of the process; and ``commit``, the commit of the
      package's checkout, followed by " with changes" if files differ from it, or "" if the package is not in a checkout
      or git is not available.
    """
    devices = jax.local_devices()
    several = f" x {len(devices)}" if len(devices) > 1 else ""
    return {"device": devices[0].device_kind + several, "command": _command(), "commit": commit_of(_PACKAGE)}


def _command() -> str:
    if not sys.argv:
        return ""
    program = Path(sys.argv[0])
    name = "cbp-jax" if program == _PACKAGE / "__main__.py" else program.name  # of `python -m cbp_jax`
    return shlex.join([name, *sys.argv[1:]])


@functools.cache
def commit_of(folder: Path) -> str:
    """Return the git commit of a folder in a checkout.

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
        git("ls-files", "--error-unmatch", "__init__.py")  # fails in an environment inside another project's checkout
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def resume(results: xr.Dataset) -> None:
    """Record, in place, that a run is resumed, if the command, device or commit has changed.

    Args:
      results: results of the run, as found in its folder. Their attribute ``resumed`` gets an entry.
    """
    now = origin()
    entries = json.loads(results.attrs.get("resumed", "[]"))
    last = entries[-1] if entries else {name: results.attrs.get(name) for name in now}
    if last != now:
        results.attrs["resumed"] = json.dumps([*entries, now])


def stopwatch(results: xr.Dataset, methods: Sequence[str]) -> Callable[[], None]:
    """Start to measure the time of methods that run together, and record if their run is resumed.

    Args:
      results: results of the run.
      methods: labels of the methods.

    Returns:
      a function that adds to the methods' seconds, in place, the time since the start or its last call.
    """
    resume(results)
    since = time.monotonic()

    def lap() -> None:
        nonlocal since
        now = time.monotonic()
        add_seconds(results, methods, now - since)
        since = now

    return lap


def add_seconds(results: xr.Dataset, methods: Sequence[str], seconds: float) -> None:
    """Add to the time of methods, in place. Methods that run together get equal shares.

    Args:
      results: results whose attribute ``seconds``, JSON, has the time of each method.
      methods: labels of the methods that ran together.
      seconds: their total time.
    """
    kept = seconds_of(results)
    kept |= {method: kept.get(method, 0.0) + seconds / len(methods) for method in methods}
    results.attrs["seconds"] = json.dumps(kept)


def seconds_of(results: xr.Dataset) -> dict[str, float]:
    """Return the time of each method, in seconds of the process, including compilation; empty if unknown."""
    return json.loads(results.attrs.get("seconds", "{}"))


def duration(seconds: float) -> str:
    """Return a time with its two largest units.

    Example:
      >>> [duration(seconds) for seconds in (0.00123, 4.56, 59.9, 3601, 9e4, 1e6)]
      ['0.0012 s', '4.6 s', '1 min', '1 h', '1 day 1 h', '11 days 13 h']
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    left, parts = round(seconds), []
    units = {"day" if left < 2 * 86400 else "days": 86400, "h": 3600, "min": 60, "s": 1}
    for name, size in units.items():
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {name}" if count else "")
    return " ".join(part for part in parts[:2] if part)
