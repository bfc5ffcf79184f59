"""A Flax NNX network on digits, trained with continual backpropagation by `nnx.Optimizer`."""

import optax
from flax import nnx

import cbp_jax
from cbp_jax import data

digits = data.load("digits")
x, y = digits.images[:256].reshape(256, 64) / 16.0, digits.labels[:256]
rngs = nnx.Rngs(0)
first = nnx.Linear(64, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs), nnx.relu
second = nnx.Linear(32, 32, rngs=rngs), nnx.relu, nnx.Dropout(0.1, rngs=rngs)
model = nnx.Sequential(*first, *second, nnx.Linear(32, 10, rngs=rngs))
units = cbp_jax.discover_units(model, x)
apply = cbp_jax.with_features(lambda model, x: model(x), units)
tx = cbp_jax.continual_backprop(cbp_jax.adam(3e-3), units, replacement_rate=1e-2, maturity_threshold=20)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    def loss_fn(model):
        logits, features = apply(model, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), features

    (loss, features), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, features=features)
    replaced = nnx.as_pure(optimizer.opt_state).replaced
    nnx.update(model, cbp_jax.reset_batch_stats(nnx.state(model, nnx.BatchStat), units, replaced))
    return loss


losses = [float(step(model, optimizer)) for _ in range(100)]
state = nnx.as_pure(optimizer.opt_state)
