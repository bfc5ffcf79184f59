"""redo against an independent float64 NumPy implementation, and its edge cases."""

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
from cbp_jax.units import Consumer, ParamSlice, UnitGroup

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_under_vmap_the_branch_remains_a_branch": ("1",),
}

STEPS = 70
MLP = (Dense(12, "relu"), Dense(10, "relu"), Dense(3))
CONVNET = (Conv(6, 3, "SAME", "relu", 2), Conv(5, 2, "VALID", "relu"), Dense(3))
CASES = {
    "mlp-adam": (MLP, (7,), (cbp_jax.adam(2e-3), reference.PerWeightAdam(2e-3)), {"threshold": 0.5, "every": 10}),
    "conv-sgd": (CONVNET, (6, 5, 2), (optax.sgd(0.05), reference.SGD(0.05)), {"threshold": 0.7, "every": 6}),
}


class Redo:
    """Return the dormant units, computed in float64, and the smallest distance of a score from the threshold."""

    def __init__(self, *, threshold, every):
        self.threshold, self.every, self.margin = threshold, every, np.inf

    def __call__(self, count, k, h, gradient):
        size = np.abs(h).reshape(-1, h.shape[-1]).mean(0)
        if count % self.every:
            return np.zeros(size.size, bool)
        score = size / size.mean()
        self.margin = min(self.margin, np.abs(score - self.threshold).min())
        return score <= self.threshold


# A convolutional network takes twice as long to compile.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case.startswith("conv") else []) for case in CASES]
)
def test_follows_the_numpy_reference(case):
    layers, input_shape, (inner, optimizer), settings = CASES[case]
    select = Redo(**settings)
    make = lambda units: cbp_jax.redo(inner, units, key=5, **settings)
    assert following.follow(layers, input_shape, make, optimizer, select, steps=STEPS, batch=6, seed=3) >= 12
    assert select.margin > 1e-4, "choose another seed"


# A network with arbitrary parameters and activations.
SIZE = 8
PARAMS = {
    name: jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    for name, shape in {"w1": (4, SIZE), "b1": (SIZE,), "w2": (SIZE, 2)}.items()
}
UNITS = (
    UnitGroup(
        "hidden",
        SIZE,
        incoming=(ParamSlice.whole_axis("w1", 1, SIZE),),
        biases=(ParamSlice.whole_axis("b1", 0, SIZE),),
        outgoing=(Consumer(ParamSlice.whole_axis("w2", 0, SIZE)),),
    ),
)
RNG = np.random.default_rng(2)
FEATURES = jnp.asarray(RNG.normal(size=(5, SIZE)) * np.geomspace(0.01, 3, SIZE), jnp.float32)


def one_update(tx, features, params=PARAMS, units_grads=PARAMS):
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(units_grads, state, params, features={"hidden": features})
    return optax.apply_updates(params, updates), state


@jax.jit
def recycled(features, threshold):
    tx = cbp_jax.redo(optax.sgd(0.1), UNITS, threshold=threshold, every=1, reset_inner_state=False)
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, features={"hidden": features})[1].replaced["hidden"]


def test_agrees_with_the_metric():
    for threshold in (0.0, 0.1, 0.5, 2.0):
        share = recycled(FEATURES, threshold).mean()
        np.testing.assert_allclose(share, metrics.dormant_fraction(FEATURES, threshold))
    assert 0 < recycled(FEATURES, 0.5).mean() < 1


def test_a_score_of_the_threshold_is_dormant():
    h = jnp.tile(jnp.asarray([2.0, 0.5, 0.0, -1.5, 1.0, -1.0, 1.0, 1.0]), (5, 1))  # the mean absolute value is 1
    np.testing.assert_array_equal(np.flatnonzero(recycled(h, 0.5)), [1, 2])
    np.testing.assert_array_equal(np.flatnonzero(recycled(h, np.nextafter(np.float32(0.5), 0))), [2])
    np.testing.assert_array_equal(np.flatnonzero(recycled(h, 0.0)), [2])


def test_silent_and_infinite_groups():
    assert recycled(jnp.zeros((5, SIZE)), 0.0).all()
    for value in (jnp.inf, jnp.nan):
        assert not recycled(FEATURES.at[0, 2].set(value), 10.0).any()


def test_averages_over_positions_and_over_what_consumers_read():
    """A unit of the first kernel has two rows in the second; a third kernel reads another array of the same units."""
    params = {**PARAMS, "w2": jnp.ones((2 * SIZE, 2)), "w3": jnp.ones((SIZE, 3))}
    rows = np.arange(2 * SIZE).reshape(2, SIZE)
    outgoing = (
        Consumer(ParamSlice("w2", (0,), rows, 2 * SIZE), operand=0),
        Consumer(ParamSlice.whole_axis("w3", 0, SIZE), operand=1),
    )
    units = (UnitGroup("hidden", SIZE, UNITS[0].incoming, UNITS[0].biases, outgoing),)
    first, second = RNG.normal(size=(5, 2, SIZE)) * np.geomspace(0.1, 2, SIZE), 100 * RNG.normal(size=(5, SIZE)) ** 4
    features = (jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32))
    score = [np.abs(h).reshape(-1, SIZE).mean(0) / np.abs(h).mean() for h in (first, second)]
    expected = (score[0] + score[1]) / 2 <= 0.7
    assert 0 < expected.sum() < SIZE and (expected != (score[0] <= 0.7)).any() and (expected != (score[1] <= 0.7)).any()
    tx = cbp_jax.redo(optax.sgd(0.1), units, threshold=0.7, every=1)
    new, state = one_update(tx, features, params, params)
    np.testing.assert_array_equal(state.replaced["hidden"], expected)
    np.testing.assert_array_equal((new["w2"] == 0).all(1), np.tile(expected, 2))
    np.testing.assert_array_equal((new["w3"] == 0).all(1), expected)
    np.testing.assert_array_equal(new["b1"] == 0, expected)


def test_recycles_every_so_many_updates_and_otherwise_changes_nothing():
    """Between recyclings, updates and inner state are those of the inner optimizer, bit for bit."""
    inner = optax.adam(0.01)
    tx = cbp_jax.redo(inner, UNITS, threshold=0.5, every=3)
    state, expected = tx.init(PARAMS), inner.init(PARAMS)
    step, inner_step = jax.jit(tx.update), jax.jit(inner.update)
    for number in range(1, 8):
        if number in (4, 7):
            expected = state.inner_state
        updates, state = step(PARAMS, state, PARAMS, features={"hidden": FEATURES})
        inner_updates, expected = inner_step(PARAMS, expected, PARAMS)
        if number % 3:
            assert not state.replaced["hidden"].any()
            jax.tree.map(np.testing.assert_array_equal, (updates, state.inner_state), (inner_updates, expected))
        else:
            np.testing.assert_array_equal(state.replaced["hidden"], recycled(FEATURES, 0.5))
            assert state.replaced["hidden"].any()
    assert int(state.count) == 7


@pytest.mark.parametrize("reset", [True, False])
def test_only_moments_of_recycled_units_are_reset(reset):
    tx = cbp_jax.redo(optax.sgd(0.1, momentum=0.9), UNITS, threshold=0.5, every=1, reset_inner_state=reset)
    _, state = one_update(tx, FEATURES)
    trace, new = state.inner_state[0].trace, np.asarray(state.replaced["hidden"]) & reset
    for name, where in (("w1", new[None]), ("b1", new), ("w2", new[:, None])):
        np.testing.assert_array_equal(trace[name], np.where(where, 0, PARAMS[name]))


def test_fresh_noise_at_every_recycling_from_the_given_initializer():
    tx = cbp_jax.redo(optax.sgd(0.0), UNITS, threshold=0.5, every=1, initializer=jax.nn.initializers.normal(100.0))
    state, drawn, step = tx.init(PARAMS), [], jax.jit(tx.update)
    for _ in range(2):
        updates, state = step(PARAMS, state, PARAMS, features={"hidden": FEATURES})
        drawn.append((PARAMS["w1"] + updates["w1"])[:, state.replaced["hidden"]])
    assert drawn[0].shape[1] >= 2 and (drawn[0] != drawn[1]).all()
    assert all(30 < np.std(fresh) < 300 for fresh in drawn)


def test_low_precision_updates_still_zero_exactly():
    """Gradients are bfloat16 and params float32, so `-param` would be rounded."""
    grads = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    tx = cbp_jax.redo(optax.sgd(0.1), UNITS, threshold=0.5, every=1)
    new, state = one_update(tx, FEATURES, units_grads=grads)
    assert state.replaced["hidden"].any()
    np.testing.assert_array_equal((new["w2"] == 0).all(1), state.replaced["hidden"])


def test_seeds_recycle_when_they_are_due():
    """In one vmap over params and intervals, every row equals its solo run."""
    params = jax.tree.map(lambda w: jnp.stack([w, w + 1, w - 1]), PARAMS)
    every = jnp.asarray([1, 2, 3])

    def run(params, every):
        tx = cbp_jax.redo(optax.sgd(0.1), UNITS, threshold=0.5, every=every)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params, features={"hidden": FEATURES})
            return (optax.apply_updates(params, updates), state), state.replaced["hidden"]

        return jax.lax.scan(step, (params, tx.init(params)), None, 4)

    (together, _), replaced = jax.jit(jax.vmap(run))(params, every)
    np.testing.assert_array_equal(replaced.any(-1), [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]])
    alone = jax.jit(run)
    for row in range(3):
        (expected, _), _ = alone(jax.tree.map(lambda w, row=row: w[row], params), every[row])
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_allclose(a[row], b, rtol=1e-6, atol=1e-7), together, expected
        )


@pytest.mark.parametrize("depth", [1, 2])
def test_under_vmap_the_branch_remains_a_branch(depth):
    """With a select, whole kernels would be drawn at every step."""
    tx = cbp_jax.redo(optax.sgd(0.1), UNITS)
    update = lambda params, state: tx.update(params, state, params, features={"hidden": FEATURES})
    init = tx.init
    params = PARAMS
    for _ in range(depth):
        update, init = jax.vmap(update), jax.vmap(init)
        params = jax.tree.map(lambda w: jnp.stack([w, w]), params)
    jaxpr = jax.make_jaxpr(update)(params, init(params)).jaxpr
    assert [eqn.invars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "cond"] == [()]
    assert not [eqn for eqn in jaxpr.eqns if eqn.primitive.name.startswith("random_bits")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": -0.1}, r"threshold must be in \[0, inf\), got -0.1"),
        ({"every": 0}, r"every must be in \[1, inf\), got 0"),
        ({"every": 2.5}, "every must be a whole number, got 2.5"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        cbp_jax.redo(optax.sgd(0.1), UNITS, **settings)


def test_errors_name_what_is_missing():
    with pytest.raises(TypeError, match="initializer must be a function"):
        cbp_jax.redo(optax.sgd(0.1), UNITS, initializer="he")
    tx = cbp_jax.redo(optax.sgd(0.1), UNITS)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="redo needs the params"):
        tx.update(PARAMS, state, features={"hidden": FEATURES})
    with pytest.raises(ValueError, match="features must hold the activations of group 'hidden'"):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="units do not match the params"):
        tx.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="reset_inner_state=False"):
        cbp_jax.redo(optax.adafactor(0.1, min_dim_size_to_factor=2), UNITS).init(PARAMS)
