import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbp_jax.experiments.learners import make_learner, parse_method


def made_equal(kernel, steps=5):
    """Return the weights whose singular values Muon's five steps make nearly equal, in float64."""
    x = np.float64(kernel).reshape(-1, kernel.shape[-1])
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.reshape(kernel.shape)


NESTEROV = 0.9 * 0.1 / (1 - 0.9**2) + 1  # the first step of optax's Adam within Muon, divided by the step size


def first_update(text, network, input_shape):
    method = parse_method(text)
    learner = make_learner([method], (5,), "relu", input_shape, 3, network=network)
    rng = np.random.default_rng(0)
    params = jax.eval_shape(learner.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)

    @jax.jit
    def step(numbers, params, grads):
        tx = learner.optimizer(numbers, jax.random.key(0))
        return tx.update(grads, tx.init(params), params)[0]

    return params["params"], grads["params"], step(method.hyperparameters, params, grads)["params"]


@pytest.mark.parametrize(
    ("network", "input_shape"),
    [("mlp", (4,)), ("convnet(channels=(6,), kernel_sizes=(3,), hidden=(5,))", (9, 9, 2))],
    ids=["mlp", "convnet"],
)
def test_muon_makes_the_singular_values_of_kernels_equal(network, input_shape):
    text = "muon:step_size=0.1,weight_decay=0.5,adam_step_size=0.2"
    params, grads, updates = first_update(text, network, input_shape)
    kernels = 0
    for layer, leaves in grads.items():
        for name, g in leaves.items():
            w, update = params[layer][name], updates[layer][name]
            if name == "kernel":
                fan_in, fan_out = g.size // g.shape[-1], g.shape[-1]
                expected = -0.1 * (np.sqrt(max(1, fan_out / fan_in)) * made_equal(g) + 0.5 * w)
                np.testing.assert_allclose(update, expected, rtol=0.01, atol=1e-3)
                kernels += 1
            else:
                np.testing.assert_allclose(update, -0.2 * NESTEROV * np.sign(g), rtol=1e-3)
    assert kernels >= 2


def test_adam_takes_muons_step_size_unless_it_has_its_own():
    _, grads, updates = first_update("muon:step_size=0.1", "mlp", (4,))
    expected = -0.1 * NESTEROV * np.sign(grads["Dense_0"]["bias"])
    np.testing.assert_allclose(updates["Dense_0"]["bias"], expected, rtol=1e-3)


def test_trac_wraps_adam():
    method = parse_method("trac:step_size=0.1,s_init=0.5")
    _, grads, updates = first_update("trac:step_size=0.1,s_init=0.5", "mlp", (4,))
    # In the first step, each of the six tuners has sigma about 1e-8 and eps 1e-8: erfi(beta) / erfi(sqrt(1/2)).
    betas = 1 - 10.0 ** -np.arange(1, 7)
    erfi = np.array(
        [2 / np.sqrt(np.pi) * np.trapezoid(np.exp(t**2), t) for t in (np.linspace(0, b, 2001) for b in betas)]
    )
    scale = 0.5 / 0.95343827 * erfi.sum()
    expected = jax.tree.map(lambda g: -0.1 * scale * np.sign(g), grads)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-3), updates, expected)
    assert isinstance(method.build((), jax.random.key(0)), optax.GradientTransformation)


def test_settings_that_are_documented():
    assert parse_method("adam_reset").options["forget"] == "time"
    assert parse_method("adam_reset:every=50,forget=moments").hyperparameters["every"] == 50
    with pytest.raises(ValueError, match="forget must be one of"):
        parse_method("adam_reset:forget=all")
