"""A Flax linen network on digits, trained with continual backpropagation by a TrainState."""

import flax.linen as nn
import jax
import optax

import cbp_jax
from cbp_jax import data

norm, dropout = nn.BatchNorm(use_running_average=False), nn.Dropout(0.1, deterministic=False)
net = nn.Sequential([nn.Dense(32), norm, nn.relu, nn.Dense(32), nn.relu, dropout, nn.Dense(10)])


def apply_fn(params, batch_stats, x, key):
    return net.apply({"params": params, "batch_stats": batch_stats}, x, rngs={"dropout": key}, mutable=["batch_stats"])


digits = data.load("digits")
x, y = digits.images[:256].reshape(256, 64) / 16.0, digits.labels[:256]
variables, losses = net.init(jax.random.key(0), x), []
params, batch_stats, key = variables["params"], variables["batch_stats"], jax.random.key(1)
units = cbp_jax.discover_units(apply_fn, params, batch_stats, x, key)
tx = cbp_jax.continual_backprop(cbp_jax.adam(3e-3), units, replacement_rate=1e-2, maturity_threshold=20)
state = cbp_jax.TrainState.create(apply_fn=cbp_jax.with_features(apply_fn, units), params=params, tx=tx)


@jax.jit
def step(state, batch_stats, key):
    def loss_fn(params):
        (logits, new), features = state.apply_fn(params, batch_stats, x, key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (features, new["batch_stats"])

    (loss, (features, new)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, features=features)
    return state, cbp_jax.reset_batch_stats(new, units, state.opt_state.replaced), loss


for number in range(100):
    state, batch_stats, loss = step(state, batch_stats, jax.random.fold_in(key, number))
    losses.append(float(loss))
