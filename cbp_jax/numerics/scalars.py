"""Checks of arguments: scalar settings, which may be tracers, and trees like the gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_scalar(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise if a setting is not a scalar or, if its value is known while tracing, out of range.

    Args:
      name: the argument's name, for the message.
      value: a number, a scalar array, or a tracer of one.
      at_least: smallest value allowed.
      at_most: largest value allowed.
      below: exclusive upper bound.

    Raises:
      TypeError: `value` is not a real scalar.
      ValueError: `value` is out of range or not a number.

    Example:
      >>> check_scalar("decay_rate", 1.5, at_least=0, below=1)
      Traceback (most recent call last):
      ...
      ValueError: decay_rate must be in [0, 1), got 1.5
    """
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, bool) or np.ndim(value) != 0 or not jnp.issubdtype(np.asarray(value).dtype, np.number):
        raise TypeError(f"{name} must be a scalar, got {value!r}")
    number = float(value)
    if below is not None and number < below:
        number = float(np.float32(number))  # 1 - 1e-9 is 1 in float32
    if (
        np.isnan(number)
        or (at_least is not None and number < at_least)
        or (at_most is not None and number > at_most)
        or (below is not None and number >= below)
    ):
        low = "(-inf" if at_least is None else f"[{at_least:g}"
        high = f"{at_most:g}]" if at_most is not None else f"{below:g})" if below is not None else "inf)"
        raise ValueError(f"{name} must be in {low}, {high}, got {value}")


def check_like(name: str, tree: Any, updates: Any) -> None:
    """Raise if an extra argument of an update does not have the gradients' structure and shapes.

    Args:
      name: the argument's name, for the message.
      tree: the argument, a pytree of arrays.
      updates: the gradients, a pytree of arrays.

    Raises:
      ValueError: they differ.

    Example:
      >>> check_like("hessian_diag", {"w": np.ones(3)}, {"w": np.ones(2)})
      Traceback (most recent call last):
      ...
      ValueError: hessian_diag must be a tree of the gradients' shapes, {'w': '(2,)'}, got {'w': '(3,)'}
    """
    found, wanted = (jax.tree.map(lambda leaf: str(np.shape(leaf)), each) for each in (tree, updates))
    structures: list[Any] = [jax.tree.structure(each) for each in (found, wanted)]
    if structures[0] != structures[1] or jax.tree.leaves(found) != jax.tree.leaves(wanted):
        masked = any(isinstance(leaf, optax.MaskedNode) for leaf in jax.tree.leaves(updates, is_leaf=_is_masked))
        hint = "; pass mask_compatible_extra_args=True to optax.masked or optax.partition" if masked else ""
        raise ValueError(f"{name} must be a tree of the gradients' shapes, {wanted}, got {found}{hint}")


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def check_whole(name: str, value: Any) -> None:
    """Raise if a setting is not a whole number of at least 1. It may be of an integer or a float type, or a tracer.

    Args:
      name: the argument's name, for the message.
      value: as in :func:`check_scalar`.

    Raises:
      TypeError: `value` is not a real scalar.
      ValueError: `value` is below 1 or not whole.

    Example:
      >>> check_whole("every", 1.5)
      Traceback (most recent call last):
      ...
      ValueError: every must be a whole number, got 1.5
    """
    check_scalar(name, value, at_least=1)
    if not isinstance(value, jax.core.Tracer) and float(value) != np.floor(float(value)):
        raise ValueError(f"{name} must be a whole number, got {value}")


def check_static(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise if a setting that shapes or loops depend on, and that cannot be traced, is not an int of at least 1.

    Args:
      name: the argument's name, for the message.
      value: the setting.
      optional: whether it may be None.

    Raises:
      ValueError: it is something else.

    Example:
      >>> check_static("max_resets", 0, optional=True)
      Traceback (most recent call last):
      ...
      ValueError: max_resets must be a positive int or None, got 0
    """
    if not (optional and value is None) and (type(value) is not int or value < 1):
        raise ValueError(f"{name} must be a positive int{' or None' * optional}, got {value!r}")
