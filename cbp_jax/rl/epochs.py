"""Updates on the minibatches of a rollout."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.replacement import replaced_units
from cbp_jax.training import train_step


def run_epochs(
    tx: optax.GradientTransformationExtraArgs,
    loss_fn: Callable[[optax.Params, Any], tuple[chex.Array, tuple[Any, dict[str, chex.Array]]]],
    params: optax.Params,
    opt_state: optax.OptState,
    rollout: Any,
    key: chex.PRNGKey,
    *,
    epochs: int,
    minibatches: int,
) -> tuple[optax.Params, optax.OptState, dict[str, chex.Array]]:
    """Train on a rollout for some epochs, each in a new order of its steps.

    Args:
      tx: the optimizer, which gets `features`.
      loss_fn: maps params and a minibatch to the loss, and the features and further scalars.
      params: the parameters.
      opt_state: the optimizer's state.
      rollout: pytree of arrays [rollout_length, num_envs, ...].
      key: key for the orders.
      epochs: number of epochs.
      minibatches: number of minibatches of an epoch; divides the number of steps.

    Returns:
      params, the optimizer's state, and the means of the scalars over updates, with `replaced_units`, the number of
      units that the updates replaced.
    """
    length, num_envs = jax.tree.leaves(rollout)[0].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(length * num_envs, *x.shape[2:]), rollout)

    def learn(carry, batch):
        step = train_step(tx, lambda params: loss_fn(params, batch), *carry)
        return (step.params, step.opt_state), (step.found, replaced_units(step.opt_state))

    def epoch(carry, key):
        order = jax.random.permutation(key, length * num_envs)
        return jax.lax.scan(learn, carry, jax.tree.map(lambda x: _batches(x[order], minibatches), flat))

    keys = jax.random.split(key, epochs)
    (params, opt_state), (found, replaced) = jax.lax.scan(epoch, (params, opt_state), keys)
    return params, opt_state, jax.tree.map(jnp.mean, found) | {"replaced_units": jnp.sum(replaced)}


def _batches(x: chex.Array, number: int) -> chex.Array:
    return x.reshape(number, -1, *x.shape[1:])
