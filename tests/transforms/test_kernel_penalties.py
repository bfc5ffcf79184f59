"""Penalties on kernels against float64 NumPy, which computes gradients by finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax

LAYERS = (reference.Dense(6, "tanh"), reference.Dense(3))
STEPS = 40


def gram(matrix):
    return matrix @ matrix.T


# Functions of a kernel [..., outputs] and the initial kernel.
PENALTIES = {
    "spectral": (
        cbp_jax.spectral_penalty(power=2.0),
        lambda w, w0: (np.linalg.svd(w.reshape(-1, w.shape[-1]), compute_uv=False)[0] ** 2 - 1) ** 2,
    ),
    "parseval": (
        cbp_jax.parseval_penalty(scale=2.0),
        lambda w, w0: np.sum((gram(w.reshape(-1, w.shape[-1]).T) - 2 * np.eye(w.shape[-1])) ** 2),
    ),
    "orthogonal": (
        cbp_jax.orthogonal_penalty(),
        lambda w, w0: min(
            np.sum((gram(m) - np.eye(len(m))) ** 2) for m in (w.reshape(-1, w.shape[-1]), w.reshape(-1, w.shape[-1]).T)
        ),
    ),
    "wasserstein": (
        cbp_jax.wasserstein_penalty(),
        lambda w, w0: np.sum((np.sort(w, None) - np.sort(w0, None)) ** 2),
    ),
}


def differences(penalty, w, epsilon=1e-6):
    gradient = np.zeros_like(w)
    for place in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[place] = epsilon
        gradient[place] = (penalty(w + step) - penalty(w - step)) / (2 * epsilon)
    return gradient


def spectral_step(w, inputs):
    """Compute the gradient [inputs, outputs] by one power iteration from a singular vector over the inputs."""
    outputs = w.T @ inputs / np.linalg.norm(w.T @ inputs)
    inputs = w @ outputs / np.linalg.norm(w @ outputs)
    sigma = inputs @ w @ outputs
    return 4 * (sigma**2 - 1) * sigma * np.outer(inputs, outputs), inputs


@pytest.mark.parametrize("name", PENALTIES)
def test_follows_the_numpy_reference(name):
    penalty, value = PENALTIES[name]
    rng = np.random.default_rng(0)
    xs, labels = rng.normal(size=(STEPS, 5, 4)).astype(np.float32), rng.integers(3, size=(STEPS, 5))
    params = {
        f"layer{k}": {"kernel": 0.5 + 0.3 * rng.normal(size=shape), "bias": 0.1 * rng.normal(size=shape[1])}
        for k, shape in enumerate([(4, 6), (6, 3)])
    }
    params = jax.tree.map(np.float32, params)
    strength = 0.02
    tx = optax.chain(cbp_jax.add_kernel_penalty(strength, penalty), optax.sgd(0.05))

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
    initial = [kernel.copy() for kernel, _ in weights]
    vectors = [np.linalg.svd(kernel)[0][:, 0] for kernel in initial]
    largest = 0.0
    for t in range(STEPS):
        logits, tape = reference.forward(LAYERS, weights, xs[t])
        grads = reference.backward(LAYERS, weights, tape, reference.cross_entropy_gradient(logits, labels[t]))
        for k in range(2):
            if name == "spectral":
                gradient, vectors[k] = spectral_step(weights[k][0], vectors[k])
            else:
                gradient = differences(functools.partial(value, w0=initial[k]), weights[k][0])
            pull = strength * gradient
            largest = max(largest, np.abs(pull).max())
            weights[k][0] -= 0.05 * (grads[k][0] + pull)
            weights[k][1] -= 0.05 * grads[k][1]
            for i, leaf in enumerate(("kernel", "bias")):
                actual = history[f"layer{k}"][leaf][t]
                np.testing.assert_allclose(actual, weights[k][i], rtol=0, atol=2e-5, err_msg=f"step {t}")
    assert largest > (0.002 if name == "wasserstein" else 0.02)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("shape", [(2, 2, 2, 3), pytest.param((2, 7), marks=pytest.mark.slow)])
def test_gradients_of_kernels_of_any_shape(name, shape):
    """Kernels have more inputs than outputs, or more outputs than inputs."""
    penalty, value = PENALTIES[name]
    rng = np.random.default_rng(2)
    w0, w = rng.normal(size=(2, *shape))
    if name == "spectral":
        w0 = w  # so that the power iteration converges first
        w *= 1 + 2 * (np.arange(shape[-1]) == 1)  # the largest singular value is well separated
    kept, gradient, after = jax.jit(lambda w0, w: (kept := penalty.init(w0), *penalty.gradient(w, kept)))(
        np.float32(w0), np.float32(w)
    )
    expected = differences(functools.partial(value, w0=w0), w)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, kept)


@pytest.mark.slow
def test_equal_weights_are_pulled_to_different_initial_weights():
    penalty, rng = cbp_jax.wasserstein_penalty(), np.random.default_rng(3)
    w0 = np.float32(rng.normal(size=(5, 4)))
    gradient, _ = penalty.gradient(jnp.zeros((5, 4)), penalty.init(w0))
    np.testing.assert_array_equal(np.sort(-gradient / 2, None), np.sort(w0, None))
    w = np.array([[2.0, -1.0, -1.0, 0.0], [0.5, -np.inf, np.inf, -2.0]], np.float32)
    gradient, _ = penalty.gradient(w, jnp.arange(8.0))
    np.testing.assert_array_equal((w - gradient / 2)[np.isfinite(w)], [6, 3, 2, 4, 5, 1])


def test_the_spectral_norm_is_followed_even_from_a_kernel_of_zeros():
    penalty = cbp_jax.spectral_penalty(power=1.0)
    kept = penalty.init(jnp.zeros((4, 3)))
    gradient, kept = penalty.gradient(jnp.zeros((4, 3)), kept)
    assert not gradient.any()
    w = np.random.default_rng(0).normal(size=(4, 3))
    step = jax.jit(penalty.gradient)
    for _ in range(30):
        gradient, kept = step(np.float32(w), kept)
    np.testing.assert_allclose(gradient, differences(lambda w: (np.linalg.svd(w)[1][0] - 1) ** 2, w), atol=1e-3)


def test_settings_may_be_arrays_inside_a_traced_program():
    params = {"w": jnp.ones((2, 2))}
    power, scale = jnp.float32(1.0), jnp.float32(2.0)
    for make in (lambda: cbp_jax.spectral_penalty(power), lambda: cbp_jax.parseval_penalty(scale)):
        shapes = jax.eval_shape(lambda params, make=make: cbp_jax.add_kernel_penalty(0.1, make()).init(params), params)
        assert "w" in shapes.kept


def test_only_chosen_kernels_are_penalized():
    params = {"hidden": jnp.full((2, 2), 3.0), "head": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    choose = lambda path, leaf: path == "hidden"
    tx = cbp_jax.add_kernel_penalty(1.0, cbp_jax.orthogonal_penalty(), kernels=choose)
    grads, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert grads["hidden"].all() and not grads["head"].any() and not grads["bias"].any()


def test_errors_name_what_is_wrong():
    parseval = cbp_jax.parseval_penalty()
    with pytest.raises(ValueError, match=r"strength must be in \[0, inf\), got -1"):
        cbp_jax.add_kernel_penalty(-1.0, parseval)
    with pytest.raises(ValueError, match=r"scale must be in \[0, inf\), got -1"):
        cbp_jax.parseval_penalty(scale=-1)
    with pytest.raises(ValueError, match="power must be above 0, got 0"):
        cbp_jax.spectral_penalty(power=0)
    with pytest.raises(ValueError, match=r"kernels must choose an array of two or more axes, got none of \['b'\]"):
        cbp_jax.add_kernel_penalty(1.0, parseval).init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"got 'b' of shape \(3,\)"):
        cbp_jax.add_kernel_penalty(1.0, parseval, kernels=lambda path, leaf: True).init({"b": jnp.ones(3)})
    tx = cbp_jax.add_kernel_penalty(1.0, parseval)
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="add_kernel_penalty needs the params"):
        tx.update(params, tx.init(params))
