"""Flax's `TrainState` with features passed to the optimizer."""

import functools
from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's `TrainState` whose `apply_gradients` passes features to the transformation.

    Flax's own class treats every other argument as a field to replace, so features cannot reach `tx.update`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cbp_jax
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)
      >>> units = cbp_jax.discover_units(model.apply, params, x)
      >>> apply = cbp_jax.with_features(model.apply, units)
      >>> state = cbp_jax.TrainState.create(
      ...     apply_fn=apply, params=params, tx=cbp_jax.continual_backprop(cbp_jax.adam(1e-3), units))
      >>> def loss_fn(params):
      ...   output, features = state.apply_fn(params, x)
      ...   return output.mean(), features
      >>> grads, features = jax.grad(loss_fn, has_aux=True)(state.params)
      >>> state = state.apply_gradients(grads=grads, features=features)
      >>> int(state.step), int(state.opt_state.age["params/layers_0"][0])
      (1, 1)
    """

    def apply_gradients(self, *, grads: Any, features: Any = None, **kwargs: Any) -> "TrainState":
        """Update the parameters.

        Args:
          grads: gradients, a tree like the parameters.
          features: what `with_features` returned.
          **kwargs: fields to replace, as in Flax.

        Returns:
          the new state.
        """
        update = functools.partial(optax.with_extra_args_support(self.tx).update, features=features)
        passing = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        return super(TrainState, passing).apply_gradients(grads=grads, **kwargs).replace(tx=self.tx)
