import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax

RNG = np.random.default_rng(0)
BEFORE = {"w1": RNG.normal(size=(3, 4)), "w2": RNG.normal(size=(4, 2))}
NOW = {name: w + 0.3 * RNG.normal(size=w.shape) for name, w in BEFORE.items()}
GRADS = {name: RNG.normal(size=w.shape) for name, w in BEFORE.items()}
X = RNG.normal(size=(6, 3))


def apply_fn(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_gradients(change):
    """Compute gradients of the churn from BEFORE to NOW on X with respect to NOW, by hand."""
    old = np.tanh(X @ BEFORE["w1"]) @ BEFORE["w2"]
    h = np.tanh(X @ NOW["w1"])
    new = h @ NOW["w2"]
    error = 2 * (new - old) / new.size if change == "squared" else (softmax(new) - softmax(old)) / len(X)
    return {"w1": X.T @ (error @ NOW["w2"].T * (1 - h**2)), "w2": h.T @ error}


@pytest.mark.parametrize("change", ["kl", "squared"])
def test_agrees_with_numpy(change):
    before, now, grads, x = jax.tree.map(jnp.float32, (BEFORE, NOW, GRADS, X))
    tx = cbp_jax.add_churn_reduction(apply_fn, 0.7, change=change)
    updates, state = jax.jit(tx.update)(grads, tx.init(before), now, reference=x)
    churn = numpy_gradients(change)
    for name in GRADS:
        assert np.abs(0.7 * churn[name]).max() > 0.01
        np.testing.assert_allclose(updates[name], GRADS[name] + 0.7 * churn[name], rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.previous, now)

    same, _ = tx.update(grads, tx.init(now), now, reference=x)  # nothing has changed since the start
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, grads)


def test_churn_is_reduced():
    """For steps of the same size on one task, outputs for other examples change less."""
    now, x = jax.tree.map(jnp.float32, (NOW, X))
    task, others = (x[:2], jnp.float32([[1.0, -1.0], [-1.0, 1.0]])), x[2:]

    @jax.jit
    def moved(strength):
        tx = optax.chain(cbp_jax.add_churn_reduction(apply_fn, strength, change="squared"), optax.sgd(0.005))

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda params: jnp.mean((apply_fn(params, task[0]) - task[1]) ** 2))(params)
            updates, state = tx.update(grads, state, params, reference=others)
            new = optax.apply_updates(params, updates)
            return (new, state), cbp_jax.metrics.churn(apply_fn, params, new, others, "squared")

        return jax.lax.scan(step, (now, tx.init(now)), length=30)[1].mean()

    assert moved(10.0) < 0.7 * moved(0.0)


def test_missing_or_wrong_arguments_are_reported():
    tx = cbp_jax.add_churn_reduction(apply_fn, 1.0)
    with pytest.raises(ValueError, match="got params=None"):
        tx.update(GRADS, tx.init(NOW))
    with pytest.raises(ValueError, match="got reference=None"):
        tx.update(GRADS, tx.init(NOW), NOW)
    with pytest.raises(ValueError, match="change must be 'kl' or 'squared', got 'l1'"):
        cbp_jax.add_churn_reduction(apply_fn, 1.0, change="l1")
    with pytest.raises(ValueError, match="strength must be in"):
        cbp_jax.add_churn_reduction(apply_fn, -1.0)
