"""Hare and tortoise (Lee et al., 2024): periodically resets the weights to their own running mean."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import units as units_lib
from cbp_jax.numerics.periods import is_due
from cbp_jax.numerics.scalars import check_scalar, check_whole
from cbp_jax.transforms.kernels import edit_after, wide


class HareAndTortoiseState(NamedTuple):
    """State of :func:`hare_and_tortoise`."""

    count: chex.Array  # int32 [], updates so far
    tortoise: optax.Params  # running mean of the params, in float32 at least
    inner_state: optax.OptState


def hare_and_tortoise(
    inner: optax.GradientTransformation, *, decay: chex.Numeric = 0.999, every: chex.Numeric = 1000
) -> optax.GradientTransformationExtraArgs:
    r"""Reset the weights to their running mean periodically.

    The hare, w, is trained by an inner optimizer. The tortoise, s, starts at the same weights and follows slowly. Every
    n updates the hare is reset to the tortoise:

    .. math::
        w \leftarrow w + u, \qquad s \leftarrow d\,s + (1 - d)\,w, \qquad
        w \leftarrow s \text{ at updates } n, 2n, \dots

    with u the inner optimizer's update. All parameters take part. As in the authors' program, the inner optimizer's
    state is not reset. The authors evaluate both the hare and the tortoise, `state.tortoise`.

    Args:
      inner: the optimizer that trains the network.
      decay: d, in [0, 1]. May be traced. With 1 the hare returns to the initial weights, with 0 nothing happens.
      every: n, number of updates between resets, a whole number >= 1. May be traced. With the length of a task, the
        weights are reset at each task's end. (The authors reset every 10 epochs.)

    Returns:
      an optax transformation that passes extra arguments on to `inner`. Its state is a `HareAndTortoiseState`.

    Raises:
      ValueError: a setting is out of range; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax, cbp_jax
      >>> tx = cbp_jax.hare_and_tortoise(optax.sgd(1.0), decay=0.75, every=2)
      >>> w = jnp.array([0.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...   updates, state = tx.update(jnp.array([-1.0]), state, w)
      ...   w = optax.apply_updates(w, updates)
      ...   print(w.tolist(), state.tortoise.tolist())
      [1.0] [0.25]
      [0.6875] [0.6875]

    References:
      Lee et al., `Slow and steady wins the race: maintaining plasticity with hare and tortoise networks
      <https://arxiv.org/abs/2406.02596>`_, ICML 2024
    """
    check_scalar("decay", decay, at_least=0, at_most=1)
    check_whole("every", every)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> HareAndTortoiseState:
        tortoise = jax.tree.map(lambda w: jnp.array(wide(w), copy=True), params)
        return HareAndTortoiseState(jnp.zeros([], jnp.int32), tortoise, inner.init(params))

    def update_fn(
        updates: optax.Updates, state: HareAndTortoiseState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, HareAndTortoiseState]:
        if params is None:
            raise ValueError("hare_and_tortoise needs the params: tx.update(grads, state, params), got params=None")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        d = jnp.asarray(decay, jnp.float32)
        follow = lambda s, w, u: (s + (1 - d) * (wide((w + u).astype(w.dtype)) - s)).astype(s.dtype)
        tortoise = jax.tree.map(follow, state.tortoise, params, updates)
        slow = units_lib.leaves_by_path(tortoise)
        updates = edit_after(
            is_due(count, every), lambda hare: {path: slow[path] for path in hare}, params, updates, slow
        )
        return updates, HareAndTortoiseState(count, tortoise, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
