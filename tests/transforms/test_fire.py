"""fire against float64 NumPy, in which singular values are iterated instead of matrices."""

import following
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax


def isometric(w, iterations):
    """Return a kernel [inputs, outputs] after Newton-Schulz iterations of its singular values."""
    left, values, right = np.linalg.svd(w, full_matrices=False)
    values = values / np.linalg.norm(w)
    for _ in range(iterations):
        values = 1.5 * values - 0.5 * values**3
    return np.sqrt(w.shape[1] / w.shape[0]) * (left * values) @ right


@pytest.mark.parametrize("reset", [pytest.param(False, marks=pytest.mark.slow), True])
def test_follows_the_numpy_reference(reset):
    optimizer = reference.PerWeightAdam(0.02)

    def edit(count, weights, grads):
        if count % 8 == 0:
            for k, pair in enumerate(weights):
                pair[0] = isometric(pair[0], 10)
                if reset:
                    optimizer.reset(k, 0, ...)

    tx = cbp_jax.fire(cbp_jax.adam(0.02), every=8, reset_inner_state=reset)
    following.follow_edits(tx, optimizer, edit)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 3, 4, 6)])
def test_all_singular_values_become_one_number(shape):
    """The result is the polar factor, at each spatial position of a convolution."""
    w = np.random.default_rng(0).normal(size=shape)
    tx = cbp_jax.fire(optax.sgd(0.0), every=1, iterations=40)
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)["kernel"].reshape(-1, *shape[-2:])
    for found, old in zip(after, w.reshape(after.shape), strict=True):
        left, _, right = np.linalg.svd(old, full_matrices=False)
        expected = np.sqrt(shape[-1] / shape[-2]) / len(after) * left @ right
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_kernels_of_zeros_are_unchanged_and_kernels_can_be_left_out():
    params = {"zero": jnp.zeros((2, 3)), "head": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}
    tx = cbp_jax.fire(optax.sgd(0.0), every=1, kernels=lambda path, leaf: path == "zero")
    updates, _ = tx.update(params, tx.init(params), params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


def test_bad_settings():
    for settings, words in (
        ({"every": 0}, "every must be in"),
        ({"every": 1, "iterations": 0}, "iterations must be a positive int, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            cbp_jax.fire(optax.sgd(0.1), **settings)
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="reset_inner_state=False"):
        factored = optax.adafactor(0.1, min_dim_size_to_factor=2)
        cbp_jax.fire(factored, every=1, reset_inner_state=True).init(params)
    tx = cbp_jax.fire(optax.sgd(0.1), every=1)
    with pytest.raises(ValueError, match="fire needs the params"):
        tx.update(params, tx.init(params))
