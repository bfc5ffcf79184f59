import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from same_runs import same

import cbp_jax
from cbp_jax import data, problems, training
from cbp_jax.experiments import learners, question_tickets
from cbp_jax.experiments.questions import ticket_reports, tickets
from cbp_jax.units import leaves_by_path
from cbp_jax.units.groups import Consumer, ParamSlice, UnitGroup

preset, run = question_tickets.preset, question_tickets.run
# One program of each kind: programs with several methods are tested with other streams.
SMOKE = dataclasses.replace(preset("smoke"), methods=preset("smoke").methods[1:], hidden=(12,), tasks=3)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, compiled_once):
    out, calls = tmp_path_factory.mktemp("runs") / "smoke", []
    return run(SMOKE, out, lambda *args: calls.append(args)), out, calls


@pytest.mark.slow  # of the run with all its networks
def test_a_run_measures_before_every_second_task(smoke):
    results, out, calls = smoke
    assert results.identical(cbp_jax.load_results(out)) and len(calls) == 3
    assert dict(results.sizes) == {"method": 1, "seed": 2, "task": 3, "round": 4}
    for name in ("density", "ticket_accuracy", "random_accuracy"):
        found = np.isfinite(results[name].values)[0]
        assert found[:, [0, 2]].all() and not found[:, 1].any(), name
    for name in ("young", "young_chance"):
        found = np.isfinite(results[name].values)[0]
        assert found[:, 2].all() and not found[:, :2].any(), name
        assert (results[name].values[0, :, 2] > 0).all()
    assert np.isfinite(results.accuracy).all() and np.isfinite(results.effective_rank).all()
    kernels = [64 * 12, 12 * 10]
    living, density = list(kernels), [1.0]
    for _ in range(3):
        living = [n - round(rate * n) for n, rate in zip(living, (0.3, 0.15), strict=True)]
        density.append(sum(living) / sum(kernels))
    np.testing.assert_allclose(results.density.values[0, :, 2], [density] * 2, rtol=1e-6)
    dense, random = results.ticket_accuracy.values[0, :, [0, 2]], results.random_accuracy.values[0, :, [0, 2]]
    np.testing.assert_array_equal(dense[..., 0], random[..., 0])
    assert (dense[..., 1:] != random[..., 1:]).any()


@pytest.mark.slow
@pytest.mark.slow  # of the run with all its networks
def test_measuring_does_not_change_the_stream(smoke, tmp_path):
    results, _, _ = smoke
    never = run(dataclasses.replace(SMOKE, every=3), tmp_path)
    for name in ("accuracy", "loss", "effective_rank", "replaced_units"):
        np.testing.assert_array_equal(never[name], results[name])


@pytest.mark.slow
@pytest.mark.slow  # of the run with all its networks
def test_an_interrupted_run_resumes_exactly(smoke, tmp_path):
    whole, _, _ = smoke

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SMOKE, tmp_path, stop)
    partial = cbp_jax.load_results(tmp_path)
    assert np.isfinite(partial.density.values[:, :, 0]).all() and np.isnan(partial.accuracy.values[:, :, 1:]).all()
    assert ticket_reports.finished(tickets.measured(partial)) == (partial.method.values.tolist(), 1)
    assert question_tickets.plot(partial, tmp_path / "pictures")[0].is_file()
    assert same(run(SMOKE, tmp_path), whole)


@pytest.mark.slow  # of the run with all its networks
def test_the_table_has_means_over_seeds(smoke):
    results, _, _ = smoke
    table = question_tickets.summary(results)
    assert "first and last third of 2 measurements" in table and "(one method)" in table
    settings = json.loads(results.attrs["settings"])
    dense = 100 * results.ticket_accuracy.values[0, :, 2, 0].astype(float).mean()
    assert f"{dense:.1f} [" in table and settings["tolerance"] == 0.01


@pytest.mark.slow
@pytest.mark.slow  # of the run with all its networks
def test_pictures(smoke, tmp_path):
    results, _, _ = smoke
    paths = question_tickets.plot(results, tmp_path)
    assert [path.name for path in paths] == ["tickets.png", "measures.png", "curves.png"]
    with pytest.raises(ValueError, match="nothing to draw"):
        question_tickets.plot(results * np.nan, tmp_path)


def reference_round(accuracy, tolerance):
    last = 0
    for number, value in enumerate(accuracy):
        if value < accuracy[0] - tolerance:
            break
        last = number
    return last


def test_the_sparsest_round_that_matches():
    rng = np.random.default_rng(0)
    curves = 0.8 + 0.1 * rng.normal(size=(50, 3, 6))
    found = tickets.matching_round(curves, 0.05)
    expected = [[reference_round(curve, 0.05) for curve in row] for row in curves]
    np.testing.assert_array_equal(found, expected)
    assert set(np.unique(found)) > {0, 1, 2}
    assert tickets.matching_round(np.full(4, np.nan), 0.1) == 0


def test_young_weights_and_their_chance_by_counting():
    rng = np.random.default_rng(0)
    shapes = {"w0": (3, 5), "w1": (5, 4), "w2": (4, 2)}
    groups = [
        UnitGroup(
            name, size, (ParamSlice.whole_axis(name, 1, size),), (), (Consumer(ParamSlice.whole_axis(after, 0, size)),)
        )
        for name, after, size in (("w0", "w1", 5), ("w1", "w2", 4))
    ]
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    living = {path: rng.random(shape) < 0.4 for path, shape in shapes.items()}
    first, second = np.array([3, 10, 12, 9, 10]), np.array([10, 99, 0, 10])
    young = tickets.young_weights(groups, {"w0": jnp.asarray(first), "w1": jnp.asarray(second)}, params, below=10)
    new = [np.zeros(3, bool), first < 10, second < 10, np.zeros(2, bool)]
    there = expected = alive = 0
    for number, (path, shape) in enumerate(shapes.items()):
        one = np.array([[new[number][i] or new[number + 1][j] for j in range(shape[1])] for i in range(shape[0])])
        np.testing.assert_array_equal(young[path], one)
        there, alive = there + (living[path] & one).sum(), alive + living[path].sum()
        expected += living[path].mean() * one.sum()
    found = tickets.young_shares(living, young)
    np.testing.assert_allclose([found["young"], found["young_chance"]], [there / alive, expected / alive], rtol=1e-6)


@pytest.mark.slow
def test_a_ticket_equals_pruning_by_hand():
    images = data.load("digits")
    problem = problems.online_permuted(images, examples_per_task=40)
    learner = learners.make_learner(learners.read_methods(["bp"]), (6,), "relu", problem.input_shape, 10)
    state = training.init_state(learner, 3, {"step_size": jnp.float32(0.01)})
    (trainer,) = learners.read_methods(["bp:step_size=0.1"])
    found = tickets.find_tickets(
        learner, problem, problem.data, state, trainer=trainer, rounds=1, fraction=0.5, young_below=1
    )
    assert set(found) == {"density", "ticket_accuracy", "random_accuracy"}
    task = problem.make_task(problem.data, training.learner.stream_keys(state.key).problem, 0)
    start = {path: np.asarray(leaf, np.float64) for path, leaf in leaves_by_path(state.params).items()}
    kernels = [path for path, leaf in start.items() if leaf.ndim == 2]
    living = {path: np.ones_like(leaf) for path, leaf in start.items()}
    for number in range(2):
        w, right = {path: leaf * living[path] for path, leaf in start.items()}, 0
        for step in range(40):
            x, y = (np.asarray(part)[0] for part in problem.batch(problem.data, task, step))
            h = np.maximum(x @ w["params/Dense_0/kernel"] + w["params/Dense_0/bias"], 0)
            z = h @ w["params/Dense_1/kernel"] + w["params/Dense_1/bias"]
            right += z.argmax() == y
            d = np.exp(z - z.max()) / np.exp(z - z.max()).sum() - np.eye(10)[y]
            e = (w["params/Dense_1/kernel"] @ d) * (h > 0)
            grads = {"params/Dense_1/kernel": np.outer(h, d), "params/Dense_1/bias": d,
                     "params/Dense_0/kernel": np.outer(x, e), "params/Dense_0/bias": e}  # fmt: skip
            w = {path: (leaf - 0.1 * grads[path]) * living[path] for path, leaf in w.items()}
        assert float(found["ticket_accuracy"][number]) == pytest.approx(right / 40)
        for path, rate in zip(kernels, (0.5, 0.25), strict=True):
            cut = np.argsort(np.abs(w[path]), None)[: round(rate * w[path].size)]
            living[path].ravel()[cut] = 0


@pytest.mark.slow
def test_networks_that_diverge_have_no_accuracy():
    problem = problems.online_permuted(data.load("digits"), examples_per_task=20)
    learner = learners.make_learner(learners.read_methods(["bp"]), (6,), "relu", problem.input_shape, 10)
    state = training.init_state(learner, 3, {"step_size": jnp.float32(0.01)})
    (trainer,) = learners.read_methods(["bp:step_size=1e20"])
    found = tickets.find_tickets(
        learner, problem, problem.data, state, trainer=trainer, rounds=1, fraction=0.5, young_below=1
    )
    assert np.isnan(found["ticket_accuracy"]).all() and np.isnan(found["random_accuracy"]).all()


@pytest.mark.slow  # of the run with all its networks
def test_tickets_that_diverged_are_left_out(smoke):
    results = smoke[0].copy(deep=True)
    whole = tickets.measured(results)
    results["ticket_accuracy"][0, 1, 2, 2] = np.nan  # the second of three rounds with a ticket
    found = tickets.measured(results)
    (method,) = results.method.values.tolist()
    for name in ("log_density", "dense_accuracy", "advantage", "best_accuracy"):
        assert np.isfinite(found[name][method]).all(), name
        np.testing.assert_array_equal(found[name][method][0], whole[name][method][0])
    gains = (results.ticket_accuracy - results.random_accuracy).values[0, 1, 2, [1, 3]]
    assert found["advantage"][method][1, 1] == pytest.approx(gains.mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"every": 9}, "every must be at most tasks = 3, got 9"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"fraction": 0.0}, "fraction must be above 0, got 0"),
        ({"fraction": 1.0}, "fraction must be in"),
        ({"tolerance": -0.1}, "tolerance must be in"),
        ({"ticket_learner": "cbp"}, "ticket_learner must need no units"),
        ({"ticket_learner": "sgd"}, "the learner must be one of"),
        ({"methods": ("online_norm",)}, "running statistics do not fit"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_computed(changes, message):
    with pytest.raises(ValueError, match=message):
        question_tickets.prepare(dataclasses.replace(SMOKE, **changes))
