"""Keeps computed arrays in the memory order of parameters."""

from typing import Any

import chex
import jax
from jax.experimental.layout import Layout, with_layout_constraint


def in_row_major(tree: Any) -> Any:
    """Ask the compiler for a CPU to store arrays in row-major order, as parameters are; their values stay.

    XLA computes the gradient of a kernel at batch size 1 in column-major order. That costs nothing as long as it is
    computed together with the update that uses it. But what enters a `cond` is stored, and then transposed for the
    update, which takes longer than all the rest of the step. Nothing is asked outside of compiled programs.

    Args:
      tree: pytree of arrays.

    Returns:
      the tree.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.jit(in_row_major)({"w": jnp.arange(4.0).reshape(2, 2)})["w"].tolist()
      [[0.0, 1.0], [2.0, 3.0]]
    """
    if jax.default_backend() != "cpu":
        return tree

    def ask(array: chex.Array) -> chex.Array:
        if not isinstance(array, jax.core.Tracer) or array.ndim < 2:
            return array
        return with_layout_constraint(array, Layout(tuple(range(array.ndim))))

    return jax.tree.map(ask, tree)
