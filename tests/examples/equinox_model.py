"""An Equinox network on digits, trained with continual backpropagation."""

import equinox as eqx
import jax
import optax

import cbp_jax
from cbp_jax import data

digits = data.load("digits")
x, y = digits.images[:256].reshape(256, 64) / 16.0, digits.labels[:256]
model = eqx.nn.MLP(64, 10, width_size=32, depth=2, key=jax.random.key(1))
params, static = eqx.partition(model, eqx.is_inexact_array)


def apply_fn(params, x):
    return jax.vmap(eqx.combine(params, static))(x)


units = cbp_jax.discover_units(apply_fn, params, x)
apply = cbp_jax.with_features(apply_fn, units)
tx = cbp_jax.continual_backprop(cbp_jax.adam(3e-3), units, replacement_rate=1e-2, maturity_threshold=20)


@jax.jit
def step(params, state):
    def loss_fn(params):
        logits, features = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), features

    (loss, features), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, features=features)
    return eqx.apply_updates(params, updates), state, loss


state, losses = tx.init(params), []
for _ in range(100):
    params, state, loss = step(params, state)
    losses.append(float(loss))
