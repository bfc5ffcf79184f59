import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbp_jax.transforms.adam import _one_minus_power, adam, scale_by_adam

STEPS = 200
GRADS = jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, 4, 8)) * np.logspace(-4, 2, 8), jnp.float32)


def train(tx, grads, params, state=None):
    """Return all updates [steps, ...] and the last state."""

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(params) if state is None else state, grads)
    return updates, state


@pytest.mark.parametrize(
    ("learning_rate", "settings"),
    [
        (0.1, {}),
        (0.1, {"b1": 0.0, "b2": 0.5, "eps": 1e-3}),
        (optax.linear_schedule(0.1, 0.0, STEPS), {"b1": 0.8}),
    ],
)
def test_equals_optax_if_nothing_is_reset(learning_rate, settings):
    params = jnp.zeros(GRADS.shape[1:])
    ours, _ = train(adam(learning_rate, **settings), GRADS, params)
    theirs, _ = train(optax.adam(learning_rate, **settings), GRADS, params)
    # optax computes powers of float32(0.999) in float32, which loses five digits of 1 - b2**n.
    np.testing.assert_allclose(ours, theirs, rtol=3e-5, atol=1e-8)


def test_against_float64():
    ours, _ = train(adam(0.1), GRADS, jnp.zeros(GRADS.shape[1:]))
    mu = nu = 0.0
    for n, g in enumerate(np.asarray(GRADS, np.float64), 1):
        mu = 0.9 * mu + 0.1 * g
        nu = 0.999 * nu + 0.001 * g * g
        expected = -0.1 * (mu / (1 - 0.9**n)) / (np.sqrt(nu / (1 - 0.999**n)) + 1e-8)
        np.testing.assert_allclose(ours[n - 1], expected, rtol=2e-5, atol=1e-7)


def test_reset_weights_start_over_and_the_others_continue():
    tx = adam(0.1)
    params = jnp.zeros(GRADS.shape[1:])
    _, state = train(tx, GRADS, params)
    reset = jnp.zeros(params.shape, bool).at[:, 3].set(True).at[1].set(True)
    start_over = lambda new, old: jnp.where(reset, new, old)
    with_reset = (jax.tree.map(start_over, tx.init(params)[0], state[0]), *state[1:])

    untouched, _ = train(tx, GRADS, params, state)
    after, _ = train(tx, GRADS, params, with_reset)
    fresh, _ = train(tx, GRADS, params)
    np.testing.assert_array_equal(after[:, ~reset], untouched[:, ~reset])
    np.testing.assert_array_equal(after[:, reset], fresh[:, reset])
    np.testing.assert_allclose(jnp.abs(after[0][reset]), 0.1, rtol=1e-3)


def test_a_shared_count_makes_the_first_step_after_a_reset_too_large():
    """With optax's count, the first step after a reset is three times too large."""
    tx, params = optax.adam(0.1), jnp.zeros(2)
    _, (state, rest) = train(tx, jnp.ones((10_000, 2)), params)
    emptied = state._replace(mu=state.mu.at[0].set(0), nu=state.nu.at[0].set(0))
    updates, _ = tx.update(jnp.ones(2), (emptied, rest), params)
    np.testing.assert_allclose(updates, [-0.1 * 0.1 / np.sqrt(0.001), -0.1], rtol=1e-3)


@pytest.mark.parametrize("base", [0.0, 0.3, 0.9, 0.99, 0.999, 0.9999])
def test_powers(base):
    """Powers are right for every possible count, also where they underflow."""
    counts = np.unique(np.concatenate([np.arange(1, 1000), np.geomspace(1e3, 2**30, 2000)]).astype(np.int32))
    exact = -np.expm1(counts * np.log(np.maximum(base, 1e-300)))
    constant = jax.jit(lambda n: _one_minus_power(base, n, jnp.float32))(counts)
    np.testing.assert_allclose(constant, exact, rtol=1e-6)

    rounded = np.float64(np.float32(base))  # a traced base has already lost these digits
    exact = -np.expm1(counts * np.log(np.maximum(rounded, 1e-300)))
    traced = jax.jit(lambda b, n: _one_minus_power(b, n, jnp.float32))(jnp.float32(base), counts)
    np.testing.assert_allclose(traced, exact, rtol=2e-6)


def test_counts_are_per_weight_and_never_overflow():
    tx = scale_by_adam()
    state = tx.init({"w": jnp.zeros((2, 3)), "b": jnp.zeros(())})
    assert jax.tree.map(lambda n: (n.shape, n.dtype.name), state.count) == {
        "w": ((2, 3), "int32"),
        "b": ((), "int32"),
    }
    old = jax.tree.map(lambda n: jnp.full_like(n, 2**31 - 1), state.count)
    updates, state = tx.update({"w": jnp.ones((2, 3)), "b": jnp.ones(())}, state._replace(count=old))
    assert all((n > 2**29).all() for n in jax.tree.leaves(state.count))
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_bfloat16_keeps_its_moments():
    """A moment in bfloat16 could neither decay by a thousandth nor add a thousandth of a squared gradient."""
    params = jnp.zeros(2, jnp.bfloat16)
    grads = jnp.zeros((1000, 2), jnp.bfloat16).at[0].set(1)
    updates, state = train(scale_by_adam(), grads, params)
    np.testing.assert_allclose(state.nu, 0.001 * 0.999**999, rtol=1e-4)
    wide, _ = train(scale_by_adam(), grads.astype(jnp.float32), params.astype(jnp.float32))
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"eps": -1.0}, r"eps must be in \[0, inf\), got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be .* got nan"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        adam(**{"learning_rate": 0.1, **settings})
