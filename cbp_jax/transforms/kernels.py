"""Kernels in the params: how to choose them, view them as matrices, and edit them."""

from collections.abc import Callable, Iterable

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import units as units_lib
from cbp_jax.numerics.periods import when_due

# (path, array) -> whether the array is chosen.
Kernels = Callable[[str, chex.Array], bool]


def chosen_kernels(params: optax.Params, kernels: Kernels | None = None) -> dict[str, chex.Array]:
    """Return the kernels by path.

    Args:
      params: pytree of arrays.
      kernels: a function of path and array. By default all arrays of two or more axes are chosen.

    Returns:
      the chosen arrays by path, in the tree's order.

    Raises:
      ValueError: no array is chosen, or one of fewer than two axes.

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
    """Return the kernel as a matrix [outputs, inputs]: its last axis by all others.

    >>> as_matrix(jnp.zeros((3, 3, 2, 5))).shape
    (5, 18)
    """
    return kernel.reshape(-1, kernel.shape[-1]).T


def edit_after(
    due: chex.Array,
    edit: Callable[[dict[str, chex.Array]], dict[str, chex.Array]],
    params: optax.Params,
    updates: optax.Updates,
    paths: Iterable[str],
) -> optax.Updates:
    """Change updates so that, when due, a function is applied to the updated parameters.

    Args:
      due: bool [], see `when_due`.
      edit: takes arrays by path, the parameters after the updates in float32 at least, and returns arrays of the same
        shapes.
      params: parameters before the updates.
      updates: updates of an optimizer.
      paths: paths of the parameters to edit.

    Returns:
      the updates, in the params' precision where they are edited, and otherwise as they are.

    Example:
      >>> halve = lambda after: {path: w / 2 for path, w in after.items()}
      >>> params, updates = {"w": jnp.array([4.0]), "b": jnp.array([4.0])}, {"w": jnp.ones(1), "b": jnp.ones(1)}
      >>> edited = edit_after(jnp.array(True), halve, params, updates, ["w"])
      >>> edited["w"].tolist(), edited["b"].tolist()
      ([-1.5], [1.0])
    """
    before, given = units_lib.leaves_by_path(params), units_lib.leaves_by_path(updates)
    given = {path: given[path].astype(jnp.promote_types(given[path].dtype, before[path].dtype)) for path in paths}

    def edited(given):
        after = {path: wide(before[path] + update) for path, update in given.items()}
        return {path: (w - wide(before[path])).astype(given[path].dtype) for path, w in edit(after).items()}

    given = when_due(due, edited, given)
    return jax.tree_util.tree_map_with_path(lambda path, u: given.get(units_lib.join_path(path), u), updates)


def wide(array: chex.Array) -> chex.Array:
    """Return the array in float32 at least."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
