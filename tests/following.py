"""Runs a transformation that resets units, together with a float64 NumPy reference that says which units to reset."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from reference import Conv

import cbp_jax


class Net(nn.Module):
    """A feed-forward network with the layers of `reference`."""

    layers: tuple

    @nn.compact
    def __call__(self, x):
        for number, layer in enumerate(self.layers):
            name = f"layer{number}"
            if isinstance(layer, Conv):
                x = nn.Conv(layer.features, (layer.kernel,) * 2, padding=layer.padding, name=name)(x)
            else:
                x = nn.Dense(layer.features, name=name)(x.reshape(x.shape[0], -1))
            x = nn.relu(x) if layer.activation else x
            if isinstance(layer, Conv) and layer.pool > 1:
                x = nn.max_pool(x, (layer.pool,) * 2, (layer.pool,) * 2)
        return x


def pairs(tree):
    """Return kernels and biases of the layers, in order."""
    return [(layer["kernel"], layer["bias"]) for _, layer in sorted(tree["params"].items())]


class Resetting:
    """Training with resets in float64; fresh weights are copied from the tested run.

    `select(count, k, h, kernel_gradient)` says which units of hidden layer k are reset in update number `count`, with
    their activations [..., units] on the batch and the gradient of the kernel that writes them.
    """

    def __init__(self, layers, params, optimizer, select):
        self.layers, self.optimizer, self.select, self.count = layers, optimizer, select, 0
        self.params = [[np.array(leaf, np.float64) for leaf in pair] for pair in params]
        optimizer.init(self.params)

    def rows(self, k, mask):
        """Return the entries of kernel k + 1 that read units of layer k; units vary fastest along its input axes."""
        kernel = self.params[k + 1][0]
        inputs = np.tile(mask, kernel.shape[-2] // mask.size)
        return np.broadcast_to(inputs[:, None], kernel.shape)

    def step(self, x, labels, arrived):
        logits, tape = reference.forward(self.layers, self.params, x)
        grads = reference.backward(self.layers, self.params, tape, reference.cross_entropy_gradient(logits, labels))
        for pair, steps in zip(self.params, self.optimizer.updates(grads), strict=True):
            pair[0] += steps[0]
            pair[1] += steps[1]
        self.count += 1
        masks = [self.select(self.count, k, tape[k]["h"], grads[k][0]) for k in range(len(self.layers) - 1)]
        for k, mask in enumerate(masks):
            self.params[k][1][mask] = 0.0
            self.params[k + 1][0][self.rows(k, mask)] = 0.0
            self.optimizer.reset(k, 0, (..., mask))
            self.optimizer.reset(k, 1, mask)
            self.optimizer.reset(k + 1, 0, self.rows(k, mask))
        for k, mask in enumerate(masks):  # after the outgoing weights: weights between two new units are fresh
            self.params[k][0][..., mask] = arrived[k][0][..., mask]
        return masks


def follow(layers, input_shape, make, optimizer, select, *, steps, batch, seed):
    """Train with a transformation and with the reference, and assert that they agree in every update.

    Args:
      layers: of `reference`.
      input_shape: of one example.
      make: a function from the units of the network to the transformation.
      optimizer: the reference's optimizer.
      select: see `Resetting`.
      steps, batch, seed: of the data, which are random.

    Returns:
      the total number of reset units.
    """
    model, rng = Net(layers), np.random.default_rng(seed)
    xs = rng.normal(size=(steps, batch, *input_shape)).astype(np.float32)
    labels = rng.integers(layers[-1].features, size=(steps, batch))
    draw = lambda leaf: jnp.asarray(rng.uniform(-0.5, 0.5, leaf.shape), jnp.float32)
    params = jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), xs[0]))
    units = cbp_jax.discover_units(model.apply, params, xs[0])
    apply = cbp_jax.with_features(model.apply, units)
    tx = make(units)

    def loss(params, x, y):
        logits, features = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), features

    def step(carry, batch):
        params, state = carry
        grads, features = jax.grad(loss, has_aux=True)(params, *batch)
        updates, state = tx.update(grads, state, params, features=features)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state.replaced)

    _, history = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), (xs, labels)))(params)
    after, replaced = jax.device_get(history)
    expected, total = Resetting(layers, jax.device_get(pairs(params)), optimizer, select), 0
    for t in range(steps):
        before = [pair[0].copy() for pair in expected.params]
        arrived = [(kernel[t], bias[t]) for kernel, bias in pairs(after)]
        for k, mask in enumerate(expected.step(xs[t], labels[t], arrived)):
            np.testing.assert_array_equal(replaced[f"params/layer{k}"][t], mask, err_msg=f"step {t}, layer {k}")
            fresh = arrived[k][0][..., mask]
            assert np.abs(fresh).max(initial=0) <= np.sqrt(6 / np.prod(fresh.shape[:-1])) * (1 + 1e-5)
            assert (fresh != before[k][..., mask].astype(np.float32)).all()
            total += mask.sum()
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5, err_msg=f"step {t}"),
            arrived,
            [tuple(pair) for pair in expected.params],
        )
    return total


def follow_edits(tx, optimizer, edit, *, steps=40, seed=0):
    """Train a small network with a transformation, and in float64 with an edit of the weights after each update.

    Args:
      tx: the transformation.
      optimizer: the reference's optimizer.
      edit: a function of the number of the update, the weights [[kernel, bias], ...], which it changes, and gradients.
      steps, seed: of the data, which are random.
    """
    layers, rng = (reference.Dense(6, "tanh"), reference.Dense(3)), np.random.default_rng(seed)
    xs, labels = rng.normal(size=(steps, 5, 4)).astype(np.float32), rng.integers(3, size=(steps, 5))
    params = {
        f"layer{k}": {"kernel": rng.normal(size=shape), "bias": 0.1 * rng.normal(size=shape[1])}
        for k, shape in enumerate([(4, 6), (6, 3)])
    }
    params = jax.tree.map(np.float32, params)

    def loss(params, x, y):
        h = jnp.tanh(x @ params["layer0"]["kernel"] + params["layer0"]["bias"])
        logits = h @ params["layer1"]["kernel"] + params["layer1"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    _, history = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), (xs, labels)))(params)
    weights = [[leaf.astype(np.float64) for leaf in pair] for pair in pairs({"params": params})]
    optimizer.init(weights)
    for t in range(steps):
        logits, tape = reference.forward(layers, weights, xs[t])
        grads = reference.backward(layers, weights, tape, reference.cross_entropy_gradient(logits, labels[t]))
        for pair, changes in zip(weights, optimizer.updates(grads), strict=True):
            pair[0] += changes[0]
            pair[1] += changes[1]
        edit(t + 1, weights, grads)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5, err_msg=f"step {t}"),
            [(kernel[t], bias[t]) for kernel, bias in pairs({"params": history})],
            [tuple(pair) for pair in weights],
        )
