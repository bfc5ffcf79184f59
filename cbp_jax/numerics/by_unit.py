"""Reductions of arrays [..., units] to numbers [units]."""

import chex
import jax.numpy as jnp


def all_but_units(array: chex.Array) -> tuple[int, ...]:
    """Return the axes of an array [..., units] before the last: examples, positions, or inputs of a kernel."""
    return tuple(range(array.ndim - 1))


def mean_abs(array: chex.Array) -> chex.Array:
    """Mean absolute value of each unit of an array [..., units], float32 [units].

    Example:
      >>> mean_abs(jnp.array([[1.0, -2.0], [3.0, 0.0]])).tolist()
      [2.0, 1.0]
    """
    return jnp.mean(jnp.abs(array.astype(jnp.float32)), axis=all_but_units(array))


def relative(sizes: chex.Array) -> chex.Array:
    """Sizes of units, divided by the mean over the units; all 0 if the mean is 0, [units].

    Example:
      >>> relative(jnp.array([1.0, 3.0])).tolist(), relative(jnp.zeros(2)).tolist()
      ([0.5, 1.5], [0.0, 0.0])
    """
    mean = jnp.mean(sizes)
    return sizes / jnp.where(mean == 0, 1.0, mean)
