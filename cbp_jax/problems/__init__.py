"""Streams of tasks, made on the device from explicit keys."""

from cbp_jax.problems.permuted import PermutedTask, online_permuted
from cbp_jax.problems.problem import Problem

__all__ = ["PermutedTask", "Problem", "online_permuted"]
