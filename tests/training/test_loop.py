import subprocess
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import curvature, metrics, nets
from cbp_jax.data import Dataset
from cbp_jax.experiments.learners import make_learner, parse_method
from cbp_jax.problems import label_permuted, online_permuted, slowly_changing_regression
from cbp_jax.training import Checkpoint, init_state, measure, run_task, run_tasks
from cbp_jax.training import run_lanes as run_any
from cbp_jax.training.learner import stream_keys
from cbp_jax.units import reset_batch_stats, with_features

EXAMPLES, CLASSES, HIDDEN, TASKS, MEASURED = 30, 3, (6, 5), 3, 9
SETTINGS = "maturity_threshold=3,decay_rate=0.9"
HIGH = parse_method(f"cbp:step_size=0.1,replacement_rate=0.2,{SETTINGS}")  # above 1 / width: two units in some steps
LOW = parse_method(f"cbp:step_size=0.05,replacement_rate=0.05,{SETTINGS}")
SYMPTOMS = ("dead_units", "weight_magnitude", "effective_rank", "stable_rank")
OF_UPDATES = (
    *("plasticity", "gradient_l0", "gradient_l1", "gradient_l2"),
    *("weight_rank", "weight_effective_rank", "weight_sparsity", "weight_l1", "weight_l2"),
)
EVERY = 5  # of the 12 updates of a task, the 5th and the 10th are measured
LANES = ((0, HIGH), (1, HIGH), (0, LOW))


def tiny_problem():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, 2, 3, 1), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)
    return online_permuted(Dataset(images, labels, CLASSES, "toy"), examples_per_task=24, batch_size=2)


def tiny_learner(problem, methods):
    return make_learner(methods, HIDDEN, "relu", problem.input_shape, problem.num_classes)


def run_lanes(mode="auto"):
    """Run all lanes and return {measure: [tasks, lanes]}."""
    problem = tiny_problem()
    stream = run_tasks(
        tiny_learner(problem, [HIGH, LOW]),
        problem,
        np.array([seed for seed, _ in LANES]),
        {name: np.array([method.hyperparameters[name] for _, method in LANES]) for name in HIGH.hyperparameters},
        TASKS,
        mode=mode,
        measured_examples=MEASURED,
    )
    rows = list(stream)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture
def quick_compilation():
    """Compile twice as fast; results stay the same within rounding."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def problem():
    return tiny_problem()


@pytest.fixture(scope="module")
def together():
    return run_lanes()


@pytest.fixture(scope="module")
def alone(problem):
    """Make one lane without `Lanes`: its initial state and the compiled task. The optimizer is nested in a chain."""
    learner = tiny_learner(problem, [HIGH, LOW])
    nested = learner._replace(optimizer=lambda h, key: optax.chain(learner.optimizer(h, key), optax.identity()))
    start = jax.jit(lambda seed, numbers: init_state(nested, seed, numbers))
    task = jax.jit(lambda data, state: run_task(nested, problem, data, state, measured_examples=MEASURED))
    return (
        lambda seed, method: start(jnp.int32(seed), jax.tree.map(jnp.float32, dict(method.hyperparameters))),
        lambda state: task(problem.data, state),
    )


def reference(problem, seed, make_tx):
    """Run the experiment in plain Python; measures are computed by NumPy, outside of the training step."""
    params_key, problem_key, optimizer_key, _ = jax.random.split(jax.random.key(seed), 4)
    net = nets.MLP(HIDDEN, CLASSES)
    example = jnp.zeros((1, *problem.input_shape))
    params = jax.jit(net.init)(params_key, example)
    units = cbp_jax.discover_units(net.apply, params, example)
    apply = cbp_jax.with_features(net.apply, units)
    tx = make_tx(units, optimizer_key)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def examples(index):
        task = problem.make_task(problem.data, problem_key, index)
        batches = jax.vmap(lambda number: problem.batch(problem.data, task, number))
        return problem.evaluation(problem.data, task, MEASURED)[0], *batches(jnp.arange(problem.steps_per_task))

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits, features = apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), features

        grads, features = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, features=features)
        return optax.apply_updates(params, updates), state, grads

    rows = []
    for index in range(TASKS):
        evaluation, inputs, labels = examples(index)
        row = symptoms(params, evaluation) | {"replaced_units": 0}
        scores, updates = [], []
        for number, (x, y) in enumerate(zip(np.asarray(inputs), np.asarray(labels), strict=True), start=1):
            before, losses = score(params, x, y), losses_of(params, x, y)
            params, state, grads = step(params, state, x, y)
            row["replaced_units"] += sum(int(mask.sum()) for mask in getattr(state, "replaced", {}).values())
            scores.append((*before, *score(params, x, y)))
            if number % EVERY == 0:
                updates.append(update_measures(losses, losses_of(params, x, y), grads))
        row["loss"], row["accuracy"], row["loss_after"], row["accuracy_after"] = np.mean(scores, 0)
        row |= {name: np.mean([update[name] for update in updates]) for name in updates[0]}
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def forward(params, x):
    layers = [jax.tree.map(np.float64, params["params"][f"Dense_{i}"]) for i in range(len(HIDDEN) + 1)]
    hidden = []
    h = np.float64(x)
    for layer in layers[:-1]:
        h = np.maximum(h @ layer["kernel"] + layer["bias"], 0)
        hidden.append(h)
    return h @ layers[-1]["kernel"] + layers[-1]["bias"], hidden


def losses_of(params, x, y):
    logits, _ = forward(params, x)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]


def score(params, x, y):
    return losses_of(params, x, y).mean(), (forward(params, x)[0].argmax(1) == np.asarray(y)).mean()


def update_measures(before, after, grads):
    g = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)]).astype(np.float64)
    return {
        "plasticity": np.clip(1 - after / before, 0, 1).mean(),
        "plasticity_of_the_mean": np.clip(1 - after.mean() / before.mean(), 0, 1),
        "gradient_l0": (g != 0).mean(),
        "gradient_l1": np.abs(g).sum(),
        "gradient_l2": np.sqrt((g**2).sum()),
    }


def effective_rank(matrix):
    share = np.linalg.svd(matrix, compute_uv=False)
    share = share[share > 1e-12] / share.sum()
    return np.exp(-(share * np.log(share)).sum())


def symptoms(params, x):
    hidden = forward(params, x)[1]
    weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    effective, stable = [], []
    for h in hidden:
        share = np.linalg.svd(h, compute_uv=False)
        share = share[share > 1e-12] / share.sum()
        effective.append(effective_rank(h) / h.shape[1])
        stable.append((1 + (np.cumsum(share) < 0.99).sum()) / h.shape[1])
    kernels = [np.asarray(layer["kernel"]) for layer in params["params"].values()]
    largest = sum(min(w.shape) for w in kernels)
    small = [np.abs(w) <= 0.01 * np.sqrt(np.mean(w.astype(np.float64) ** 2)) for w in kernels]
    return {
        "weight_effective_rank": sum(map(effective_rank, kernels)) / largest,
        "weight_sparsity": np.mean(np.concatenate([np.ravel(each) for each in small])),
        "weight_rank": sum(map(np.linalg.matrix_rank, kernels)) / largest,
        "weight_l1": np.abs(weights).sum(),
        "weight_l2": np.sqrt((weights**2).sum()),
        "dead_units": np.mean(np.concatenate([(h == 0).all(0) for h in hidden])),
        "weight_magnitude": np.abs(weights).mean(),
        "effective_rank": np.mean(effective),
        "stable_rank": np.mean(stable),
    }


def directly(method):
    """Make continual backpropagation with the method's numbers, without tracers and without a bound on replacements."""

    def make_tx(units, key):
        numbers = {name: value for name, value in method.hyperparameters.items() if name != "step_size"}
        inner = optax.sgd(method.hyperparameters["step_size"])
        return cbp_jax.continual_backprop(inner, units, **numbers, key=key)

    return make_tx


def assert_is(measured, expected, more=()):
    """Assert equality within rounding of float32, and exactly for counts and small fractions."""
    assert set(measured) == {"accuracy", "loss", "replaced_units", *SYMPTOMS, *more}
    for name, values in measured.items():
        np.testing.assert_allclose(values, expected[name], rtol=2e-4, atol=1e-6, err_msg=name)


def lane(together, number):
    return {name: values[:, number] for name, values in together.items()}


@pytest.fixture(scope="module")
def expected(problem):
    """Run a plain loop for the first lane."""
    seed, method = LANES[0]
    return reference(problem, seed, directly(method))


def test_a_lane_equals_a_plain_loop_with_its_seed_and_numbers(together, expected):
    assert_is(lane(together, 0), expected)
    # The reference distinguishes measures before and after an update, and sees dead units and replacements.
    assert np.all(expected["loss"] > expected["loss_after"] + 0.02)
    assert not np.allclose(expected["accuracy"], expected["accuracy_after"], atol=0.01)
    assert np.all(expected["replaced_units"] > 10)
    for name in SYMPTOMS:
        assert len(set(np.round(expected[name], 6))) > 1, f"{name} is constant: it could not distinguish tasks"


def test_a_method_does_not_depend_on_those_it_runs_with(together, problem):
    # Alone, it has a lower bound on replacements, which depends on the largest rate of a grid.
    seed, method = LANES[2]
    assert_is(lane(together, 2), reference(problem, seed, directly(method)))


@pytest.mark.parametrize("number", range(len(LANES)))
def test_a_lane_equals_its_solo_run(together, alone, number):
    start, task = alone
    state = start(*LANES[number])
    for index in range(TASKS):
        state, measures = task(state)
        for name, value in measures.items():
            np.testing.assert_allclose(together[name][index, number], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert int(state.task) == TASKS


def test_lanes_differ(together):
    for other in (1, 2):
        assert not np.allclose(together["loss"][:, 0], together["loss"][:, other], rtol=1e-3)
    # Lanes of one seed have the same weights and examples before the first task. A lower rate replaces fewer units.
    for name in SYMPTOMS:
        assert together[name][0, 0] == together[name][0, 2]
    assert together["weight_magnitude"][0, 0] != together["weight_magnitude"][0, 1]
    assert np.all(0 < together["replaced_units"][:, 2])
    assert np.all(together["replaced_units"][:, 2] < together["replaced_units"][:, 0] / 2)


def test_vmap_and_map_give_the_same_results(together, quick_compilation):
    # Batched matrix products sum in another order, so results are equal within rounding, not to the last bit.
    for name, values in run_lanes("vmap").items():
        np.testing.assert_allclose(values, together[name], rtol=1e-6, err_msg=name)


@pytest.mark.slow  # starts another process; test_lanes.py tests two devices, too
def test_two_devices_give_the_same_results_as_one(together, tmp_path):
    script = f"""
import jax, runpy, numpy
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)
numpy.savez({str(tmp_path / "two.npz")!r}, devices=len(jax.devices()), **runpy.run_path({__file__!r})["run_lanes"]())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    two = dict(np.load(tmp_path / "two.npz"))
    assert two.pop("devices") == 2
    assert two.keys() == together.keys()
    for name, values in two.items():
        np.testing.assert_allclose(values, together[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_run_resumes_from_its_state(alone):
    start, task = alone
    whole, measured = start(0, HIGH), []
    for _ in range(TASKS):
        whole, measures = task(whole)
        measured.append(measures)

    half, _ = task(start(0, HIGH))
    leaves, treedef = jax.tree.flatten(half)
    kept = [np.array(leaf) for leaf in leaves]  # as in a checkpoint: plain arrays
    assert all(array.dtype.kind in "fiub" for array in kept)
    rest = jax.tree.unflatten(treedef, [jnp.asarray(array) for array in kept])
    for index in range(1, TASKS):
        rest, measures = task(rest)
        jax.tree.map(np.testing.assert_array_equal, measures, measured[index])
    jax.tree.map(np.testing.assert_array_equal, rest, whole)


@pytest.mark.slow
def test_running_statistics_are_carried_and_those_of_replaced_units_are_reset(quick_compilation):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    problem = label_permuted(
        Dataset(images, np.arange(6, dtype=np.int32) % 3, 3, "toy"), examples_per_task=6, batch_size=3, flatten=False
    )
    method = parse_method("cbp:step_size=0.1,replacement_rate=0.4,maturity_threshold=1")
    network = "resnet18:widths=(3,),blocks=(1,)"
    learner = make_learner([method], (3,), "relu", problem.input_shape, 3, network=network)
    start = jax.jit(lambda: init_state(learner, 0, method.hyperparameters))()
    end, measured = jax.jit(lambda data, state: run_task(learner, problem, data, state, measured_examples=6))(
        problem.data, start
    )

    net = nets.read(network).make(problem.input_shape, 3)
    keys = stream_keys(start.key)
    tx, task = (
        learner.optimizer(method.hyperparameters, keys.optimizer),
        problem.make_task(problem.data, keys.problem, 0),
    )

    def loss(params, x, y):
        features = with_features(partial(net.apply, train=True, mutable=["batch_stats"]), learner.units)
        (outputs, statistics), features = features(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean(), (features, statistics)

    @jax.jit
    def step(params, opt_state, x, y):
        grads, (features, statistics) = jax.grad(loss, has_aux=True)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params, features=features)
        params = optax.apply_updates(params, updates)
        fresh = reset_batch_stats(statistics, learner.units, opt_state.replaced)
        return {**params, **fresh}, opt_state, sum(map(jnp.sum, opt_state.replaced.values()))

    params, opt_state, replaced = start.params, start.opt_state, 0
    for number in range(problem.steps_per_task):
        params, opt_state, count = step(params, opt_state, *problem.batch(problem.data, task, number))
        replaced += count
    assert float(measured["replaced_units"]) == replaced > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), end.params, params)
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(end.params["batch_stats"]))


def test_a_step_after_the_last_task_is_repeated_if_it_was_interrupted(tmp_path):
    tasks, finished = [], []

    def run(finish):
        start = lambda seed, numbers: seed + numbers["offset"]
        go_on = lambda _, state: (state + 1, {"state": state})
        checkpoint = Checkpoint(tmp_path / "state", "lanes")
        numbers = {"offset": np.array([10, 20])}
        tasks.extend(run_any(start, go_on, None, np.arange(2), numbers, 3, checkpoint=checkpoint, finish=finish))

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert len(tasks) == 3 and (tmp_path / "state").is_file()
    run(finished.append)
    assert len(tasks) == 3, "no task is run again"
    np.testing.assert_array_equal(finished, [[13, 24]])


def test_results_are_numpy_arrays_with_a_row_for_each_lane(together):
    for values in together.values():
        assert isinstance(values, np.ndarray) and values.shape == (TASKS, len(LANES)) and values.dtype == np.float32


def measured_lane(problem, learner, method, every, tasks=TASKS):
    """Return {measure: [tasks]} of seed 0, with updates measured."""
    task = jax.jit(lambda data, s: run_task(learner, problem, data, s, measured_examples=MEASURED, measure_every=every))
    numbers = jax.tree.map(jnp.float32, dict(method.hyperparameters))
    state, rows = jax.jit(lambda numbers: init_state(learner, 0, numbers))(numbers), []
    for _ in range(tasks):
        state, row = task(problem.data, state)
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
def test_updates_are_measured_on_the_examples_that_they_learn_from(together, problem, expected):
    measured = measured_lane(problem, tiny_learner(problem, [HIGH, LOW]), HIGH, EVERY)
    assert_is(measured, expected, OF_UPDATES)
    # Measuring updates does not change the other measures.
    for name, values in lane(together, 0).items():
        np.testing.assert_allclose(measured[name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    # The reference distinguishes the plasticity of examples from that of the mean loss; all gradients contain zeros.
    assert np.all(np.abs(expected["plasticity"] - expected["plasticity_of_the_mean"]) > 2e-4)
    assert np.all((0.2 < expected["gradient_l0"]) & (expected["gradient_l0"] < 1))
    for name in ("plasticity", "gradient_l0", "gradient_l1", "gradient_l2", "weight_l1", "weight_l2"):
        assert len(set(np.round(expected[name], 6))) > 1, f"{name} is constant: it could not distinguish tasks"


@pytest.mark.slow
def test_a_regression_with_curvature_equals_a_plain_loop():
    problem = slowly_changing_regression(examples_per_task=8, batch_size=2)
    method = parse_method("upgd:step_size=0.005,sigma=0.1,beta_utility=0.9,order=2,activation=tanh")
    learner = make_learner([method], (3,), "relu", problem.input_shape, 1)
    assert learner.curvature
    measured = measured_lane(problem, learner, method, every=1, tasks=2)
    assert "accuracy" not in measured and set(OF_UPDATES) <= set(measured)

    params_key, problem_key, optimizer_key, _ = jax.random.split(jax.random.key(0), 4)
    net = nets.MLP((3,), 1, "tanh")
    params = jax.jit(net.init)(params_key, jnp.zeros((1, 21)))
    tx = cbp_jax.upgd(0.005, beta_utility=0.9, sigma=0.1, order=2, key=optimizer_key)

    @jax.jit
    def step(params, state, index, number):
        x, y = problem.batch((), problem.make_task((), problem_key, index), number)
        losses = lambda params: jnp.square(net.apply(params, x) - y).sum(-1)
        before = losses(params)
        grads = jax.grad(lambda params: losses(params).mean())(params)
        _, _, diagonal = curvature.hesscale(net.apply, params, x, y, "squared_error")
        updates, state = tx.update(grads, state, params, hessian_diag=diagonal)
        params = optax.apply_updates(params, updates)
        return params, state, before.mean(), metrics.plasticity(before, losses(params)).mean()

    state = tx.init(params)
    for index in range(2):
        rows = []
        for number in range(problem.steps_per_task):
            params, state, *row = step(params, state, index, number)
            rows.append(row)
        for name, values in zip(("loss", "plasticity"), np.transpose(rows), strict=True):
            assert measured[name][index] == pytest.approx(values.mean(), rel=1e-4), name


def test_plasticity_is_measured_with_the_dropout_of_training(problem):
    method = parse_method("dropout:step_size=0,dropout_rate=0.5")
    measured = measured_lane(problem, tiny_learner(problem, [method]), method, every=1, tasks=1)
    # With a step size of 0, the losses before and after are equal if and only if the same units are dropped.
    assert measured["plasticity"] == 0 and measured["gradient_l2"] > 0.1


def test_running_statistics_are_not_measured_as_weights(problem):
    method = parse_method("online_norm:step_size=0.01")
    learner = tiny_learner(problem, [method])
    params = jax.jit(learner.init)(jax.random.key(0))
    x = jnp.ones((MEASURED, *problem.input_shape))
    measured = jax.jit(lambda params: measure(learner, params, x, matrices=True))(params)
    weights = {name: leaves for name, leaves in params.items() if name == "params"}
    assert len(params) > 1 and weights
    assert float(measured["weight_l2"]) == pytest.approx(float(optax.tree.norm(weights)), rel=1e-5)
    assert float(measured["weight_magnitude"]) == pytest.approx(float(metrics.weight_magnitude(weights)), rel=1e-5)


def test_a_reference_batch_comes_from_earlier_steps_of_the_task():
    """Learners that ask for it get one; here the optimizer records it."""

    def make_batch(data, task, number):
        return data[number][None], jnp.zeros(1, jnp.int32)

    problem = types.SimpleNamespace(
        data=jnp.arange(12.0)[:, None],
        make_task=lambda data, key, task: task,
        evaluation=lambda data, task, count: (data, None),
        batch=make_batch,
        loss="softmax_cross_entropy",
        steps_per_task=12,
        test=None,
    )
    learner = make_learner([parse_method("c_chain:reference=5")], (3,), "relu", (1,), 2)

    def keeping(numbers, key):
        def update(grads, state, params, *, reference, **extra):
            count, kept = state
            return jax.tree.map(jnp.zeros_like, grads), (count + 1, kept.at[count].set(reference[:, 0]))

        return optax.GradientTransformationExtraArgs(lambda params: (jnp.int32(0), jnp.full((12, 5), -1.0)), update)

    learner = learner._replace(optimizer=keeping)
    state = init_state(learner, jnp.int32(0), {})
    state, _ = jax.jit(lambda state: run_task(learner, problem, problem.data, state))(state)
    kept = np.asarray(state.opt_state[1])
    assert (kept[0] == 0).all()  # there is no earlier step than the first
    assert all((kept[n] < n).all() and (kept[n] >= 0).all() for n in range(1, 12))
    assert len(np.unique(kept[8:])) > 5
