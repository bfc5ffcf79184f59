"""Conditions that stay conditions under `vmap`."""

import chex
import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def anywhere(due: chex.Array) -> chex.Array:
    """Whether something is due; under vmap, whether it is in any row, so that a `cond` on it stays one.

    Args:
      due: bool [].

    Returns:
      bool []. Under `vmap` it is the same for all rows: what the `cond` does has to be chosen by `due` again.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jax.vmap(anywhere)(jnp.array([False, True, False])).tolist()
      [True, True, True]
    """
    return due


@anywhere.def_vmap
def _anywhere_in_batch(axis_size, in_batched, due):
    del axis_size, in_batched
    return anywhere(jnp.any(due)), False  # asks again, for the rows of an outer vmap
