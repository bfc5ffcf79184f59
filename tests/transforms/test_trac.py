import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import cbp_jax
from cbp_jax.transforms.trac import BETAS, erfi

STEPS, LEARNING_RATE = 60, 0.05


def losses_of(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w1"]) @ params["w2"] - y) ** 2)


def gradients_of(params, x, y):
    """Compute the gradients of `losses_of` by hand."""
    h = np.tanh(x @ params["w1"])
    error = 2 * (h @ params["w2"] - y) / y.size
    return {"w1": x.T @ (error @ params["w2"].T * (1 - h**2)), "w2": h.T @ error}


def numpy_trac(params, batches, betas, s_init, eps, recomputed):
    """Run TRAC around SGD in float64; the displacement is kept, as in the paper, or recomputed, as in its program."""
    reference = {name: w.copy() for name, w in params.items()}
    way = {name: np.zeros_like(w) for name, w in params.items()}
    sums, variances, scale, scales = np.full(len(betas), 1e-8), np.zeros(len(betas)), 0.0, []
    for x, y in zip(*batches, strict=True):
        grads = gradients_of(params, x, y)
        if recomputed:
            way = {name: (params[name] - reference[name]) / (scale + eps) for name in params}
        h = sum((grads[name] * way[name]).sum() for name in params)
        variances = betas**2 * variances + h**2
        sums = betas * sums - h
        s = s_init / scipy.special.erfi(np.sqrt(0.5)) * scipy.special.erfi(sums / (np.sqrt(2 * variances) + eps))
        scale = max(s.sum(), 0)
        way = {name: way[name] - LEARNING_RATE * grads[name] for name in params}
        params = {name: reference[name] + scale * way[name] for name in params}
        scales.append(scale)
    return params, scales


@pytest.fixture(scope="module")
def problem():
    """Make weights, and batches of two tasks, the second of which has opposite targets."""
    rng = np.random.default_rng(0)
    params = {"w1": rng.normal(size=(3, 5)), "w2": rng.normal(size=(5, 2))}
    x = rng.normal(size=(STEPS, 8, 3))
    y = np.tanh(x @ rng.normal(size=(3, 2))) * np.where(np.arange(STEPS) < STEPS // 2, 3, -3)[:, None, None]
    return params, (x, y)


def jax_trac(tx, params, batches):
    @jax.jit
    def run(params, batches):
        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(losses_of)(params, *batch), state, params)
            return (optax.apply_updates(params, updates), state), state.scale

        (params, _), scales = jax.lax.scan(step, (params, tx.init(params)), batches)
        return params, scales

    return run(*jax.tree.map(jnp.float32, (params, batches)))


def test_agrees_with_numpy(problem):
    params, batches = problem
    betas, s_init, eps = (0.9, 0.99, 0.999), 0.1, 1e-8
    tx = cbp_jax.trac(optax.sgd(LEARNING_RATE), betas=betas, s_init=s_init, eps=eps)
    ours, scales = jax_trac(tx, params, batches)
    expected, expected_scales = numpy_trac(params, batches, np.array(betas), s_init, eps, recomputed=False)
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-3, atol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, expected)
    (at_zero,) = np.nonzero(np.asarray(scales) == 0)
    assert at_zero.size and at_zero[0] > STEPS // 2 and max(scales) > 3  # the new task pulls the weights back

    # The public program agrees until its scale reaches 0, where it remains.
    _, of_program = numpy_trac(params, batches, np.array(betas), s_init, eps, recomputed=True)
    same = slice(0, at_zero[0] + 1)
    np.testing.assert_allclose(scales[same], of_program[same], rtol=1e-3, atol=1e-3)
    assert not any(of_program[at_zero[0] :]) and scales[-1] > 0.5


def test_a_negative_scale_is_set_to_zero_and_can_grow_again():
    tx = cbp_jax.trac(optax.sgd(1.0), betas=(0.5,), s_init=1.0)
    params = jnp.array([1.0])
    state = tx.init(params)
    grads = [1.0, -3.0, -3.0, 2.0, 2.0, 2.0]  # the displacement is -1, 2, 5, 3, 1, -1 after these
    weights, scales = [], []
    for g in grads:
        updates, state = tx.update(jnp.array([g]), state, params)
        params = optax.apply_updates(params, updates)
        weights.append(float(params[0])), scales.append(float(state.scale))
    sums = variances = 0.0
    for g, way, scale in zip(grads, [0, -1, 2, 5, 3, 1], scales, strict=True):
        sums, variances = 0.5 * sums - g * way, 0.25 * variances + (g * way) ** 2
        expected = scipy.special.erfi(sums / (np.sqrt(2 * variances) + 1e-8)) / scipy.special.erfi(np.sqrt(0.5))
        assert scale == pytest.approx(max(expected, 0), rel=1e-4, abs=0.7)
    assert scales[1] == 0 and weights[1] == 1.0 and scales[2] > 0.5


def test_the_scale_grows_from_almost_nothing(problem):
    params, batches = problem
    for learning_rate in (1e-3, 1e-2):
        _, scales = jax_trac(cbp_jax.trac(optax.adam(learning_rate)), params, batches)
        assert 0 < scales[0] < 1e-6 and scales[STEPS // 2] > 500 * scales[0]


def test_erfi_equals_that_of_scipy():
    x = np.concatenate([np.linspace(-9, 9, 501), [1e-6, -1e-3, 0]]).astype(np.float32)
    np.testing.assert_allclose(erfi(jnp.asarray(x)), scipy.special.erfi(np.float64(x)), rtol=1e-5)
    assert np.isfinite(erfi(jnp.array([50.0, -jnp.inf]))).all()


def test_the_papers_discounts():
    assert BETAS == tuple(1 - 10.0**-n for n in range(1, 7))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"betas": ()}, "betas must hold at least one discount"),
        ({"betas": (0.9, 1.5)}, r"betas must be in \[0, 1\], got 1.5"),
        ({"s_init": -1.0}, "s_init must be in"),
        ({"eps": 0.0}, "eps must be in"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        cbp_jax.trac(optax.sgd(0.1), **settings)


def test_params_are_needed():
    tx = cbp_jax.trac(optax.sgd(0.1))
    with pytest.raises(ValueError, match="trac needs the params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
