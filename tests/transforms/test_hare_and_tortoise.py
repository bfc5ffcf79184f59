"""hare_and_tortoise against float64 NumPy."""

import following
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax


def test_follows_the_numpy_reference():
    """The inner optimizer is Adam, whose moments are kept."""
    tortoise = []

    class Adam(reference.PerWeightAdam):
        def init(self, params):
            super().init(params)
            tortoise.extend([leaf.copy() for leaf in pair] for pair in params)

    def edit(count, weights, grads):
        for pair, slow in zip(weights, tortoise, strict=True):
            for i in range(2):
                slow[i] = 0.9 * slow[i] + 0.1 * pair[i]
                if count % 7 == 0:
                    pair[i] = slow[i].copy()

    tx = cbp_jax.hare_and_tortoise(cbp_jax.adam(0.02), decay=0.9, every=7)
    following.follow_edits(tx, Adam(0.02), edit)


def test_the_tortoise_moves_in_bfloat16():
    """Small changes of the mean would be lost in bfloat16, so the tortoise is kept in float32."""
    tx = cbp_jax.hare_and_tortoise(optax.sgd(1.0), decay=0.999)
    params = jnp.ones(2, jnp.bfloat16)
    _, state = tx.update(-jnp.ones(2, jnp.bfloat16), tx.init(params), params)
    assert state.tortoise.dtype == jnp.float32
    np.testing.assert_allclose(state.tortoise, 1.001, rtol=1e-5)


def test_bad_settings():
    for settings, words in (({"decay": 1.1}, r"decay must be in \[0, 1\]"), ({"every": 1.5}, "every must be a whole")):
        with pytest.raises(ValueError, match=words):
            cbp_jax.hare_and_tortoise(optax.sgd(0.1), **settings)
    tx = cbp_jax.hare_and_tortoise(optax.sgd(0.1))
    with pytest.raises(ValueError, match="hare_and_tortoise needs the params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
