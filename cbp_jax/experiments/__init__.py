"""Experiments by name: each is one file with a dataclass of settings, presets and a function."""

from collections.abc import Callable
from types import ModuleType

from cbp_jax.experiments import online_permuted

EXPERIMENTS: dict[str, ModuleType] = {module.NAME: module for module in (online_permuted,)}

Progress = Callable[[str, int, dict[str, float]], None]

__all__ = ["EXPERIMENTS", "Progress"]
