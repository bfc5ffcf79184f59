"""Computations on an accelerator compared with the same on its host: `pytest -m gpu`. They pass on a CPU, too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import data, nets, problems, training
from cbp_jax.experiments import learners
from cbp_jax.numerics import noise

pytestmark = pytest.mark.gpu

OPTIMIZED = True
METHODS = ("bp", "adam", "cbp:replacement_rate=0.1,maturity_threshold=5", "upgd:sigma=0.001", "redo:every=10")


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def on(device, function, *args):
    """Compute results on a device, with the arguments placed there."""
    with jax.default_device(device):
        return jax.device_get(jax.jit(function)(*jax.device_put(args, device)))


def everywhere(function, *args):
    return [on(device, function, *args) for device in (jax.devices()[0], jax.devices("cpu")[0])]


@pytest.mark.parametrize("text", METHODS)
def test_a_learner_learns_as_on_the_host(text):
    method = learners.parse_method(text)
    learner = learners.make_learner([method], (16, 16), "relu", (12,), 4)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 5, 12)).astype(np.float32), rng.integers(0, 4, (20, 5))
    numbers = {name: jnp.float32(value) for name, value in method.hyperparameters.items()}

    def train(x, y):
        state = training.init_state(learner, 0, numbers)
        tx = optax.with_extra_args_support(learner.optimizer(numbers, jax.random.key(1)))

        def loss(params, x, y):
            outputs, features = learner.train(params, x, jax.random.key(0))
            return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean(), features

        def step(carry, batch):
            params, opt_state = carry
            (value, features), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
            updates, opt_state = tx.update(grads, opt_state, params, features=features)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (state.params, tx.init(state.params)), (x, y))[1]

    there, here = everywhere(train, x, y)
    np.testing.assert_allclose(there, here, rtol=2e-3)
    assert there[-5:].mean() < there[:5].mean()


def test_noise_equals_that_of_the_host():
    draw = lambda key: noise.normal(key, 3, jnp.zeros((100, 100)))
    there, here = everywhere(draw, jnp.array([1, 2], jnp.uint32))
    np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)


def test_lanes_run_together_equal_their_solo_runs():
    digits = problems.online_permuted(data.load("digits"), examples_per_task=50, batch_size=5)
    method = learners.parse_method("cbp:step_size=0.01,replacement_rate=0.01,maturity_threshold=5")
    learner = learners.make_learner([method], (16,), "relu", digits.input_shape, digits.num_classes)

    def run(seeds):
        numbers = {name: np.full(len(seeds), value) for name, value in method.hyperparameters.items()}
        tasks = training.run_tasks(learner, digits, seeds, numbers, 2, measured_examples=50)
        return np.stack([found["loss"] for found in tasks], -1)

    together = run(np.arange(4))
    assert training.Lanes(4).mode == ("map" if jax.default_backend() == "cpu" else "vmap")
    np.testing.assert_allclose(together[2:3], run(np.array([2])), rtol=2e-3)
    assert len({float(loss) for loss in together[:, 0]}) == 4


def test_units_of_a_convolutional_network_are_replaced():
    network = nets.ConvNet(num_outputs=3, channels=(4, 8), kernel_sizes=(3, 3), hidden=(8,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 3)), jnp.float32)
    params = network.init(jax.random.key(0), x)
    units = cbp_jax.discover_units(network.apply, params, x)
    apply = cbp_jax.with_features(network.apply, units)
    tx = cbp_jax.continual_backprop(optax.sgd(0.01), units, replacement_rate=0.5, maturity_threshold=0)

    def step(params, x):
        features = apply(params, x)[1]
        grads = jax.grad(lambda params: jnp.sum(apply(params, x)[0] ** 2))(params)
        updates, state = tx.update(grads, tx.init(params), params, features=features)
        return optax.apply_updates(params, updates), state.replaced

    (there, replaced), (here, replaced_here) = everywhere(step, params, x)
    jax.tree.map(np.testing.assert_array_equal, replaced, replaced_here)
    assert all(mask.any() for mask in replaced.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), there, here)
