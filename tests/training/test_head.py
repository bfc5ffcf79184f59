import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import nets
from cbp_jax.data import Dataset
from cbp_jax.experiments.learners import make_learner, parse_method
from cbp_jax.problems import continual_images
from cbp_jax.training import init_state, output_layers, reset_layers, run_task

HIDDEN, LABELS = (5,), 2
HEAD = "params/Dense_1"


@pytest.fixture(scope="module")
def network():
    net = nets.MLP(HIDDEN, LABELS)
    params = jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 4)))
    units = cbp_jax.discover_units(net.apply, params, jnp.ones((1, 4)))
    return params, units, {group.name: jnp.ones((3, group.size)) for group in units}


def wrap(name, units):
    inner = optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9))
    return {
        "sgd": inner,
        "adam": cbp_jax.adam(0.1),  # has a count for each weight
        "cbp": cbp_jax.continual_backprop(inner, units, maturity_threshold=0),
        "shrink_and_perturb": cbp_jax.shrink_and_perturb(inner, 0.1, 0.1),
        "multi_steps": optax.MultiSteps(inner, 3).gradient_transformation(),
    }[name]


def test_the_traced_program_does_not_depend_on_the_order_of_a_set():
    """Python orders sets of texts differently in every process, and JAX's compilation cache knows programs by text."""
    params, tx = {"head": {name: jnp.ones(size) for size, name in enumerate("abcdefghij", 2)}}, optax.sgd(0.1, 0.9)
    program = jax.make_jaxpr(lambda params: reset_layers(tx, params, tx.init(params), ["head"]))(params)
    made = [eqn.outvars[0].aval for eqn in program.eqns]
    assert [mask.size for mask in made if mask.dtype == bool] == list(range(2, 12))


@pytest.mark.parametrize("name", ["sgd", "adam", "cbp", "shrink_and_perturb", "multi_steps"])
def test_only_the_head_is_reset(network, name):
    params, units, features = network
    tx = optax.with_extra_args_support(wrap(name, units))
    params = jax.tree.map(lambda leaf: leaf + 1, params)

    @jax.jit
    def after_two(params):
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params, features=features)
        return state, reset_layers(tx, params, state, [HEAD])

    state, (new_params, new_state) = after_two(params)
    head = {"kernel": jnp.zeros((5, LABELS)), "bias": jnp.zeros(LABELS)}
    expected = {"params": {**params["params"], "Dense_1": head}}
    jax.tree.map(np.testing.assert_array_equal, new_params, expected)
    before, after = (jax.tree_util.tree_leaves_with_path(tree) for tree in (state, new_state))
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    changed = []
    for (path, old), (_, new) in zip(before, after, strict=True):
        if not np.array_equal(old, new):
            changed.append(jax.tree_util.keystr(path, simple=True, separator="/"))
            assert not np.any(new)
    assert changed and all(HEAD in path for path in changed)
    assert {path.rsplit("/", 1)[1] for path in changed} == {"kernel", "bias"}


def test_a_path_that_ends_like_another_is_not_mistaken_for_it():
    params = {"head": jnp.ones(3), "torso": {"head": jnp.ones(3)}}
    tx = optax.sgd(0.1, momentum=0.9)
    _, state = tx.update(params, tx.init(params), params)
    new_params, new_state = reset_layers(tx, params, state, ["head"])
    for tree in (new_params, new_state[0].trace):
        assert not tree["head"].any() and tree["torso"]["head"].all()


def test_output_layers_are_found_or_given(network):
    params, units, _ = network
    assert output_layers(units) == (HEAD,)
    with pytest.raises(ValueError, match="no layer was found that makes the network's output; name it instead"):
        output_layers(types.SimpleNamespace(left_out=units.select(HEAD.replace("1", "0")).left_out[1:]))
    with pytest.raises(ValueError, match=r"the parameters have no layer 'params/Dense_2'; they are \['params/Dense_0"):
        reset_layers(optax.sgd(0.1), params, optax.sgd(0.1).init(params), ["params/Dense_2"])


def test_a_run_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4, dtype=np.int32), 8)
    images = (rng.integers(0, 150, (32, 2, 2, 1)) + 25 * labels[:, None, None, None]).astype(np.uint8)
    problem = continual_images(
        Dataset(images, labels, 4, "toy"), train_per_class=5, test_per_class=3, epochs=4, batch_size=5
    )
    method = parse_method("bp:step_size=0.3,momentum=0.5")
    flat = lambda **settings: Flat(nets.MLP(**settings))
    learner = make_learner([method], HIDDEN, "relu", problem.input_shape, 2, network=flat, reset_head=True)
    state = jax.jit(lambda: init_state(learner, 0, {"step_size": jnp.float32(0.3)}))()
    task = jax.jit(
        lambda data, state: run_task(learner, problem, data, state, measured_examples=6, dormant_threshold=0.5)
    )

    params = jax.tree.map(np.float64, state.params["params"])
    trace = jax.tree.map(np.zeros_like, params)
    problem_key = jax.random.split(jax.random.key(0), 4)[1]
    show = jax.jit(
        lambda data, key, index: (
            jax.vmap(lambda step: problem.batch(data, problem.make_task(data, key, index), step))(jnp.arange(8)),
            problem.evaluation(data, problem.make_task(data, key, index), 6)[0],
            problem.test(data, problem.make_task(data, key, index)),
        )
    )
    for index in range(2):
        state, measures = task(problem.data, state)
        batches, evaluation, test = jax.tree.map(np.asarray, show(problem.data, problem_key, index))
        hidden = forward(params, evaluation)[0].mean(0)  # before the task; activations are not negative
        for tree in (params, trace):
            tree["Dense_1"] = jax.tree.map(np.zeros_like, tree["Dense_1"])
        losses = []
        for x, y in zip(*batches, strict=True):
            loss, grads = gradients(params, x, y)
            losses.append(loss)
            trace = jax.tree.map(lambda t, g: 0.5 * t + g, trace, grads)
            params = jax.tree.map(lambda p, t: p - 0.3 * t, params, trace)
        assert losses[0] == pytest.approx(np.log(2))  # with a head of zeros
        outputs = forward(params, test[0])[1]
        expected = {
            "loss": np.mean(losses),
            "test_loss": np.mean(np.logaddexp(*outputs.T) - outputs[np.arange(6), test[1]]),
            "test_accuracy": np.mean(outputs.argmax(1) == test[1]),
            "dormant_units": np.mean(hidden <= 0.5 * hidden.mean()),
            "weight_magnitude": measures["weight_magnitude"],
        }
        assert set(expected) < set(measures)
        for name, value in expected.items():
            np.testing.assert_allclose(measures[name], value, rtol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.params["params"], params)


class Flat:
    """A network that flattens images."""

    def __init__(self, net):
        self.net = net

    def init(self, key, x):
        return self.net.init(key, x.reshape(x.shape[0], -1))

    def apply(self, params, x):
        return self.net.apply(params, x.reshape(x.shape[0], -1))


def forward(params, x):
    first, last = params["Dense_0"], params["Dense_1"]
    hidden = np.maximum(np.float64(x).reshape(len(x), -1) @ first["kernel"] + first["bias"], 0)
    return hidden, hidden @ last["kernel"] + last["bias"]


def gradients(params, x, y):
    hidden, outputs = forward(params, x)
    chances = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    loss = -np.log(chances[np.arange(len(y)), y]).mean()
    error = (chances - np.eye(LABELS)[y]) / len(y)
    back = error @ params["Dense_1"]["kernel"].T * (hidden > 0)
    flat = np.float64(x).reshape(len(x), -1)
    return loss, {
        "Dense_0": {"kernel": flat.T @ back, "bias": back.sum(0)},
        "Dense_1": {"kernel": hidden.T @ error, "bias": error.sum(0)},
    }
