import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import cbp_jax
from cbp_jax.nets import MLP, OnlineNorm, keep_online_stats

UNITS = 3


class Reference:
    """Run the algorithm of Chiley et al., one unit and one time step at a time, in float64."""

    def __init__(self, forward, backward, epsilon=1e-5):
        self.forward_decay, self.backward_decay, self.epsilon = forward, backward, epsilon
        self.mean, self.var = [0.0] * UNITS, [1.0] * UNITS
        self.error_y, self.error_1 = [0.0] * UNITS, [0.0] * UNITS

    def step(self, x, gradient):
        """Return output and input gradient for x [samples, units] and an output gradient of that shape."""
        a, b = self.forward_decay, self.backward_decay
        output, result = np.zeros(x.shape), np.zeros(x.shape)
        for unit in range(UNITS):
            deviation = (self.var[unit] + self.epsilon) ** 0.5
            y = (x[:, unit] - self.mean[unit]) / deviation
            inner = gradient[:, unit] - (1 - b) * self.error_y[unit] * y
            self.error_y[unit] += (inner * y).mean()
            outer = inner / deviation - (1 - b) * self.error_1[unit]
            self.error_1[unit] += outer.mean()
            center = x[:, unit].mean()
            spread = ((x[:, unit] - center) ** 2).mean()
            off = center - self.mean[unit]
            self.var[unit] = a * self.var[unit] + (1 - a) * spread + a * (1 - a) * off**2
            self.mean[unit] = a * self.mean[unit] + (1 - a) * center
            output[:, unit], result[:, unit] = y, outer
        return output, result


@pytest.mark.parametrize("shape", [(1, UNITS), (2, 2, 3, UNITS)])
def test_follows_the_algorithm_step_by_step(shape):
    steps, decays = 80, (0.9, 0.8)  # small decay rates, so that every term matters within 80 steps
    rng = np.random.default_rng(0)
    inputs = rng.normal([1.0, -2.0, 0.0], [1.0, 3.0, 0.1], (steps, *shape))
    gradients = rng.normal(0.5, 1.0, (steps, *shape))
    norm = OnlineNorm(*decays, clamp=None, use_scale=False, use_bias=False)
    variables = norm.init(jax.random.key(0), jnp.zeros(shape))

    def step(variables, given):
        x, gradient = given
        y, pull = jax.vjp(norm.apply, variables, x)
        change, back = pull(gradient)
        variables = optax.apply_updates(variables, change)
        return variables, (y, back, variables["online_stats"])

    given = jnp.asarray(inputs, jnp.float32), jnp.asarray(gradients, jnp.float32)
    _, (outputs, backs, stats) = jax.jit(lambda: jax.lax.scan(step, variables, given))()
    reference = Reference(*decays)
    for t in range(steps):
        y, back = reference.step(inputs[t].reshape(-1, UNITS), gradients[t].reshape(-1, UNITS))
        np.testing.assert_allclose(outputs[t].reshape(-1, UNITS), y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(backs[t].reshape(-1, UNITS), back, rtol=1e-5, atol=1e-4)
        for name in ("mean", "var", "error_y", "error_1"):
            np.testing.assert_allclose(stats[name][t], getattr(reference, name), rtol=1e-5, atol=1e-5, err_msg=name)


def test_outputs_and_gradients_are_normalized_in_the_long_run():
    norm = OnlineNorm(0.99, 0.9, clamp=None, use_scale=False, use_bias=False)
    draws = jax.random.normal(jax.random.key(0), (3000, 1, UNITS)) * 3 + 2
    pushes = jax.random.normal(jax.random.key(1), (3000, 1, UNITS)) + 5 + draws  # with a mean, and along the output

    def step(variables, given):
        y, pull = jax.vjp(norm.apply, variables, given[0])
        change, back = pull(given[1])
        return optax.apply_updates(variables, change), (y, back)

    variables = norm.init(jax.random.key(0), draws[0])
    _, (y, back) = jax.jit(lambda: jax.lax.scan(step, variables, (draws, pushes)))()
    y, back = np.asarray(y)[1000:, 0], np.asarray(back)[1000:, 0]
    np.testing.assert_allclose(y.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(y.std(0), 1, atol=0.1)
    np.testing.assert_allclose(back.mean(0), 0, atol=0.02)
    np.testing.assert_allclose((back * y).mean(0), 0, atol=0.05)


def test_scale_offset_and_clamp():
    norm = OnlineNorm(clamp=2.0)
    x = jnp.array([[3.0, 0.5, -1.0]])
    variables = norm.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"scale": (3,), "bias": (3,)}
    variables["params"] = {"scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array([0.0, 0.5, 0.25])}
    np.testing.assert_allclose(norm.apply(variables, x), [[2.0, 1.5, -2.0]], rtol=1e-4)
    gradient = jax.grad(lambda v: norm.apply(v, x).sum())(variables)["params"]
    np.testing.assert_allclose(gradient["scale"], [0, 0.5, 0], rtol=1e-4)
    assert gradient["bias"].tolist() == [0, 1, 0]


def test_low_precision_keeps_its_statistics_in_float32():
    norm = OnlineNorm()
    x = jnp.ones((1, UNITS), jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x)
    assert norm.apply(variables, x).dtype == jnp.bfloat16
    changes, back = jax.grad(lambda v, x: norm.apply(v, x).sum().astype(jnp.float32), (0, 1))(variables, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(changes)} == {"float32"} and back.dtype == jnp.bfloat16
    np.testing.assert_allclose(changes["online_stats"]["mean"], 1e-3, rtol=1e-4)


@pytest.fixture(scope="module")
def training():
    """Train an MLP with online normalization on 20 examples of a seed, in a loop that only passes variables on."""
    net = MLP((5, 4), 2, normalization="online")
    tx = keep_online_stats(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, momentum=0.9)))
    xs = np.random.default_rng(0).normal(1, 2, (20, 1, 6)).astype(np.float32)

    def run(seed):
        variables = net.init(jax.random.key(seed), xs[0])

        def step(carry, x):
            variables, state = carry
            grads = jax.grad(lambda v: jnp.mean(jnp.square(net.apply(v, x) - 1)))(variables)
            updates, state = tx.update(grads, state, variables)
            return (optax.apply_updates(variables, updates), state), variables

        return jax.lax.scan(step, (variables, tx.init(variables)), xs)[1]

    return run, xs


def test_statistics_are_carried_by_a_loop_that_only_passes_variables_on(training):
    run, xs = training
    seen = jax.jit(run)(0)
    layer, stats = seen["params"]["Dense_0"], seen["online_stats"]["OnlineNorm_0"]
    mean = np.zeros(5)
    for t in range(20):  # statistics of the first layer's outputs; decay and momentum apply only to weights
        np.testing.assert_allclose(stats["mean"][t], mean, rtol=1e-4, atol=1e-6)
        mean = 0.999 * mean + 0.001 * (xs[t, 0] @ np.asarray(layer["kernel"][t]) + layer["bias"][t])
    assert (np.asarray(stats["error_1"][-1]) != 0).all()


def test_seeds_under_vmap_are_the_solo_runs(training):
    run, _ = training
    together = jax.jit(jax.vmap(run))(jnp.arange(2))
    for seed in range(2):
        alone = jax.jit(run)(seed)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[seed], b, rtol=2e-4, atol=1e-5), together, alone)  # noqa: B023


def test_continual_backprop_around_it_restarts_a_replaced_units_statistics():
    net, x = (
        MLP((5,), 2, normalization="online"),
        jnp.asarray(np.random.default_rng(0).normal(3, 1, (4, 6)), jnp.float32),
    )
    variables = jax.jit(net.init)(jax.random.key(0), x)
    units = cbp_jax.discover_units(net.apply, variables, x)
    apply = cbp_jax.with_features(net.apply, units)
    tx = cbp_jax.continual_backprop(
        keep_online_stats(cbp_jax.adam(0.01)), units, replacement_rate=0.2, maturity_threshold=3, utility="weight"
    )

    @jax.jit
    def step(variables, state):
        loss = lambda variables: (jnp.mean(apply(variables, x)[0] ** 2), apply(variables, x)[1])
        grads, features = jax.grad(loss, has_aux=True)(variables)
        updates, state = tx.update(grads, state, variables, features=features)
        return optax.apply_updates(variables, updates), state

    state = jax.jit(tx.init)(variables)
    for _ in range(4):
        variables, state = step(variables, state)
    replaced = np.asarray(state.replaced["params/Dense_0"])
    stats = jax.tree.map(np.asarray, variables["online_stats"]["OnlineNorm_0"])
    assert replaced.sum() == 1
    np.testing.assert_array_equal(stats["mean"] == 0, replaced)
    np.testing.assert_array_equal(stats["var"] == 1, replaced)


def test_a_forward_pass_changes_nothing():
    net = nn.Sequential([nn.Dense(UNITS), OnlineNorm()])
    x = jnp.ones((4, 2))
    variables = net.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["online_stats"]["layers_1"]["mean"], 0)
    np.testing.assert_array_equal(net.apply(variables, x), net.apply(variables, x))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"forward_decay": 1.0}, r"forward_decay must be in \[0, 1\), got 1\.0"),
        ({"backward_decay": -0.1}, r"backward_decay must be in \[0, 1\), got -0\.1"),
        ({"epsilon": -1e-5}, "epsilon must be at least 0, got -1e-05"),
        ({"clamp": 0.0}, r"clamp must be above 0 or None, got 0\.0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        OnlineNorm(**settings)
