"""Periodically reinitializes layers or the whole network (Nikishin et al., 2022)."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics import keys
from cbp_jax.numerics.periods import cond_if_due, is_due
from cbp_jax.numerics.scalars import check_whole
from cbp_jax.replacement import inner_state as inner_state_lib
from cbp_jax.units import join_path, leaves_by_path


class PeriodicResetState(NamedTuple):
    """State of :func:`periodic_reset`."""

    key: chex.Array  # raw uint32 key data, constant
    count: chex.Array  # int32 [], updates so far
    inner_state: optax.OptState


def periodic_reset(
    inner: optax.GradientTransformation,
    init: Callable[[chex.PRNGKey], optax.Params],
    *,
    every: chex.Numeric,
    layers: Collection[str] | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Periodically resample parameters, and reset the optimizer's state for them.

    With :math:`w'` the weights after the inner optimizer's update number n,

    .. math::
        w \leftarrow \text{fresh} \;\text{ if } n \operatorname{mod} N = 0 \text{ and } w \text{ is reset, else }\; w'.

    The paper resets the last layers, or all layers, of agents that relearn from their replay buffer. On a stream there
    is no buffer, and what the reset layers knew is lost. That makes it the simplest remedy to compare with.

    A reset is an update like any other, `fresh - param`. Other updates are bit for bit those of `inner`. Running
    statistics of normalization are not parameters, so they are not reset.

    Args:
      inner: the optimizer that trains the network.
      init: a function that returns new parameters for a key, such as `lambda key: net.init(key, x)`.
      every: N, number of updates between resets, a whole number >= 1. May be traced.
      layers: paths of layers or of single parameters, such as "params/Dense_2". By default the whole network.
        `training.output_layers` finds the output layer.
      key: int or jax key for the fresh weights. `init` of the state mixes the params into it, so that vmapped seeds
        differ.

    Returns:
      a transformation that passes extra arguments on to `inner`. Its state is a `PeriodicResetState`, and its update
      needs the params. In `optax.inject_hyperparams` name `init` in `static_args`.

    Raises:
      ValueError: `every` is out of range; in `init`, the params have no such layer, or a parameter is missing in
        `init(key)` or has another shape, or layers are given and the inner state is not understood; in `update`, params
        are missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> fresh = lambda key: {"hidden": jnp.zeros(2), "head": jnp.full(2, 9.0)}
      >>> tx = periodic_reset(optax.sgd(1.0), fresh, every=2, layers=["head"])
      >>> params = {"hidden": jnp.ones(2), "head": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...   updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> params["hidden"].tolist(), params["head"].tolist()
      ([-1.0, -1.0], [9.0, 9.0])

    References:
      Nikishin et al., `The primacy bias in deep reinforcement learning <https://arxiv.org/abs/2205.07802>`_, ICML 2022
    """
    check_whole("every", every)
    layers = None if layers is None else tuple(layers)
    key_data, key_impl = keys.as_key_data(key)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> PeriodicResetState:
        of_reset = _paths(params, layers)
        shapes, fresh = leaves_by_path(params), leaves_by_path(jax.eval_shape(init, jax.random.key(0)))
        for path in of_reset:
            if path not in fresh or fresh[path].shape != jnp.shape(shapes[path]):
                found = fresh[path].shape if path in fresh else "nothing"
                raise ValueError(f"init must give {path!r} in the shape {jnp.shape(shapes[path])}, got {found}")
        inner_state = inner.init(params)
        if layers is not None:
            inner_state_lib.check(inner, inner_state, params, of_reset)
        return PeriodicResetState(
            key=keys.init_key(jax.random.wrap_key_data(key_data, impl=key_impl), params),
            count=jnp.zeros([], jnp.int32),
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates, state: PeriodicResetState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PeriodicResetState]:
        if params is None:
            raise ValueError("periodic_reset needs the params: tx.update(grads, state, params), got params=None")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        due = is_due(count, every)
        of_reset = _paths(params, layers)

        def reset(updates):
            fresh = leaves_by_path(init(jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=key_impl), count)))

            def anew(key_path, update, param):
                path = join_path(key_path)
                if path not in of_reset:
                    return update
                return jnp.where(due, fresh[path].astype(param.dtype) - param, update).astype(update.dtype)

            new_updates = jax.tree_util.tree_map_with_path(anew, updates, params)
            new_params = optax.apply_updates(params, new_updates)
            if layers is None:
                start = inner.init(new_params)
                return new_updates, jax.tree.map(lambda new, old: jnp.where(due, new, old), start, inner_state)
            masks = {path: jnp.broadcast_to(due, jnp.shape(leaf)) for path, leaf in of_reset.items()}
            return new_updates, inner_state_lib.reset(inner, inner_state, new_params, masks)

        updates, inner_state = cond_if_due(due, reset, lambda updates: (updates, inner_state), updates)
        return updates, PeriodicResetState(state.key, count, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _paths(params: optax.Params, layers: Collection[str] | None) -> dict[str, chex.Array]:
    """Return the parameters of layers, by path."""
    leaves = leaves_by_path(params)
    if layers is None:
        return leaves
    within = lambda path, layer: path == layer or path.startswith(f"{layer}/")
    for layer in layers:
        if not any(within(path, layer) for path in leaves):
            raise ValueError(f"the parameters have no layer {layer!r}; they are {sorted(leaves)}")
    return {path: leaf for path, leaf in leaves.items() if any(within(path, layer) for layer in layers)}
