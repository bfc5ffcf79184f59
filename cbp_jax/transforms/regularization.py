"""Penalties on the weights, as gradients. L2 toward zero is `optax.add_decayed_weights`."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics.scalars import check_scalar


def add_l1(strength: chex.Numeric) -> optax.GradientTransformation:
    r"""Adds the gradient of an L1 penalty, :math:`g \leftarrow g + \lambda\,\mathrm{sign}(w)`.

    Args:
      strength: :math:`\lambda`, the penalty's factor in the loss, >= 0. May be traced.

    Returns:
      an optax transformation to chain before an optimizer. Its update needs the params.

    Raises:
      ValueError: the strength is negative; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(add_l1(0.25), optax.sgd(1.0))
      >>> params = jnp.array([2.0, 0.0, -3.0])
      >>> updates, _ = tx.update(jnp.zeros(3), tx.init(params), params)
      >>> updates.tolist()
      [-0.25, -0.0, 0.25]
    """
    check_scalar("strength", strength, at_least=0)

    def update_fn(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        _check_params("add_l1", params)
        return jax.tree.map(lambda g, w: (g + strength * jnp.sign(w)).astype(g.dtype), updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


class AddL2InitState(NamedTuple):
    """State of :func:`add_l2_init`."""

    initial: optax.Params  # the params at init, same shapes and dtypes


def add_l2_init(strength: chex.Numeric) -> optax.GradientTransformation:
    r"""Adds the gradient of an L2 penalty toward the initial weights, :math:`g \leftarrow g + \lambda (w - w_0)`.

    :math:`w_0` are the params given to `init`. Where a wrapper resets a unit's part of this state,
    as `continual_backprop` does, that part of :math:`w_0` becomes the unit's new initial weights.

    Args:
      strength: :math:`\lambda`, for a penalty of :math:`\frac{\lambda}{2} \lVert w - w_0 \rVert^2`, >= 0. May be
        traced.

    Returns:
      an optax transformation, as :func:`add_l1`, which says what it raises.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(add_l2_init(0.5), optax.sgd(1.0))
      >>> state = tx.init(jnp.array([2.0, 1.0]))
      >>> updates, state = tx.update(jnp.zeros(2), state, jnp.array([4.0, 1.0]))
      >>> updates.tolist()
      [-1.0, -0.0]

    References:
      Kumar et al., `Maintaining plasticity in continual learning via regenerative regularization
      <https://arxiv.org/abs/2308.11958>`_, 2023
    """
    check_scalar("strength", strength, at_least=0)

    def init_fn(params: optax.Params) -> AddL2InitState:
        # Copies, so that params and state can both be donated to a jitted step.
        return AddL2InitState(initial=jax.tree.map(lambda w: jnp.array(w, copy=True), params))

    def update_fn(
        updates: optax.Updates, state: AddL2InitState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AddL2InitState]:
        _check_params("add_l2_init", params)
        pull = lambda g, w, w0: (g + strength * (w - w0)).astype(g.dtype)
        return jax.tree.map(pull, updates, params, state.initial), state

    return optax.GradientTransformation(init_fn, update_fn)


def _check_params(name: str, params: optax.Params | None) -> None:
    if params is None:
        raise ValueError(f"{name} needs the params: tx.update(grads, state, params), got params=None")
