"""dash against float64 NumPy."""

import following
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_follows_the_numpy_reference():
    descent, factors = [0.0, 0.0], []

    def edit(count, weights, grads):
        for k, pair in enumerate(weights):
            descent[k] = 0.75 * descent[k] - 0.25 * grads[k][0]
            for unit in range(pair[0].shape[1]) if count % 9 == 0 else ():
                factors.append(max(0.1, cosine(descent[k][:, unit], pair[0][:, unit])))
                pair[0][:, unit] *= factors[-1]

    tx = cbp_jax.dash(optax.sgd(0.3), every=9, least=0.1, alpha=0.25)
    following.follow_edits(tx, reference.SGD(0.3), edit)
    assert min(factors) == 0.1 and sum(factor > 0.1 for factor in factors) >= 5


def test_a_convolution_shrinks_filter_by_filter_and_zeros_do_no_harm():
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 3, 3, 2, 4))
    w[..., 0, 0], g[..., 1, 1] = 0, 0
    tx = cbp_jax.dash(optax.sgd(0.0), every=1, least=0.05)
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    updates, _ = tx.update({"kernel": jnp.asarray(g, jnp.float32)}, tx.init(params), params)
    after = optax.apply_updates(params, updates)["kernel"]
    for i in range(2):
        for j in range(4):
            alike = -cosine(g[..., i, j].ravel(), w[..., i, j].ravel()) if (i, j) not in ((0, 0), (1, 1)) else 0
            np.testing.assert_allclose(after[..., i, j], max(0.05, alike) * w[..., i, j], rtol=1e-4, atol=1e-6)


def test_bad_settings():
    for settings, words in (
        ({"every": 0}, "every must be in"),
        ({"every": 1, "least": 2}, r"least must be in \[0, 1\], got 2"),
        ({"every": 1, "alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            cbp_jax.dash(optax.sgd(0.1), **settings)
    params = {"w": jnp.ones((4, 4))}
    tx = cbp_jax.dash(optax.sgd(0.1), every=1)
    with pytest.raises(ValueError, match="dash needs the params"):
        tx.update(params, tx.init(params))
