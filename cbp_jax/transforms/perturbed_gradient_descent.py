"""Perturbed gradient descent: adds noise to every gradient. With weight decay it is a form of shrink and perturb."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics import keys, noise
from cbp_jax.numerics.scalars import check_scalar


class AddNoiseState(NamedTuple):
    """State of :func:`add_noise`."""

    key: chex.Array  # raw uint32 key data, constant
    count: chex.Array  # int32 [], updates so far


def add_noise(sigma: chex.Numeric, key: jax.typing.ArrayLike = 0) -> optax.GradientTransformation:
    r"""Add normal noise to the gradients, :math:`g \leftarrow g + \xi`, :math:`\xi \sim \mathcal{N}(0, \sigma^2)`.

    In `optax.add_noise`, by contrast, the variance decreases over steps, and vmapped seeds share the key.

    Args:
      sigma: standard deviation of the noise, >= 0. May be traced.
      key: int or jax key for the noise. `init` mixes the params into it (see :func:`keys.init_key`).

    Returns:
      an optax transformation to chain before an optimizer. Its state is an `AddNoiseState`.

    Raises:
      ValueError: sigma is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = add_noise(0.1)
      >>> updates, state = tx.update(jnp.ones(10_000), tx.init(jnp.zeros(10_000)))
      >>> round(float(updates.mean()), 2), round(float(updates.std()), 2), int(state.count)
      (1.0, 0.1, 1)
    """
    check_scalar("sigma", sigma, at_least=0)
    key_data, key_impl = keys.as_key_data(key)

    def init_fn(params: optax.Params) -> AddNoiseState:
        return AddNoiseState(
            key=keys.init_key(jax.random.wrap_key_data(key_data, impl=key_impl), params),
            count=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates, state: AddNoiseState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AddNoiseState]:
        del params
        perturbation = noise.normal(state.key, state.count, updates, scale=sigma)
        updates = jax.tree.map(lambda g, x: (g + x).astype(g.dtype), updates, perturbation)
        return updates, AddNoiseState(state.key, optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


def perturbed_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    sigma: chex.Numeric = 1e-3,
    *,
    weight_decay: chex.Numeric = 0.0,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Create SGD with normal noise in the gradient.

    .. math::
        w \leftarrow (1 - \eta \lambda)\,w - \eta\,(g + \xi), \qquad \xi \sim \mathcal{N}(0, \sigma^2)

    This is UPGD without gates. Without decay it is the baseline called PGD in the UPGD paper, and with decay the one
    called shrink and perturb. In :func:`shrink_and_perturb`, neither shrinking nor noise scales with the learning rate.

    Args:
      learning_rate: :math:`\eta`: a number, a tracer, or an optax schedule.
      sigma: :math:`\sigma`, standard deviation of the noise, >= 0. May be traced.
      weight_decay: :math:`\lambda`, >= 0. May be traced.
      key: int or jax key for the noise. `init` mixes the params into it (see :func:`keys.init_key`).

    Returns:
      an optax transformation, the chain of :func:`add_noise`, `optax.add_decayed_weights` and
      `optax.scale_by_learning_rate`. Its update needs the params.

    Raises:
      ValueError: a setting is out of range; in `update`, params are missing where there is decay.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = perturbed_gradient_descent(0.5, sigma=0.0, weight_decay=0.5)
      >>> params = jnp.array([2.0, 4.0])
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [1.0, 2.5]

    References:
      Zhou et al., `Toward understanding the importance of noise in training neural networks
      <https://arxiv.org/abs/1909.03172>`_, 2019

      Ash & Adams, `On warm-starting neural network training <https://arxiv.org/abs/1910.08475>`_, 2020

      Elsayed & Mahmood, `Addressing loss of plasticity and catastrophic forgetting in continual learning
      <https://arxiv.org/abs/2404.00781>`_, ICLR 2024
    """
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate)
    check_scalar("weight_decay", weight_decay, at_least=0)
    return optax.chain(
        add_noise(sigma, key),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
