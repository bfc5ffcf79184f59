"""perturbed_gradient_descent against float64 NumPy with the same noise, and tests of the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbp_jax import add_noise, perturbed_gradient_descent
from cbp_jax.numerics import noise

STEPS = 80
RNG = np.random.default_rng(0)
XS = RNG.normal(size=(STEPS, 6, 5)).astype(np.float32)
YS = RNG.integers(2, size=(STEPS, 6))
PARAMS = {"w": jnp.asarray(RNG.normal(size=5), jnp.float32), "b": jnp.zeros([])}


def loss(params, x, y):
    """Compute the loss of logistic regression."""
    z = x @ params["w"] + params["b"]
    return jnp.mean(jnp.logaddexp(0, z) - y * z)


@jax.jit
def run(settings):
    tx = perturbed_gradient_descent(0.2, key=3, **settings)

    def step(carry, batch):
        params, state = carry
        xi = noise.normal(state[0].key, state[0].count, params)
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, xi)

    return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), (XS, YS))[1]


@pytest.mark.parametrize(("sigma", "weight_decay"), [(0.3, 0.0), (0.1, 0.4), (0.0, 0.4), (0.0, 0.0)])
def test_follows_the_numpy_reference(sigma, weight_decay):
    history, xi = jax.device_get(run({"sigma": sigma, "weight_decay": weight_decay}))
    w, b = np.asarray(PARAMS["w"], np.float64), 0.0
    for t in range(STEPS):
        error = (1 / (1 + np.exp(-(XS[t] @ w + b))) - YS[t]) / 6
        w = (1 - 0.2 * weight_decay) * w - 0.2 * (XS[t].T @ error + sigma * xi["w"][t])
        b = (1 - 0.2 * weight_decay) * b - 0.2 * (error.sum() + sigma * xi["b"][t])
        np.testing.assert_allclose(history["w"][t], w, rtol=0, atol=1e-5, err_msg=f"step {t}")
        np.testing.assert_allclose(history["b"][t], b, rtol=0, atol=1e-5, err_msg=f"step {t}")


def test_noise_of_the_given_size_anew_at_every_step():
    tx = add_noise(0.02, key=1)
    grads = {"w": jnp.asarray(RNG.normal(size=(100, 100)), jnp.float32), "b": jnp.ones(5000)}
    state, step, drawn = tx.init(grads), jax.jit(tx.update), []
    for _ in range(2):
        updates, state = step(grads, state)
        drawn.append(jax.tree.map(lambda u, g: np.asarray((u - g) / 0.02), updates, grads))
    for leaf in jax.tree.leaves(drawn):
        assert abs(leaf.mean()) < 4 / np.sqrt(leaf.size)
        assert abs(leaf.var() - 1) < 4 * np.sqrt(2 / leaf.size)
    assert abs((drawn[0]["w"] * drawn[1]["w"]).mean()) < 4 / 100
    assert abs((drawn[0]["w"].ravel()[:5000] * drawn[0]["b"]).mean()) < 4 / np.sqrt(5000)
    assert int(state.count) == 2


def test_the_key_decides_about_the_noise():
    step = jax.jit(lambda key: add_noise(1.0, key).update(PARAMS, add_noise(1.0, key).init(PARAMS))[0]["w"])
    new = [step(key) for key in (0, 0, 1, jax.random.key(1))]
    np.testing.assert_array_equal(new[0], new[1])
    np.testing.assert_array_equal(new[2], new[3])
    assert (new[0] != new[2]).all()


def test_neither_noise_nor_decay_is_sgd():
    tx, sgd = perturbed_gradient_descent(0.1, 0.0), optax.sgd(0.1)
    updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    expected, _ = jax.jit(sgd.update)(PARAMS, sgd.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_a_schedule_scales_noise_and_decay_too():
    tx = perturbed_gradient_descent(lambda count: 1.0 * (count == 0), 0.5, weight_decay=0.5)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert (updates["w"] != 0).all()
    updates, _ = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_array_equal(updates["w"], 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigma": -0.1}, r"sigma must be in \[0, inf\), got -0.1"),
        ({"weight_decay": -1e-5}, r"weight_decay must be in \[0, inf\), got -1e-05"),
        ({"learning_rate": float("nan")}, "learning_rate must be in"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        perturbed_gradient_descent(**{"learning_rate": 0.1, **settings})
