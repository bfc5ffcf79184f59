import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbp_jax.transforms.continual_backprop import continual_backprop
from cbp_jax.transforms.regularization import add_l1, add_l2_init
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


def test_l1_leaves_a_zero_alone():
    updates, _ = add_l1(0.25).update(jnp.zeros(2), optax.EmptyState(), jnp.array([0.0, 1e-30]))
    assert updates.tolist() == [0.0, 0.25]


def test_l2_init_is_the_gradient_of_its_penalty():
    tx = add_l2_init(0.3)
    state = tx.init(PARAMS)
    moved = {"w": PARAMS["w"] * 1.5, "b": PARAMS["b"] - 1}
    squares = lambda w, w0: jnp.sum((w - w0) ** 2)
    penalty = lambda params: 0.15 * sum(jax.tree.leaves(jax.tree.map(squares, params, PARAMS)))
    check_is_gradient_of(tx, state, penalty, moved)
    updates, _ = tx.update(GRADS, state, PARAMS)  # no pull at the start
    jax.tree.map(np.testing.assert_array_equal, updates, GRADS)


def test_l2_init_remembers_where_it_began():
    tx = optax.chain(add_l2_init(1.0), optax.sgd(0.5))
    params, state = PARAMS, tx.init(PARAMS)
    params = jax.tree.map(lambda w: w + 8, params)
    for _ in range(30):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda w, w0: np.testing.assert_allclose(w, w0, atol=1e-5), params, PARAMS)


def test_l2_init_state_and_params_can_be_donated():
    tx = add_l2_init(0.3)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    step = jax.jit(lambda params, state: tx.update(GRADS, state, params), donate_argnums=(0, 1))
    updates, _ = step(params, state)  # one buffer in both would be donated twice
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


@pytest.mark.parametrize("factory", [add_l1, add_l2_init])
def test_bad_input(factory):
    with pytest.raises(ValueError, match=r"strength must be in \[0, inf\), got -0.1"):
        factory(-0.1)
    tx = factory(0.1)
    with pytest.raises(ValueError, match=f"{factory.__name__} needs the params"):
        tx.update(GRADS, tx.init(PARAMS))
