import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbp_jax.transforms.continual_backprop import continual_backprop
from cbp_jax.transforms.regularization import add_l1, add_l1_init, add_l2_init, proximal_l1_init
from cbp_jax.units import discover_units

PARAMS = {"w": jnp.array([[2.0, -1.0, 0.5]]), "b": jnp.array([3.0])}
GRADS = {"w": jnp.array([[0.1, 0.2, 0.3]]), "b": jnp.array([-0.4])}


def check_is_gradient_of(tx, state, penalty, params):
    updates, _ = tx.update(GRADS, state, params)
    expected = jax.tree.map(jnp.add, GRADS, jax.grad(penalty)(params))
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected)


def test_l1_is_the_gradient_of_its_penalty():
    tx = add_l1(0.25)
    penalty = lambda params: 0.25 * sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params))
    check_is_gradient_of(tx, tx.init(PARAMS), penalty, PARAMS)


def test_l1_leaves_zeros_unchanged():
    updates, _ = add_l1(0.25).update(jnp.zeros(2), optax.EmptyState(), jnp.array([0.0, 1e-30]))
    assert updates.tolist() == [0.0, 0.25]


@pytest.mark.parametrize(
    ("factory", "of_change"),
    [(add_l1_init, lambda change: 0.3 * jnp.abs(change)), (add_l2_init, lambda change: 0.15 * change**2)],
)
def test_a_pull_toward_the_start_is_the_gradient_of_its_penalty(factory, of_change):
    tx = factory(0.3)
    state = tx.init(PARAMS)
    moved = {"w": PARAMS["w"] * 1.5, "b": PARAMS["b"] - 1}
    total = lambda w, w0: jnp.sum(of_change(w - w0))
    penalty = lambda params: sum(jax.tree.leaves(jax.tree.map(total, params, PARAMS)))
    check_is_gradient_of(tx, state, penalty, moved)
    updates, _ = tx.update(GRADS, state, PARAMS)  # there is no pull at the start
    jax.tree.map(np.testing.assert_array_equal, updates, GRADS)


def test_l2_init_remembers_where_it_began():
    tx = optax.chain(add_l2_init(1.0), optax.sgd(0.5))
    params, state = PARAMS, tx.init(PARAMS)
    params = jax.tree.map(lambda w: w + 8, params)
    for _ in range(30):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda w, w0: np.testing.assert_allclose(w, w0, atol=1e-5), params, PARAMS)


def numpy_proximal(w, u, w0, threshold):
    """Return the argmin over v of threshold * |v - w0| + (v - w - u)^2 / 2, in closed form and checked on a grid."""
    change = w + u - w0
    closed = w0 + np.sign(change) * np.maximum(np.abs(change) - threshold, 0)
    grid = np.concatenate([closed + np.linspace(-0.1, 0.1, 41)[:, None], np.broadcast_to(w0, (1, *w0.shape))])
    cost = threshold * np.abs(grid - w0) + (grid - w - u) ** 2 / 2
    best = threshold * np.abs(closed - w0) + (closed - w - u) ** 2 / 2
    assert (best <= cost + 1e-12).all()
    return closed


@pytest.mark.parametrize(
    ("strength", "learning_rate"), [(0.4, 0.5), (0.4, lambda count: 0.5 / (1 + count)), (0.0, 1.0)]
)
def test_the_proximal_step_is_the_minimizer_of_its_problem(strength, learning_rate):
    rng = np.random.default_rng(0)
    w0, w = rng.normal(size=40), rng.normal(size=40)
    w[:20] = w0[:20] + 0.2 * rng.normal(size=20)
    tx = proximal_l1_init(strength, learning_rate)
    state = tx.init(jnp.asarray(w0, jnp.float32))
    for step in range(2):
        u = 0.2 * rng.normal(size=40)
        updates, state = tx.update(jnp.asarray(u, jnp.float32), state, jnp.asarray(w, jnp.float32))
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        expected = numpy_proximal(w, u, w0, strength * rate)
        np.testing.assert_allclose(w + np.asarray(updates, np.float64), expected, atol=1e-6)
        w = expected
    assert int(state.count) == 2


def test_weights_return_to_the_start_exactly_and_then_stay():
    """With the penalty's gradient they oscillate around it. Other weights move by the update minus the threshold."""
    start = jnp.array([0.3, -1.7, 1e-9, 0.0, 2.0])
    loss = lambda w: jnp.sum(jnp.array([0.001, 0.002, 0.003, 0.004, 1.0]) * (w - 10))
    runs = {}
    for name, tx in {
        "proximal": optax.chain(optax.sgd(0.1), proximal_l1_init(0.5, 0.1)),
        "gradient": optax.chain(add_l1_init(0.5), optax.sgd(0.1)),
    }.items():
        params, state = start + jnp.array([0.05, -0.1, 0.04, 0.02, 0.0]), tx.init(start)
        for _ in range(5):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        runs[name] = params
    np.testing.assert_array_equal(runs["proximal"][:4], start[:4])
    assert (runs["gradient"][:4] != start[:4]).all()
    np.testing.assert_allclose(runs["proximal"][4] - start[4], -5 * 0.1 * (1.0 - 0.5), rtol=1e-5)


def test_without_strength_the_optimizers_step_is_taken():
    rng = np.random.default_rng(1)
    start, moved, update = (jnp.asarray(rng.normal(size=50), jnp.float32) for _ in range(3))
    tx = proximal_l1_init(0.0)
    updates, _ = tx.update(update, tx.init(start), moved)
    np.testing.assert_array_equal(updates, update)


@pytest.mark.parametrize("factory", [add_l1_init, add_l2_init, proximal_l1_init])
def test_state_and_params_can_be_donated(factory):
    tx = factory(0.0)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    step = jax.jit(lambda params, state: tx.update(GRADS, state, params), donate_argnums=(0, 1))
    updates, _ = step(params, state)  # a buffer in both would be donated twice
    jax.tree.map(np.testing.assert_array_equal, updates, GRADS)


def test_a_replaced_unit_is_pulled_toward_its_own_start():
    apply_fn = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
    params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
    units = discover_units(apply_fn, params, jnp.ones((1, 3)))
    inner = optax.chain(add_l2_init(0.1), optax.sgd(0.1))
    tx = continual_backprop(inner, units, replacement_rate=0.25, maturity_threshold=0)
    features = {"w1": jnp.array([[1.0, 0.5, 2.0, 3.0]])}
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params, features=features)
    new = optax.apply_updates(params, updates)
    assert state.replaced["w1"].tolist() == [False, True, False, False]
    initial = state.inner_state[0].initial
    np.testing.assert_array_equal(initial["w1"], params["w1"].at[:, 1].set(new["w1"][:, 1]))
    np.testing.assert_array_equal(initial["w2"], params["w2"].at[1].set(0))


def test_a_bad_learning_rate():
    with pytest.raises(ValueError, match=r"learning_rate must be in \[0, inf\), got -1"):
        proximal_l1_init(0.1, -1)


@pytest.mark.parametrize("factory", [add_l1, add_l1_init, add_l2_init, proximal_l1_init])
def test_bad_input(factory):
    with pytest.raises(ValueError, match=r"strength must be in \[0, inf\), got -0.1"):
        factory(-0.1)
    tx = factory(0.1)
    with pytest.raises(ValueError, match=f"{factory.__name__} needs the params"):
        tx.update(GRADS, tx.init(PARAMS))
