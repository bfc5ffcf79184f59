"""A Flax linen network on digits, trained with continual backpropagation by a TrainState."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import cbp_jax
from cbp_jax import data


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x)))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(32)(x))))


class State(cbp_jax.TrainState):
    batch_stats: dict


def apply_fn(params, batch_stats, x, key):
    variables, rngs = {"params": params, "batch_stats": batch_stats}, {"dropout": key}
    return Net().apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])


digits = data.load("digits")
x, y = jnp.asarray(digits.images[:256].reshape(256, 64) / 16), jnp.asarray(digits.labels[:256])
key = jax.random.key(1)
variables = Net().init(key, x, train=False)
units = cbp_jax.discover_units(apply_fn, variables["params"], variables["batch_stats"], x, key)
tx = cbp_jax.continual_backprop(cbp_jax.adam(3e-3), units, replacement_rate=1e-2, maturity_threshold=20)
state = State.create(apply_fn=cbp_jax.with_features(apply_fn, units), tx=tx, **variables)


@jax.jit
def step(state, key):
    def loss_fn(params):
        (logits, new), features = state.apply_fn(params, state.batch_stats, x, key)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, (features, new["batch_stats"])

    (loss, (features, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, features=features)
    return state.replace(batch_stats=cbp_jax.reset_batch_stats(stats, units, state.opt_state.replaced)), loss


losses = []
for number in range(100):
    state, loss = step(state, jax.random.fold_in(key, number))
    losses.append(float(loss))
