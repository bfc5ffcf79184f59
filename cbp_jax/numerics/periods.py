"""Periodic events: a `cond` that stays a `cond` under `vmap`."""

import functools
from collections.abc import Callable
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp

from cbp_jax.numerics.layout import in_row_major

S = TypeVar("S")
T = TypeVar("T")


def is_due(count: chex.Array, every: chex.Numeric) -> chex.Array:
    """Return whether an update's number is `every`, 2 `every`, ...

    Args:
      count: int32 [], the number of the update, from 1.
      every: the period; may be traced, as a float too.

    Returns:
      bool [].

    Example:
      >>> [bool(is_due(jnp.int32(count), 2.0)) for count in (1, 2, 3, 4)]
      [False, True, False, True]
    """
    return count % jnp.asarray(every).astype(jnp.int32) == 0


def when_due(due: chex.Array, change: Callable[[T], T], values: T) -> T:
    """Apply a function to values when it is due, and otherwise return them unchanged.

    Under `vmap` the function runs only in updates in which it is due for some row. A plain `cond` would run it in all
    updates.

    Args:
      due: bool [].
      change: maps a tree of arrays to one of the same structure, shapes and dtypes.
      values: a tree of arrays.

    Returns:
      a tree like the values.

    Example:
      >>> rows = jax.vmap(lambda due, x: when_due(due, jnp.negative, x))
      >>> rows(jnp.array([True, False]), jnp.array([1.0, 2.0])).tolist()
      [-1.0, 2.0]
    """

    def changed(values):
        return jax.tree.map(functools.partial(jnp.where, due), change(values), values)

    return cond_if_due(due, changed, lambda values: values, values)


def cond_if_due(due: chex.Array, change: Callable[[S], T], keep: Callable[[S], T], values: S) -> T:
    """Return `change(values)` in updates in which a change is due, and otherwise `keep(values)`.

    Under `vmap` all rows are changed if it is due for some row, so `change` must itself leave the other rows as `keep`
    does.

    Args:
      due: bool [].
      change: called with the values when the change is due for some row.
      keep: called otherwise; returns a tree of the same structure, shapes and dtypes.
      values: a tree of arrays. Those that were computed in this update must be in it, so that a CPU stores them as
        parameters are stored (`in_row_major`).

    Returns:
      the result of one of the two functions.

    Example:
      >>> cond_if_due(jnp.bool_(True), jnp.negative, jnp.abs, jnp.array([1.0, -2.0])).tolist()
      [-1.0, 2.0]
    """
    return jax.lax.cond(anywhere(due), change, keep, in_row_major(values))


@jax.custom_batching.custom_vmap
def anywhere(due: chex.Array) -> chex.Array:
    """Return whether an update is due; under `vmap`, whether it is due in any row, so that a `cond` on it stays a
    `cond`."""
    return due


@anywhere.def_vmap
def _anywhere_in_batch(axis_size, in_batched, due):
    del axis_size, in_batched
    return anywhere(jnp.any(due)), False  # bound again, for the rows of an outer vmap
