import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import metrics, nets
from cbp_jax.data import Dataset
from cbp_jax.experiments.learners import make_learner, parse_method
from cbp_jax.problems import class_incremental
from cbp_jax.training import Checkpoint, increments, init_state, run_increment, run_increments, step_size_factor

CLASSES, EPOCHS, MEASURED = 4, 5, 8


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), 14)
    images = (rng.integers(0, 130, (len(labels), 4, 4, 1)) + 30 * labels[:, None, None, None]).astype(np.uint8)
    return class_incremental(
        Dataset(images, labels, CLASSES, "toy"),
        classes_per_increment=2,
        train_per_class=6,
        validation_per_class=4,
        test_per_class=4,
        batch_size=4,
        padding=1,
    )


def tiny_resnet(num_outputs, hidden, activation, **settings):
    return nets.ResNet(num_outputs, hidden, (1,), **settings)


def start_and_task(problem, text, **settings):
    method = parse_method(text)
    learner = make_learner([method], (4,), "relu", problem.input_shape, CLASSES, network=tiny_resnet)
    numbers = jax.tree.map(jnp.float32, dict(method.hyperparameters))
    state = jax.jit(lambda: init_state(learner, 0, numbers))()
    run = jax.jit(
        lambda data, state: run_increment(
            learner, problem, data, state, epochs=EPOCHS, measured_examples=MEASURED, **settings
        )
    )
    return state, lambda state: run(problem.data, state)


@pytest.fixture(scope="module")
def carried(problem):
    return start_and_task(problem, "l2:step_size=0.3,momentum=0.9,l2=1e-2")


def test_the_step_size_falls_as_in_the_paper():
    factors = np.array([step_size_factor(epoch, 200) for epoch in range(200)])
    assert sorted(set(np.flatnonzero(np.diff(factors)) + 1)) == [60, 120, 160]
    np.testing.assert_allclose(factors[[0, 60, 120, 160]], [1, 0.2, 0.04, 0.008], rtol=1e-5)
    assert [round(float(step_size_factor(epoch, 5)), 3) for epoch in range(5)] == [1, 1, 0.2, 0.04, 0.008]


@pytest.mark.slow
def test_a_run_equals_a_plain_loop(problem, carried):
    """Two increments: unseen classes are left out, statistics and momentum carried over, and the best weights kept."""
    state, task_fn = carried
    net = nets.ResNet(CLASSES, (4,), (1,))
    params_key, problem_key, _, _ = jax.random.split(jax.random.key(0), 4)
    variables = jax.jit(net.init)(params_key, jnp.zeros((1, 4, 4, 1)))
    params, stats = variables["params"], variables["batch_stats"]
    trace = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params, stats, trace, x, y, classes, step_size):
        def loss(params):
            outputs, new = net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            logits = outputs[:, classes]  # only of the current classes, in their order
            place = jnp.argmax(classes == y[:, None], 1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, place).mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        trace = jax.tree.map(lambda t, g, w: 0.9 * t + g + 1e-2 * w, trace, grads, params)
        return jax.tree.map(lambda w, t: w - step_size * t, params, trace), stats, trace, value

    def accuracy(split, params, stats, classes):
        correct = []
        for number in classes.tolist():
            x, _ = problem.held_out(problem.data, split, number)
            outputs = apply({"params": params, "batch_stats": stats}, x)[:, classes]
            correct += (classes[jnp.argmax(outputs, 1)] == number).tolist()
        return np.mean(correct)

    apply, order_of, batch_of = jax.jit(net.apply), jax.jit(problem.order), jax.jit(problem.batch)
    for index in range(2):
        state, measures = task_fn(state)
        task = problem.make_task(problem.data, problem_key, index)
        classes = task.classes[: 2 * (index + 1)]
        losses, best = [], (-1.0, None)
        for epoch, factor in enumerate([1, 1, 0.2, 0.04, 0.008]):
            order = order_of(problem.data, task, epoch)
            for number in range(3 * (index + 1)):
                x, y = batch_of(problem.data, task, epoch, order, number)
                params, stats, trace, loss = step(params, stats, trace, x, y, classes, 0.3 * factor)
                losses.append(float(loss))
            found = accuracy("validation", params, stats, classes)
            if found > best[0] + 1e-6:
                best = found, (params, stats), epoch
        params, stats = best[1]
        assert measures["validation_accuracy"] == pytest.approx(best[0], abs=1e-6)
        assert measures["test_accuracy"] == pytest.approx(accuracy("test", params, stats, classes), abs=1e-6)
        assert measures["loss"] == pytest.approx(np.mean(losses), rel=2e-3)
        assert measures["replaced_units"] == 0
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3)
        jax.tree.map(close, state.params, {"params": params, "batch_stats": stats})
        # The next increment starts from the tested values, so that rounding errors do not add up.
        params, stats = state.params["params"], state.params["batch_stats"]
        trace = optax.tree.get(state.opt_state, "trace")["params"]
    assert best[2] < EPOCHS - 1, "the best epoch is the last, so early stopping is not tested"


def test_the_best_weights_are_kept_with_early_stopping_and_the_last_without(problem):
    found = {}
    for early in (True, False):
        # The step size of the last epoch is so large that it spoils the weights.
        state, task_fn = start_and_task(
            problem,
            "bp:step_size=0.3,momentum=0.9",
            early_stopping=early,
            schedule=lambda epoch, epochs: jnp.where(epoch == epochs - 1, 1e3, 1.0),
        )
        after, measures = task_fn(state)
        task = problem.make_task(problem.data, jax.random.split(jax.random.key(0), 4)[1], 0)
        classes, correct = task.classes[:2], []
        for number in classes.tolist():
            x, _ = problem.held_out(problem.data, "validation", number)
            outputs = nets.ResNet(CLASSES, (4,), (1,)).apply(after.params, x)[:, classes]
            correct += (classes[jnp.argmax(outputs, 1)] == number).tolist()
        assert measures["validation_accuracy"] == pytest.approx(np.mean(correct))
        found[early] = np.mean(correct)
    assert found[True] > found[False]


def test_networks_are_measured_before_each_increment_on_classes_to_come(problem, carried):
    state, task_fn = carried
    _, problem_key, _, _ = jax.random.split(jax.random.key(0), 4)
    net = nets.ResNet(CLASSES, (4,), (1,))
    after, measures = task_fn(state)
    task = problem.make_task(problem.data, problem_key, 0)
    x, _ = problem.evaluation(problem.data, task, MEASURED)
    units = cbp_jax.discover_units(net.apply, state.params, x)
    _, features = jax.jit(cbp_jax.with_features(net.apply, units))(state.params, x)
    pooled = next(h for h in jax.tree.leaves(features) if h.ndim == 2)
    assert pooled.shape == (MEASURED, 4)
    singular = np.linalg.svd(np.float64(pooled), compute_uv=False)
    expected = (1 + (np.cumsum(singular) < 0.99 * singular.sum()).sum()) / 4
    assert measures["stable_rank"] == pytest.approx(expected)
    weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params["params"])])
    assert measures["weight_magnitude"] == pytest.approx(np.abs(weights).mean(), rel=1e-5)
    assert int(after.task) == 1


@pytest.mark.slow
def test_statistics_of_replaced_channels_are_reset(problem):
    text = "cbp:step_size=0.1,momentum=0.9,l2=5e-4,replacement_rate=1,maturity_threshold=0"
    state, task_fn = start_and_task(problem, text, early_stopping=False)
    state, measures = task_fn(state)
    # With a rate of 1, all channels are replaced in every update, including the last one.
    units = sum(mask.size for mask in jax.tree.leaves(state.opt_state.replaced))
    assert all(mask.all() for mask in state.opt_state.replaced.values())
    assert measures["replaced_units"] == units * EPOCHS * 3
    for norm in state.params["batch_stats"].values():
        np.testing.assert_array_equal(norm["mean"], np.zeros(4))
        np.testing.assert_array_equal(norm["var"], np.ones(4))


@pytest.mark.parametrize("reset", ["head", "network"])
def test_resets_draw_new_weights_before_each_increment_but_the_first(problem, reset):
    method = parse_method(f"l2:step_size=0.3,momentum=0.9,reset={reset}")
    learner = make_learner([method], (4,), "relu", problem.input_shape, CLASSES, network=tiny_resnet)
    params = jax.jit(learner.init)(jax.random.key(0))
    tx = optax.sgd(0.1, momentum=0.9)
    state = jax.tree.map(lambda leaf: leaf + 1, tx.init(params))
    begin = jax.jit(lambda key, task: learner.begin_task(tx, key, task, params, state))
    jax.tree.map(np.testing.assert_array_equal, begin(jax.random.key(1), 0), (params, state))
    after, after_state = begin(jax.random.key(1), 1)
    fresh = jax.jit(learner.init)(jax.random.key(1))
    old_or_new = lambda name: fresh if reset == "network" or name == "head" else params
    for name, layer in after["params"].items():
        jax.tree.map(np.testing.assert_array_equal, layer, old_or_new(name)["params"][name])
        moments = jax.tree.leaves(after_state[0].trace["params"][name])
        assert all((leaf == (old_or_new(name) is params)).all() for leaf in moments)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], old_or_new("")["batch_stats"])


def test_learners_that_differ_only_in_what_they_reset_share_the_programs_of_measurement_and_training(problem):
    programs = []
    for reset in ("", ",reset=head", ",reset=network"):
        method = parse_method("l2:step_size=0.1" + reset)
        learner = make_learner([method], (4,), "relu", problem.input_shape, CLASSES)
        state = jax.eval_shape(lambda: init_state(learner, 0, method.hyperparameters))  # noqa: B023
        own = increments.increment_programs(learner, problem, epochs=2, measured_examples=MEASURED)
        programs.append([jax.jit(program).lower(problem.data, state).as_text() for program in own])
    assert [len(set(each)) for each in zip(*programs, strict=True)] == [1, 3, 1]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_an_interrupted_run_resumes_exactly(problem, tmp_path):
    method = parse_method("cbp:step_size=0.1,momentum=0.9,l2=5e-4,replacement_rate=0.1,maturity_threshold=2")
    learner = make_learner([method], (4,), "relu", problem.input_shape, CLASSES, network=tiny_resnet)
    numbers = {name: np.full(2, value, np.float32) for name, value in method.hyperparameters.items()}

    def run(name):
        checkpoint = Checkpoint(tmp_path / name, "cbp", every=0.0)
        settings = {"epochs": 2, "measured_examples": MEASURED}
        return run_increments(learner, problem, np.arange(2), numbers, 2, checkpoint=checkpoint, **settings)

    whole, broken_off = list(run("whole")), run("broken off")
    for _ in range(2):
        next(broken_off)
    broken_off.close()  # the second increment is finished, but its state is not saved
    (last,) = run("broken off")
    for name, values in last.items():
        np.testing.assert_array_equal(values, whole[1][name], name)
    assert (tmp_path / "broken off").read_bytes() == (tmp_path / "whole").read_bytes()
    # Lanes differ, and units were replaced in both increments, so that utilities and ages matter.
    assert all((row["replaced_units"] > 0).all() for row in whole) and len(set(last["loss"])) == 2


@pytest.mark.slow
def test_the_last_hidden_layer_is_the_last_in_forward_order():
    """With more than ten layers, the last by name is another one."""
    method = parse_method("bp")
    deep = make_learner([method], (2,) * 10 + (5,), "tanh", (4,), CLASSES)
    state = init_state(deep, 0, {"step_size": 0.1})
    x = jnp.ones((3, 4))
    found = increments._measure(deep, state.params, x, 0.01)
    assert deep.units[-1].size == 5
    np.testing.assert_allclose(found["stable_rank"], 1 / 5)  # three copies of one example have rank 1


def test_ranks_of_layers_whose_units_all_have_positions():
    """A unit of `crelu` has two outputs, which count as examples, as they do in other experiments."""
    learner = make_learner([parse_method("crelu")], (3, 4), "relu", (5,), CLASSES)
    state = init_state(learner, 0, {"step_size": 0.1})
    x = jax.random.normal(jax.random.key(1), (6, 5))
    found = increments._measure(learner, state.params, x, 0.01)
    last = learner.predict(state.params, x)[1][learner.units[-1].name]
    assert last.shape == (6, 2, 4)
    np.testing.assert_allclose(found["stable_rank"], metrics.ranks(last.reshape(12, 4)).stable / 4, rtol=1e-6)
