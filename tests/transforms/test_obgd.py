import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import nets

STEPS = 30
SHAPES = {"w": (3, 4), "b": (4,)}
SETTINGS = {"learning_rate": 0.5, "discount": 0.9, "trace_decay": 0.7, "kappa": 2.0}


def numpy_td(grads, errors, ends, step_size, decay):
    """Run TD(lambda) in float64: weights [steps, ...] from zeros; the step size depends on traces and error."""
    weights, traces = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    path, sizes = [], []
    for number, (error, end) in enumerate(zip(errors, ends, strict=True)):
        traces = {name: decay * z + grads[name][number] for name, z in traces.items()}
        sizes.append(step_size(error, traces))
        weights = {name: w + sizes[-1] * error * traces[name] for name, w in weights.items()}
        path.append(weights)
        if end:
            traces = {name: 0 * z for name, z in traces.items()}
    return {name: np.stack([w[name] for w in path]) for name in SHAPES}, np.array(sizes)


@pytest.fixture(scope="module")
def stream():
    """Make gradients, some of them small, TD errors on both sides of 1, and ends of episodes."""
    rng = np.random.default_rng(0)
    scale = np.where(np.arange(STEPS) % 10 < 5, 0.02, 1.0)
    grads = {name: rng.normal(size=(STEPS, *shape)) for name, shape in SHAPES.items()}
    grads = {name: (g.T * scale).T for name, g in grads.items()}
    return grads, 2 * rng.normal(size=STEPS), np.arange(STEPS) % 7 == 6


def jax_td(tx, stream):
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}

    @jax.jit
    def run(stream):
        def step(carry, inputs):
            (params, state), (grads, error, end) = carry, inputs
            updates, state = tx.update(grads, state, params, td_error=error, reset_traces=end)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), stream)[1]

    grads, errors, ends = stream
    return run((jax.tree.map(jnp.float32, grads), jnp.float32(errors), jnp.asarray(ends)))


def test_obgd_agrees_with_numpy(stream):
    alpha, kappa, decay = 0.5, 2.0, 0.9 * 0.7

    def step_size(error, traces):
        bound = alpha * kappa * max(abs(error), 1) * sum(abs(z).sum() for z in traces.values())
        return min(alpha / bound, alpha)

    expected, sizes = numpy_td(*stream, step_size, decay)
    assert 3 < (sizes == alpha).sum() < STEPS - 3 and (abs(stream[1]) < 1).sum() > 3  # both branches are taken
    ours = jax_td(cbp_jax.obgd(**SETTINGS), stream)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected)


def test_traces_before_sgd_are_td_lambda(stream):
    expected, _ = numpy_td(*stream, lambda *_: 0.1, 0.9 * 0.7)
    tx = optax.chain(cbp_jax.eligibility_traces(0.9, 0.7), optax.sgd(0.1))
    ours = jax_td(tx, stream)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected)
    without_bound = jax_td(cbp_jax.obgd(**{**SETTINGS, "learning_rate": 0.1, "kappa": 0.0}), stream)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), without_bound, ours)


@pytest.mark.parametrize("target", [0.1, 50.0])
def test_a_step_does_not_overshoot(target):
    """With inputs of at most 1, a linear value approaches its target and does not pass it, whatever the step size."""
    x, w = jnp.linspace(-1, 1, 50), jnp.zeros(50)
    moved = lambda tx: float(x @ tx.update(x, tx.init(w), w, td_error=target)[0])
    assert 0 < moved(cbp_jax.obgd(100.0, kappa=2.0)) < target / 2
    assert moved(cbp_jax.obgd(100.0, kappa=0.0)) > 2 * target


@pytest.mark.slow
def test_traces_of_replaced_units_are_reset():
    net = nets.MLP((6,), 2)
    params = net.init(jax.random.key(0), jnp.zeros((1, 3)))
    units = cbp_jax.discover_units(net.apply, params, jnp.zeros((1, 3)))
    tx = cbp_jax.continual_backprop(cbp_jax.obgd(), units, replacement_rate=0.5, maturity_threshold=0)
    ones = jax.tree.map(jnp.ones_like, params)
    features = {"params/Dense_0": jnp.ones((1, 6))}
    step = jax.jit(lambda state: tx.update(ones, state, params, features=features, td_error=1.0)[1])
    state = step(tx.init(params))
    replaced = np.asarray(state.replaced["params/Dense_0"])
    traces = state.inner_state.traces["params"]
    assert replaced.sum() == 3
    for found in (traces["Dense_0"]["kernel"].T, traces["Dense_0"]["bias"], traces["Dense_1"]["kernel"]):
        assert not found[replaced].any() and (found[~replaced] == 1).all()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be in"),
        ({"kappa": -1.0}, "kappa must be in"),
        ({"discount": 1.1}, r"discount must be in \[0, 1\], got 1.1"),
        ({"trace_decay": -0.1}, r"trace_decay must be in \[0, 1\], got -0.1"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        cbp_jax.obgd(**settings)


@pytest.mark.parametrize("make", [cbp_jax.obgd, cbp_jax.eligibility_traces])
def test_a_td_error_is_needed(make):
    tx, w = make(), jnp.ones(2)
    with pytest.raises(ValueError, match=f"{make.__name__} needs the TD error"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match=r"td_error must be one number.*got shape \(2,\)"):
        tx.update(w, tx.init(w), w, td_error=w)
