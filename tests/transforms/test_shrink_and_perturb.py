import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbp_jax.transforms.shrink_and_perturb import shrink_and_perturb

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(100, 100)), jnp.float32), "b": jnp.ones(50)}
GRADS = jax.tree.map(lambda w: jnp.asarray(RNG.normal(size=w.shape), jnp.float32), PARAMS)


def step(tx, state=None, params=PARAMS):
    updates, state = jax.jit(tx.update)(GRADS, tx.init(params) if state is None else state, params)
    return optax.apply_updates(params, updates), state


def test_without_shrinking_and_noise_it_is_the_inner_optimizer():
    tx = shrink_and_perturb(optax.sgd(0.1, momentum=0.9), shrink=0.0, perturb=0.0)
    updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    inner = optax.sgd(0.1, momentum=0.9)
    expected, _ = jax.jit(inner.update)(GRADS, inner.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_shrinks_the_weights_before_the_update():
    new, _ = step(shrink_and_perturb(optax.sgd(0.1), shrink=0.3, perturb=0.0))
    jax.tree.map(
        lambda n, w, g: np.testing.assert_allclose(n, 0.7 * w - 0.1 * g, rtol=1e-5, atol=1e-6), new, PARAMS, GRADS
    )


def test_perturbs_every_weight_with_noise_of_the_given_size():
    tx = shrink_and_perturb(optax.sgd(0.1), shrink=0.3, perturb=0.02)
    new, state = step(tx)
    again, _ = step(tx, state)
    xi, later = (
        jax.tree.map(lambda n, w, g: np.asarray((n - (0.7 * w - 0.1 * g)) / 0.02), out, PARAMS, GRADS)
        for out in (new, again)
    )
    for leaf in jax.tree.leaves(xi):
        assert abs(leaf.mean()) < 4 / np.sqrt(leaf.size)
        assert abs(leaf.var() - 1) < 4 * np.sqrt(2 / leaf.size)
        assert np.unique(leaf).size > 0.99 * leaf.size
    assert abs((xi["w"] * later["w"]).mean()) < 4 / 100  # new noise at every step
    assert int(state.count) == 1


def test_shrinking_and_noise_balance():
    """Without gradients, the variance of the weights converges to p**2 / (1 - (1 - s)**2)."""
    tx = shrink_and_perturb(optax.set_to_zero(), shrink=0.1, perturb=0.5)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = 100 * jnp.ones(10_000)
    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), None, 200)
    np.testing.assert_allclose(jnp.var(params), 0.5**2 / (1 - 0.9**2), rtol=0.06)
    assert abs(params.mean()) < 0.05


def test_the_key_decides_about_the_noise():
    new = [step(shrink_and_perturb(optax.sgd(0.1), 0.0, 0.1, key=key))[0]["w"] for key in (0, 0, 1, jax.random.key(1))]
    np.testing.assert_array_equal(new[0], new[1])
    np.testing.assert_array_equal(new[2], new[3])
    assert (new[0] != new[2]).mean() > 0.99


@pytest.mark.parametrize(
    ("shrink", "perturb", "words"),
    [
        (-0.1, 0.1, r"shrink must be in \[0, 1\], got -0.1"),
        (1.1, 0.1, r"shrink must be in \[0, 1\], got 1.1"),
        (0.1, -1e-5, r"perturb must be in \[0, inf\), got -1e-05"),
    ],
)
def test_bad_settings(shrink, perturb, words):
    with pytest.raises(ValueError, match=words):
        shrink_and_perturb(optax.sgd(0.1), shrink, perturb)


def test_params_are_needed():
    tx = shrink_and_perturb(optax.sgd(0.1), 0.1, 0.1)
    with pytest.raises(ValueError, match="shrink_and_perturb needs the params"):
        tx.update(GRADS, tx.init(PARAMS))
