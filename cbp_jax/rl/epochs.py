"""Updates on the minibatches of a rollout."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.replacement import replaced_units
from cbp_jax.rl.settings import Rollout
from cbp_jax.training import train_step


def run_epochs(
    settings: Rollout,
    tx: optax.GradientTransformationExtraArgs,
    loss_fn: Callable[[optax.Params, Any], tuple[chex.Array, tuple[Any, dict[str, chex.Array]]]],
    params: optax.Params,
    opt_state: optax.OptState,
    rollout: Any,
    key: chex.PRNGKey,
) -> tuple[optax.Params, optax.OptState, dict[str, chex.Array]]:
    """Train on a rollout for some epochs, each in a new order of its steps.

    Args:
      settings: numbers of environments, steps, epochs and minibatches.
      tx: the optimizer, which gets `features`.
      loss_fn: maps params and a minibatch to the loss, and the features and further scalars.
      params: the parameters.
      opt_state: the optimizer's state.
      rollout: pytree of arrays [rollout_length, num_envs, ...].
      key: key for the orders.

    Returns:
      params, the optimizer's state, and the means of the scalars over updates, with `replaced_units`, the number of
      units that the updates replaced.
    """
    flat = jax.tree.map(lambda x: x.reshape(settings.steps, *x.shape[2:]), rollout)

    def learn(carry, batch):
        step = train_step(tx, lambda params: loss_fn(params, batch), *carry)
        return (step.params, step.opt_state), (step.found, replaced_units(step.opt_state))

    def epoch(carry, key):
        order = jax.random.permutation(key, settings.steps)
        batches = jax.tree.map(lambda x: x[order].reshape(settings.minibatches, -1, *x.shape[1:]), flat)
        return jax.lax.scan(learn, carry, batches)

    keys = jax.random.split(key, settings.epochs)
    (params, opt_state), (found, replaced) = jax.lax.scan(epoch, (params, opt_state), keys)
    return params, opt_state, jax.tree.map(jnp.mean, found) | {"replaced_units": jnp.sum(replaced)}
