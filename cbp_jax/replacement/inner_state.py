"""Resets the state of any optimizer for the weights of replaced units, or of whole layers."""

from collections.abc import Collection, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.units import groups


def reset(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    masks: Mapping[str, chex.Array],
    replaced: Mapping[str, chex.Array] | None = None,
) -> optax.OptState:
    """Reset entries of an optimizer's state to what `inner.init` returns for the new parameters.

    Every copy of the parameters' tree in the state (moments, per-weight counts, accumulated gradients, anchors),
    however deeply nested in chains and wrappers, is reset. So are arrays [units] under the name of a group, which hold
    a value for each unit. Everything else stays.

    Args:
      inner: the optimizer whose state it is.
      state: its state.
      params: the parameters after the replacement.
      masks: for the path of a parameter, a bool array that broadcasts to it: which entries are new.
      replaced: for the name of a group, bool [units]: which units are new.

    Returns:
      the state, of the same structure.
    """

    leaves = groups.leaves_by_path(params)

    def back_to_initial(key_path, leaf, path, initial):
        if path in masks and jnp.shape(leaf) == leaves[path].shape:
            return jnp.where(masks[path], initial, leaf)
        mask = None if path else (replaced or {}).get(_last_key(key_path))
        return leaf if mask is None or mask.shape != jnp.shape(leaf) else jnp.where(mask, initial, leaf)

    paths = _paths_in_state(inner, state, params)
    return jax.tree_util.tree_map_with_path(back_to_initial, state, paths, inner.init(params))


def clear(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    living: Mapping[str, chex.Array],
) -> optax.OptState:
    """Set the entries of an optimizer's state that belong to pruned weights to 0.

    They are found in the same arrays as in `reset`.

    Args:
      inner: the optimizer whose state it is.
      state: its state.
      params: the parameters.
      living: for the path of a parameter, a bool array that broadcasts to it: True for weights that are not pruned.

    Returns:
      the state, of the same structure.
    """
    leaves = groups.leaves_by_path(params)

    def zero(leaf, path):
        if path in living and jnp.shape(leaf) == jnp.shape(leaves[path]):
            return jnp.where(living[path], leaf, jnp.zeros_like(leaf))
        return leaf

    return jax.tree.map(zero, state, _paths_in_state(inner, state, params))


def check(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    paths: Collection[str],
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Raise if a state holds arrays whose entries cannot be assigned to weights.

    Args:
      inner: the optimizer whose state it is.
      state: its state.
      params: the parameters.
      paths: the parameters whose entries will be reset.
      sizes: number of units by name of group.

    Raises:
      ValueError: some array is neither a scalar, nor a random key, nor of its parameter's shape, nor [units] of a
        group. The factored moments of Adafactor are an example.
    """
    leaves = groups.leaves_by_path(params)

    def known(key_path, leaf, path):
        if path in leaves:
            if path not in paths or jnp.shape(leaf) == leaves[path].shape:
                return
        elif jnp.shape(leaf) == ((sizes or {}).get(_last_key(key_path)),):
            return
        elif jnp.ndim(leaf) == 0 or (leaf.dtype == jnp.uint32 and jnp.ndim(leaf) == 1):  # scalar or raw key
            return
        raise ValueError(
            f"the inner optimizer's state holds {jax.tree_util.keystr(key_path)}, an array of shape "
            f"{jnp.shape(leaf)}, that is not of its parameter's shape, so that it is unknown which of its entries "
            "belong to a replaced unit; use another inner optimizer or reset_inner_state=False"
        )

    jax.tree_util.tree_map_with_path(known, state, _paths_in_state(inner, state, params))


def _last_key(key_path: tuple[Any, ...]) -> Any:
    return getattr(key_path[-1], "key", None) if key_path else None


def _paths_in_state(inner: optax.GradientTransformation, state: optax.OptState, params: optax.Params) -> optax.OptState:
    """Return the state's structure with, for each leaf, the path of the parameter that it belongs to, or ""."""
    paths = jax.tree_util.tree_map_with_path(lambda key_path, _: groups.join_path(key_path), params)

    def mark(leaf: Any, path: str) -> Any:
        # A masked parameter has no entry in the state. A parameter's entry may be a tree of its own.
        return leaf if isinstance(leaf, optax.MaskedNode) else jax.tree.map(lambda _: path, leaf)

    try:
        return optax.tree_utils.tree_map_params(
            inner,
            mark,
            state,
            paths,
            transform_non_params=lambda _: "",
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        # A transformation whose `init` needs real params cannot be called with placeholders. There, a leaf of the state
        # belongs to the parameter whose path is the end of the leaf's own path.
        leaves = sorted(groups.leaves_by_path(params), key=len, reverse=True)

        def owner(key_path, leaf):
            place = f"/{groups.join_path(key_path)}"
            return next((path for path in leaves if place.endswith(f"/{path}")), "")

        return jax.tree_util.tree_map_with_path(owner, state)
