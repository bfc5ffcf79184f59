"""A Haiku network on digits, trained with continual backpropagation."""

import haiku as hk
import jax
import optax

import cbp_jax
from cbp_jax import data


def forward(x):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(32)(x), is_training=True)
    return hk.nets.MLP([32, 10])(jax.nn.relu(x))


net = hk.without_apply_rng(hk.transform_with_state(forward))
digits = data.load("digits")
x, y = digits.images[:256].reshape(256, 64) / 16.0, digits.labels[:256]
params, batch_stats = net.init(jax.random.key(1), x)
units = cbp_jax.discover_units(net.apply, params, batch_stats, x)
apply = cbp_jax.with_features(net.apply, units)
tx = cbp_jax.continual_backprop(cbp_jax.adam(3e-3), units, replacement_rate=1e-2, maturity_threshold=20)


@jax.jit
def step(params, batch_stats, state):
    def loss_fn(params):
        (logits, new), features = apply(params, batch_stats, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (features, new)

    (loss, (features, new)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, features=features)
    new = cbp_jax.reset_batch_stats(new, units, state.replaced)
    return optax.apply_updates(params, updates), new, state, loss


state, losses = tx.init(params), []
for _ in range(100):
    params, batch_stats, state, loss = step(params, batch_stats, state)
    losses.append(float(loss))
