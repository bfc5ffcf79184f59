"""Training under a mask."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.replacement import inner_state
from cbp_jax.tickets.masks import Mask, check_bool, check_mask, kept
from cbp_jax.units.groups import join_path, leaves_by_path


def masked(inner: optax.GradientTransformation, mask: Mask) -> optax.GradientTransformationExtraArgs:
    r"""Train the living weights of a mask with an inner optimizer, and keep the others at 0.

    With gradient g, weights w, which live where :math:`m = 1`, and the inner optimizer's update u for :math:`m \odot g`
    and :math:`m \odot w`, the update is

    .. math:: m \odot u - (1 - m) \odot w.

    So dead weights are 0 after any number of updates, whatever the optimizer does, such as decay, noise, or fresh
    weights for replaced units. The optimizer's state for dead weights is also set to 0 after each update: moments, step
    counts, anchors, and every other array of the weights' shape. (Other arrays, such as factored moments, are not
    changed.) Living weights are bit for bit those of the inner optimizer in the masked network. Start from
    `apply_mask(params, mask)`.

    `optax.masked` is different: it excludes whole arrays, whose gradients pass unchanged.

    Args:
      inner: the optimizer. Transformations that use all gradients, such as clipping by the global norm, belong inside,
        where gradients of dead weights are 0.
      mask: tree of bool arrays, True where a weight lives, from `full_mask` or `prune`. May be traced, so that a `vmap`
        can run over masks. It may have more arrays than the params, since `optax.masked` may hide some params.

    Returns:
      a transformation that passes extra arguments on to `inner`, and whose state is `inner`'s. Its update needs the
      params.

    Raises:
      ValueError: the mask is not bool; in `init` and `update`, it lacks a parameter or has another shape; in `update`,
        params are missing.

    Example:
      >>> params, mask = jnp.array([1.0, 2.0]), jnp.array([True, False])
      >>> tx = masked(optax.adam(0.5), mask)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...   updates, state = tx.update(2 * params - 3, state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> float(params[1]), float(state[0].mu[1]), float(state[0].nu[1])
      (0.0, 0.0, 0.0)
    """
    check_bool(mask)
    inner = optax.with_extra_args_support(inner)
    living = {path: jnp.asarray(leaf) for path, leaf in leaves_by_path(mask).items()}

    def alive(tree: Any) -> Any:
        """Set dead weights in a tree to 0."""
        return jax.tree_util.tree_map_with_path(lambda path, leaf: kept(living[join_path(path)], leaf), tree)

    def init_fn(params: optax.Params) -> optax.OptState:
        check_mask(mask, params, whole=False)
        params = alive(params)
        return inner_state.clear(inner, inner.init(params), params, living)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("masked needs the params: tx.update(grads, state, params), got params=None")
        check_mask(mask, params, whole=False)
        there = alive(params)
        updates, state = inner.update(alive(updates), state, there, **extra_args)

        def toward_zero(path: Any, update: chex.Array, param: chex.Array) -> chex.Array:
            return jnp.where(living[join_path(path)], update, -param)

        updates = jax.tree_util.tree_map_with_path(toward_zero, updates, params)
        return updates, inner_state.clear(inner, state, there, living)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
