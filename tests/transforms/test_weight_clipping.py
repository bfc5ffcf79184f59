"""clip_weights against float64 NumPy, the exactness of its bounds, and their computation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import cbp_jax
from cbp_jax.transforms.weight_clipping import kernel_scale

LAYERS = (reference.Dense(6, "tanh"), reference.Dense(3))
STEPS = 60


@pytest.mark.parametrize("bound", [0.5, 1.0])
def test_follows_the_numpy_reference(bound):
    rng = np.random.default_rng(0)
    xs, labels = rng.normal(size=(STEPS, 5, 4)).astype(np.float32), rng.integers(3, size=(STEPS, 5))
    params = {
        f"layer{k}": {"kernel": rng.normal(size=shape), "bias": 0.1 * rng.normal(size=shape[1])}
        for k, shape in enumerate([(4, 6), (6, 3)])
    }
    params = jax.tree.map(np.float32, params)
    tx = cbp_jax.clip_weights(optax.sgd(0.2, momentum=0.9), bound)

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

    layers = [params["layer0"], params["layer1"]]
    weights = [[layer["kernel"].astype(np.float64), layer["bias"].astype(np.float64)] for layer in layers]
    traces = [[np.zeros_like(leaf) for leaf in pair] for pair in weights]
    clipped = 0
    for t in range(STEPS):
        logits, tape = reference.forward(LAYERS, weights, xs[t])
        grads = reference.backward(LAYERS, weights, tape, reference.cross_entropy_gradient(logits, labels[t]))
        for k in range(2):
            largest = bound / np.sqrt([4, 6][k])
            for i in range(2):
                traces[k][i] = 0.9 * traces[k][i] + grads[k][i]
                moved = weights[k][i] - 0.2 * traces[k][i]
                weights[k][i] = np.clip(moved, -largest, largest)
                clipped += (weights[k][i] != moved).sum()
                actual = history[f"layer{k}"][["kernel", "bias"][i]][t]
                np.testing.assert_allclose(actual, weights[k][i], rtol=0, atol=1e-5, err_msg=f"step {t}")
    assert clipped > 30


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bound_is_kept_to_the_last_digit_and_reached(dtype):
    """Bounds are exact although `bound - param`, and its sum with the parameter, are rounded."""
    rng = np.random.default_rng(1)
    draw = lambda: jnp.asarray(rng.normal(size=(64, 500)) * 10 ** rng.uniform(-3, 2, size=(64, 500)), dtype)
    params, grads = {"kernel": draw()}, {"kernel": draw()}

    @jax.jit  # params and grads are arguments, because XLA simplifies (a - b) + b of constants to a
    def step(bound, params, grads):
        tx = cbp_jax.clip_weights(optax.sgd(1.0), bound)
        updates, _ = tx.update(grads, tx.init(params), params)
        return updates["kernel"], optax.apply_updates(params, updates)["kernel"]

    for bound in (0.3, 7.77, 80.0):
        updates, after = step(bound, params, grads)
        largest = np.float32(bound) / 8
        after, free = np.asarray(after, np.float64), np.asarray((params["kernel"] - grads["kernel"]), np.float64)
        assert (np.abs(after) <= largest).all()
        inside = np.abs(free) <= largest
        assert 0.05 < inside.mean() < 0.95
        np.testing.assert_array_equal(updates[inside], -grads["kernel"][inside])  # bit for bit the inner update
        # A weight from far outside ends within its own last digit of the bound.
        digit = jnp.finfo(dtype).eps * (np.abs(np.asarray(params["kernel"], np.float64)) + largest)
        np.testing.assert_array_less(np.abs(after - np.sign(free) * largest)[~inside], 2 * digit[~inside])


def test_scales_of_a_network():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.LayerNorm()(nn.Conv(5, (3, 2))(x)))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((1, 4, 4, 2)))["params"]
    expected = {
        **{f"Conv_0/{leaf}": 1 / np.sqrt(3 * 2 * 2) for leaf in ("kernel", "bias")},
        **{f"Dense_0/{leaf}": 1 / np.sqrt(4 * 4 * 5) for leaf in ("kernel", "bias")},
        **{f"LayerNorm_0/{leaf}": None for leaf in ("scale", "bias")},
    }
    assert kernel_scale(params) == pytest.approx(expected)


def test_scales_of_an_nnx_state():
    _, params = nnx.split(nnx.Linear(16, 3, rngs=nnx.Rngs(0)))
    assert kernel_scale(params) == {"kernel": 0.25, "bias": 0.25}


FLAT = {"w1": jnp.full((4, 3), 2.0), "b1": jnp.full(3, -2.0), "w2": jnp.full((3, 2), 0.1)}


def clip_flat(scale, bound=1.0):
    tx = cbp_jax.clip_weights(optax.sgd(0.0), bound, scale)
    updates, _ = tx.update(FLAT, tx.init(FLAT), FLAT)
    return jax.device_get(optax.apply_updates(FLAT, updates))


def test_explicit_scales():
    by_path = clip_flat(lambda path, leaf: None if path == "b1" else 1 / leaf.shape[0], bound=2.0)
    assert by_path["w1"].max() == 0.5 and by_path["b1"].min() == -2 and by_path["w2"].max() == np.float32(0.1)
    columns = jnp.asarray([1.0, 0.5, 3.0])
    tree = clip_flat({"w1": columns, "b1": 0.0, "w2": 1.0})
    np.testing.assert_array_equal(tree["w1"], np.tile([1, 0.5, 2], (4, 1)))
    np.testing.assert_array_equal(tree["b1"], 0)


def test_clips_the_weights_that_continual_backprop_draws():
    """Fresh weights of He et al. range to 2.4 / sqrt(fan-in); clipping is applied after replacement."""
    apply_fn = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
    params = {"w1": jnp.zeros((4, 8)), "w2": jnp.zeros((8, 2))}
    x = jnp.ones((5, 4))
    units = cbp_jax.discover_units(apply_fn, params, x)
    features = cbp_jax.with_features(apply_fn, units)(params, x)[1]
    inner = cbp_jax.continual_backprop(optax.sgd(0.1), units, replacement_rate=1.0, maturity_threshold=0)
    tx = cbp_jax.clip_weights(inner, 1.0)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params, features=features)
    assert state.replaced["w1"].all()
    fresh = np.abs(np.asarray(updates["w1"]))
    assert fresh.max() == 0.5 and 0 < (fresh < 0.5).mean() < 1


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (None, r"cannot tell the scale of 'b1', which is next to the kernels \['w1', 'w2'\]"),
        ({"w1": 1.0, "w2": 1.0}, r"scale must be a tree like the params; it has nothing for \['b1'\]"),
        ({"w1": jnp.ones(4), "b1": 1.0, "w2": 1.0}, r"scale of 'w1' must be a number or broadcast to \(4, 3\)"),
        ({"w1": 1.0, "b1": jnp.ones((2, 3)), "w2": 1.0}, r"scale of 'b1' must be a number or broadcast to \(3,\)"),
        (lambda path, leaf: -1.0, "must not be negative, got -1"),
    ],
)
def test_bad_scales(scale, words):
    with pytest.raises(ValueError, match=words):
        cbp_jax.clip_weights(optax.sgd(0.1), 1.0, scale).init(FLAT)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"bound must be in \[0, inf\), got -1"):
        cbp_jax.clip_weights(optax.sgd(0.1), -1)
    tx = cbp_jax.clip_weights(optax.sgd(0.1))
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="clip_weights needs the params"):
        tx.update(params, tx.init(params))


def test_a_bound_of_zero_and_a_weight_that_is_nan():
    tx = cbp_jax.clip_weights(optax.sgd(1.0), 0.0)
    params = {"kernel": jnp.asarray([[1.0, -3.0]])}
    step = jax.jit(functools.partial(tx.update, state=tx.init(params), params=params))
    np.testing.assert_array_equal(step({"kernel": jnp.ones((1, 2))})[0]["kernel"], -params["kernel"])
    assert jnp.isnan(step({"kernel": jnp.full((1, 2), jnp.nan)})[0]["kernel"]).all()
