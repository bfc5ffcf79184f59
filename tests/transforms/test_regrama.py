"""regrama against an independent float64 NumPy implementation, and its edge cases."""

import following
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from reference import Conv, Dense

import cbp_jax
from cbp_jax import metrics

MLP = (Dense(12, "relu"), Dense(10, "relu"), Dense(3))
CONVNET = (Conv(6, 3, "SAME", "relu", 2), Conv(5, 2, "VALID", "relu"), Dense(3))
CASES = {
    "mlp": (MLP, (7,), (cbp_jax.adam(2e-3), reference.PerWeightAdam(2e-3)), {"threshold": 0.5, "every": 10}),
    "conv": (CONVNET, (6, 5, 2), (optax.sgd(0.05), reference.SGD(0.05)), {"threshold": 0.6, "every": 6}),
}


class GraMa:
    """Return the units with small gradients, and the smallest distance of a score from the threshold."""

    def __init__(self, *, threshold, every):
        self.threshold, self.every, self.margin = threshold, every, np.inf

    def __call__(self, count, k, h, gradient):
        size = np.abs(gradient).reshape(-1, gradient.shape[-1]).mean(0)
        if count % self.every:
            return np.zeros(size.size, bool)
        score = size / size.mean()
        self.margin = min(self.margin, np.abs(score - self.threshold).min())
        return score <= self.threshold


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case == "conv" else []) for case in CASES]
)
def test_follows_the_numpy_reference(case):
    layers, input_shape, (inner, optimizer), settings = CASES[case]
    select = GraMa(**settings)
    make = lambda units: cbp_jax.regrama(inner, units, key=5, **settings)
    assert following.follow(layers, input_shape, make, optimizer, select, steps=50, batch=6, seed=3) >= 12
    assert select.margin > 1e-4, "choose another seed"


def apply_fn(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


PARAMS = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
UNITS = cbp_jax.discover_units(apply_fn, PARAMS, jnp.ones((5, 4)))
GRADIENT = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)) * np.geomspace(0.01, 3, 8), jnp.float32)


@jax.jit
def recycled(gradient, threshold):
    tx = cbp_jax.regrama(optax.sgd(0.1), UNITS, threshold=threshold, every=1)
    grads = {"w1": gradient, "w2": jnp.ones((8, 2))}
    return tx.update(grads, tx.init(PARAMS), PARAMS)[1].replaced["w1"]


def test_agrees_with_the_metric():
    for threshold in (0.0, 0.01, 0.1, 0.5, 2.0):
        share = recycled(GRADIENT, threshold).mean()
        np.testing.assert_allclose(share, metrics.gradient_dormant_units(GRADIENT, threshold))
    assert 0 < recycled(GRADIENT, 0.1).mean() < 1


def test_groups_without_gradient_and_of_infinite_gradient_are_left_alone():
    assert not recycled(jnp.zeros((4, 8)), 10.0).any()
    for value in (jnp.inf, jnp.nan):
        assert not recycled(GRADIENT.at[0, 2].set(value), 10.0).any()


def test_a_users_score():
    """The score is the magnitude of outgoing weights."""
    score = lambda view: view.outgoing_magnitude() / view.outgoing_magnitude().mean()
    params = {**PARAMS, "w2": PARAMS["w2"].at[3].set(0.01)}
    tx = cbp_jax.redo(optax.sgd(0.0), UNITS, every=1, score=score)
    _, state = jax.jit(lambda params: tx.update(params, tx.init(params), params))(params)
    assert np.flatnonzero(state.replaced["w1"]).tolist() == [3]
