"""Stationary ant (Dohare et al., Nature 2024): PPO learns to walk, and collapses though nothing changes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cbp_jax.experiments import slippery_ant, stream
from cbp_jax.experiments.slippery_ant import Settings, check, plot, summary, total

__all__ = ["NAME", "PRESETS", "Settings", "check", "plot", "preset", "run", "summary", "total"]

NAME = "stationary_ant"


def preset(name: str, dataset: str | None = None) -> Settings:
    """The settings of a preset.

    Args:
      name: "smoke" (a minute), "laptop" (five seeds of one learner in a quarter of an hour on 2 cores) or "paper".
      dataset: must be None.

    Returns:
      the settings.

    Raises:
      ValueError: there is no such preset, or a dataset is given.

    Example:
      >>> preset("paper").steps, preset("paper").friction
      (50000000, 1.0)
    """
    return slippery_ant.checked_preset(PRESETS, NAME, name, dataset)


PRESETS: dict[str, Callable[[], Settings]] = {
    "smoke": lambda: dataclasses.replace(slippery_ant.SMOKE, friction=1.0),
    "laptop": lambda: dataclasses.replace(
        slippery_ant.LAPTOP, methods=("adam:step_size=3e-4",), seeds=5, steps=1_024_000, friction=1.0
    ),
    "paper": lambda: dataclasses.replace(slippery_ant.PRESETS["paper"](), steps=50_000_000, friction=1.0),
}


def run(settings: Settings, out: Path, progress: stream.Progress | None = None) -> Any:
    """Trains agents with all methods and all seeds; as `slippery_ant.run`.

    Args:
      settings: what to run.
      out: folder for the results.
      progress: called after each interval.

    Returns:
      the results, an `xarray.Dataset`.

    Raises:
      ValueError: a setting is out of range or unknown, before anything is computed.
      ImportError: Brax is not installed.
    """
    return slippery_ant.run_experiment(NAME, settings, out, progress)
