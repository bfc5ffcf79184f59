import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax

B1, B2, EPS, RATE, EVERY, STEPS = 0.9, 0.99, 1e-3, 0.1, 4, 10


def numpy_adam_reset(grads, forget):
    """Compute the updates in float64, with moments written as sums."""
    m, v, n, updates = 0.0, 0.0, 0, []
    for step, g in enumerate(np.float64(grads)):
        if step % EVERY == 0:
            n = 0
            if forget == "moments":
                m = v = 0.0
        n += 1
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        updates.append(-RATE * m / (1 - B1**n) / (np.sqrt(v / (1 - B2**n)) + EPS))
    return np.array(updates)


def run(tx, grads):
    step = lambda state, g: tx.update({"w": g}, state)[::-1]
    return jax.jit(lambda grads: jax.lax.scan(step, tx.init({"w": grads[0]}), grads)[1]["w"])(jnp.float32(grads))


@pytest.mark.parametrize("forget", ["time", "moments"])
def test_agrees_with_numpy(forget):
    grads = np.random.default_rng(0).normal(size=(STEPS, 3)) * np.where(np.arange(STEPS) < 6, 1, 50)[:, None]
    ours = run(cbp_jax.adam_reset(RATE, B1, B2, EPS, every=EVERY, forget=forget), grads)
    np.testing.assert_allclose(ours, numpy_adam_reset(grads, forget), rtol=1e-4, atol=1e-6)


def test_a_suddenly_larger_gradient_gives_a_step_of_the_learning_rate():
    """This is the purpose of Adam-Rel: the first gradient of a new task is a thousand times as large as before."""
    grads = np.where(np.arange(201) < 200, 1e-3, 1.0)[:, None]
    relative = run(cbp_jax.adam_reset(RATE, every=200), grads)[-1, 0]
    plain = run(optax.adam(RATE), grads)[-1, 0]
    assert -relative == pytest.approx(RATE, rel=0.01)
    assert -plain > 1.3 * RATE


def test_without_a_reset_it_is_adam():
    grads = np.random.default_rng(1).normal(size=(STEPS, 2))
    plain, ours = run(cbp_jax.adam(RATE), grads), run(cbp_jax.adam_reset(RATE, every=STEPS), grads)
    np.testing.assert_array_equal(plain, ours)


def test_bad_settings_are_refused():
    for every in (0, 1.5):
        with pytest.raises(ValueError, match="every must be"):
            cbp_jax.adam_reset(RATE, every=every)
    with pytest.raises(ValueError, match="forget must be 'time' or 'moments', got 'all'"):
        cbp_jax.adam_reset(RATE, forget="all")
