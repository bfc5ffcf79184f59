"""Shrink and perturb (Ash & Adams, 2020), at every step."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics import keys, noise
from cbp_jax.numerics.scalars import check_scalar


class ShrinkAndPerturbState(NamedTuple):
    """State of :func:`shrink_and_perturb`."""

    key: chex.Array  # raw uint32 key data, constant
    count: chex.Array  # int32 [], updates so far
    inner_state: optax.OptState


def shrink_and_perturb(
    inner: optax.GradientTransformation,
    shrink: chex.Numeric,
    perturb: chex.Numeric,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink all parameters and add noise to them at every update of an inner optimizer.

    .. math::
        w \leftarrow (1 - s)\,w + u + p\,\xi, \qquad \xi \sim \mathcal{N}(0, 1)

    with u the inner optimizer's update. The weights neither grow without bound nor lose their initial diversity. Ash &
    Adams do it once for each data set. Done at every step, it is the baseline of the Nature paper; with
    momentum or Adam, the decay of its program is a part of the gradient instead, as that of `inner` can be.

    Args:
      inner: the optimizer that trains the network.
      shrink: s, the fraction that a parameter loses at every update, in [0, 1]. May be traced.
      perturb: p, standard deviation of the noise, >= 0. May be traced.
      key: int or jax key for the noise. `init` mixes the params into it (see :func:`keys.init_key`).

    Returns:
      an optax transformation that passes extra arguments on to `inner`. Its state is a `ShrinkAndPerturbState`.

    Raises:
      ValueError: a setting is out of range; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = shrink_and_perturb(optax.sgd(0.5), shrink=0.5, perturb=0.0)
      >>> params = jnp.array([2.0, 4.0])
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> optax.apply_updates(params, updates).round(4).tolist()
      [0.5, 1.5]

    References:
      Ash & Adams, `On warm-starting neural network training <https://arxiv.org/abs/1910.08475>`_, 2020

      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024
    """
    check_scalar("shrink", shrink, at_least=0, at_most=1)
    check_scalar("perturb", perturb, at_least=0)
    key_data, key_impl = keys.as_key_data(key)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> ShrinkAndPerturbState:
        return ShrinkAndPerturbState(
            key=keys.init_key(jax.random.wrap_key_data(key_data, impl=key_impl), params),
            count=jnp.zeros([], jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: ShrinkAndPerturbState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ShrinkAndPerturbState]:
        if params is None:
            raise ValueError("shrink_and_perturb needs the params: tx.update(grads, state, params), got params=None")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        # Scalars as float32, so that a traced setting rounds like a constant one for any dtype of the params.
        s = jnp.asarray(shrink, jnp.float32)
        perturbation = noise.normal(state.key, state.count, params, scale=perturb)
        updates = jax.tree.map(lambda u, w, x: (u + (x - s * w)).astype(u.dtype), updates, params, perturbation)
        return updates, ShrinkAndPerturbState(state.key, optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
