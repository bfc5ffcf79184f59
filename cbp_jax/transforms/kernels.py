"""Which arrays of the params are kernels, and the matrices that they are."""

from collections.abc import Callable

import chex
import jax.numpy as jnp
import optax

from cbp_jax import units as units_lib

# Of an array's path and the array, whether it is chosen.
Kernels = Callable[[str, chex.Array], bool]


def chosen_kernels(params: optax.Params, kernels: Kernels | None = None) -> dict[str, chex.Array]:
    """The kernels by path.

    Args:
      params: pytree of arrays.
      kernels: a function of path and array; by default all arrays of two or more axes are chosen.

    Returns:
      the chosen arrays by path, in the tree's order.

    Raises:
      ValueError: none is chosen, or an array of fewer than two axes.

    Example:
      >>> params = {"layer": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
      >>> list(chosen_kernels(params))
      ['layer/kernel']
    """
    leaves = units_lib.leaves_by_path(params)
    if kernels is None:
        chosen = {path: leaf for path, leaf in leaves.items() if jnp.ndim(leaf) >= 2}
    else:
        chosen = {path: leaf for path, leaf in leaves.items() if kernels(path, leaf)}
    for path, leaf in chosen.items():
        if jnp.ndim(leaf) < 2:
            raise ValueError(f"kernels must choose arrays of two or more axes, got {path!r} of shape {jnp.shape(leaf)}")
    if not chosen:
        raise ValueError(f"kernels must choose an array of two or more axes, got none of {list(leaves)}")
    return chosen


def as_matrix(kernel: chex.Array) -> chex.Array:
    """The kernel as a matrix [outputs, inputs]: its last axis by all others.

    >>> as_matrix(jnp.zeros((3, 3, 2, 5))).shape
    (5, 18)
    """
    return kernel.reshape(-1, kernel.shape[-1]).T
