import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_runs import same
from scipy import linalg, stats

import cbp_jax
from cbp_jax import data, problems, training
from cbp_jax.experiments import learners, question_rank
from cbp_jax.experiments.questions import drawing, rank_reports, ranks
from cbp_jax.experiments.questions.ranks import MEASURES
from cbp_jax.units import leaves_by_path

run = ranks.measured_stream.run
SMOKE = ranks.StreamSettings(
    dataset="digits",
    methods=("bp:step_size=0.01", "bp:step_size=0.03", "bp:step_size=0.1"),
    seeds=2,
    tasks=5,
    examples_per_task=80,
    measured_examples=50,
    hidden=(10,),
    earlier=2,
)
OF_EARLIER = ("overlap", "earlier_accuracy", "forgetting")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, compiled_once):
    out = tmp_path_factory.mktemp("runs") / "smoke"
    return run(SMOKE, out), out


@pytest.mark.slow
def test_results_are_those_of_the_best_settings(tmp_path):
    settings = dataclasses.replace(question_rank.preset("smoke"), methods=("bp", "l2"), hidden=(10,))
    results = question_rank.run(settings, tmp_path)
    reported = cbp_jax.load_results(tmp_path / "reported")
    assert results.chosen.values.tolist() == reported.method.values.tolist()
    assert np.isfinite(results.tuning_performance).all() and results.sizes["candidate"] == 12
    for name in MEASURES:
        np.testing.assert_array_equal(results[name], reported[name], err_msg=name)


def test_a_run_of_streams_from_end_to_end(smoke):
    results, out = smoke
    assert results.identical(cbp_jax.load_results(out))
    assert dict(results.sizes) == {"method": 3, "seed": 2, "task": 5}
    for name in MEASURES:
        values = results[name].values
        assert np.isfinite(values[..., 2:]).all(), name
        assert np.isnan(values[..., :2]).all() == (name in OF_EARLIER), name
    # The overlap by chance: 5 directions among 64 inputs, or 5 among 10.
    assert (results.overlap.values[..., 2:] > 0.05).all() and (results.overlap.values[..., 2:] < 1).all()
    then = (results.learned_accuracy[..., 1].values + results.learned_accuracy[..., 2].values) / 2
    np.testing.assert_allclose(results.forgetting[..., 3], then - results.earlier_accuracy[..., 3], atol=1e-6)


@pytest.mark.slow
def test_a_task_against_numpy():
    images = data.load("digits")
    problem = problems.online_permuted(images, examples_per_task=20)
    learner = learners.make_learner(learners.read_methods(["bp"]), (6,), "relu", problem.input_shape, 10)
    states = [ranks.init_state(learner, 1, 3, 5, {"step_size": jnp.float32(0.1)})]
    go_on = jax.jit(lambda state: ranks.run_task(learner, problem, problem.data, state, measured_examples=60))
    for _ in range(2):
        state, found = go_on(states[-1])
        states.append(state)
    before, after = ({path: np.asarray(leaf, np.float64) for path, leaf in leaves_by_path(state.train.params).items()}
                     for state in states[1:])  # fmt: skip
    first = {path: np.asarray(leaf, np.float64) for path, leaf in leaves_by_path(states[0].train.params).items()}
    shares, overlaps = [], []
    for path in (path for path, leaf in first.items() if leaf.ndim == 2):
        singular = np.linalg.svd(after[path] - before[path])[1]
        parts = np.cumsum(singular) / singular.sum()
        shares.append((1 + np.sum(parts < 0.99 * (1 - 1e-6))) / min(first[path].shape))
        reads = [np.linalg.svd(b - a)[0][:, :3] for a, b in ((first[path], before[path]), (before[path], after[path]))]
        overlaps.append(np.mean(np.cos(linalg.subspace_angles(*reads)) ** 2))
    np.testing.assert_allclose(found["change_rank"], np.mean(shares), rtol=1e-5)
    np.testing.assert_allclose(found["overlap"], np.mean(overlaps), rtol=1e-4)

    def accuracy(weights, index):
        task = problem.make_task(problem.data, training.learner.stream_keys(states[0].train.key).problem, index)
        x, y = problem.evaluation(problem.data, task, 60)
        h = np.maximum(np.asarray(x) @ weights["params/Dense_0/kernel"] + weights["params/Dense_0/bias"], 0)
        outputs = h @ weights["params/Dense_1/kernel"] + weights["params/Dense_1/bias"]
        return (outputs.argmax(1) == np.asarray(y)).mean()

    expected = {
        "learned_accuracy": accuracy(after, 1),
        "earlier_accuracy": accuracy(after, 0),
        "forgetting": accuracy(before, 0) - accuracy(after, 0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


def test_overlap_of_subspaces_by_their_angles():
    rng = np.random.default_rng(0)
    a, b = (np.linalg.qr(rng.normal(size=(8, 3)))[0] for _ in range(2))
    expected = np.mean(np.cos(linalg.subspace_angles(a, b)) ** 2)
    np.testing.assert_allclose(ranks.subspace_overlap(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5)


def test_measures_are_aligned_by_task(smoke):
    results, _ = smoke
    methods, values = rank_reports.aligned(results)
    assert methods == results.method.values.tolist()
    np.testing.assert_array_equal(values["forgetting"], results.forgetting[..., :-1])
    np.testing.assert_array_equal(values["next_accuracy"], results.accuracy[..., 1:].astype(float))
    np.testing.assert_array_equal(values["effective_rank"], results.effective_rank[..., 1:].astype(float))


def test_correlations_one_by_one():
    rng = np.random.default_rng(0)
    names = (*rank_reports.PREDICTORS, *rank_reports.OUTCOMES)
    values = {name: rng.normal(size=(4, 3, 9)) + np.arange(9) for name in names}
    values["overlap"][..., 0] = np.nan
    found = rank_reports.correlations(values)
    x, y = values["overlap"], values["forgetting"]
    over = [stats.spearmanr(x[:, seed, 4:].mean(1), y[:, seed, 4:].mean(1))[0] for seed in range(3)]
    np.testing.assert_allclose(found["over", "overlap", "forgetting"], over)
    within = np.mean([[stats.spearmanr(x[m, s, 1:], y[m, s, 1:])[0] for s in range(3)] for m in range(4)], 0)
    np.testing.assert_allclose(found["within", "overlap", "forgetting"], within)
    tasks = np.arange(1, 9)
    left = lambda v: v[1:] - np.polyval(np.polyfit(tasks, v[1:], 1), tasks)
    y_left = lambda v: (v - np.polyval(np.polyfit(np.arange(9), v, 1), np.arange(9)))[1:]
    flat = np.mean([[stats.spearmanr(left(x[m, s]), y_left(y[m, s]))[0] for s in range(3)] for m in range(4)], 0)
    np.testing.assert_allclose(found["detrended", "overlap", "forgetting"], flat)
    assert np.isnan(drawing.rank_correlation(np.ones((1, 5)), np.arange(5.0)[None])).all()


def test_the_table_has_means_over_seeds_and_all_correlations(smoke):
    results, _ = smoke
    table = question_rank.summary(results)
    late = 100 * results.forgetting[0, :, 2:4].values.astype(float).mean()
    assert f"{late:.1f} [" in table and table.count("Rank correlation") == 3


@pytest.mark.slow
def test_pictures(smoke, tmp_path):
    results, _ = smoke
    paths = question_rank.plot(results, tmp_path)
    assert [path.stem for path in paths] == ["learners", "correlations", "tasks"]
    with pytest.raises(ValueError, match="nothing to draw"):
        question_rank.plot(results * np.nan, tmp_path)


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(smoke, tmp_path):
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SMOKE, tmp_path, stop)
    assert same(run(SMOKE, tmp_path), smoke[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"earlier": 0}, "earlier must be at least 1, got 0"),
        ({"earlier": 5}, "earlier must be less than tasks = 5, got 5"),
        ({"subspace": 0}, "subspace must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_computed(changes, message):
    with pytest.raises(ValueError, match=message):
        question_rank.prepare(dataclasses.replace(question_rank.preset("smoke"), methods=("bp",), **changes))


def test_all_learners_have_an_equal_search():
    laptop = question_rank.preset("laptop")
    assert question_rank.check(laptop) == list(laptop.methods) == [lane.name for lane in ranks.lanes()]
    runs = 12 * laptop.tuning_seeds + laptop.seeds
    assert question_rank.total(laptop) == len(laptop.methods) * runs * laptop.tasks
