import dataclasses
import json

import numpy as np
import optax
import pytest
from same_runs import same

from cbp_jax import load_results, report
from cbp_jax.experiments import online_permuted, stream, tuning
from cbp_jax.experiments.empty_results import empty_results
from cbp_jax.experiments.lanes import prepare_methods, program_of
from cbp_jax.experiments.learners import LogUniform, configurations, parse_method
from cbp_jax.experiments.tuning import Lane, Plan, TunedSettings, choose, tuned_experiment

REPORTING = dataclasses.replace(
    online_permuted.preset("smoke"), seeds=3, tasks=3, examples_per_task=20, hidden=(4,), measured_examples=10
)
TUNING = dataclasses.replace(REPORTING, seeds=2, first_seed=1000)
LANES = (
    Lane("plain", "bp", {"step_size": (0.01, 0.03, 0.1)}),
    Lane("shrinking", "l2:step_size=0.02", {"l2": (1e-3, 1e-2, 1e-1)}),
    Lane("the_same", "bp", {"step_size": (0.03, 0.2, 0.3)}),
    Lane("as_it_is", "l1:step_size=0.02"),
)
MEASURES = report.stream_measures()
BEST = {
    "plain": "bp:step_size=0.03",
    "shrinking": "l2:step_size=0.02,l2=0.1",
    "the_same": "bp:step_size=0.03",
    "as_it_is": "l1:step_size=0.02",
}


def accuracy(numbers, seeds, task):
    """Return a performance that is best at step size 0.03 and the largest l2; 0.3 diverges with one tuning seed."""
    value = np.exp(-(np.log(numbers["step_size"] / 0.03) ** 2)) / 2 + 0.1 * numbers.get("l2", 0) + seeds / 1e6
    loss = np.where((numbers["step_size"] > 0.25) & (seeds == 1001), np.nan, value + task)
    return value + task / 100, loss


def make(group):
    """Replace training by a formula of settings, seeds and tasks, which resumes where a checkpoint stopped."""

    def train(seeds, numbers, checkpoint, at_once):
        state, done = {"tasks": np.zeros(len(seeds))}, checkpoint.tasks
        if done:
            checkpoint.restore(state)
        for task in range(done, REPORTING.tasks):
            values, loss = accuracy(numbers, seeds, task)
            ones = {name: np.ones(len(seeds)) for name in MEASURES}
            yield ones | {"accuracy": values, "loss": loss}
            checkpoint.save(task + 1, lambda: state)

    return train


def job(settings):
    methods = stream.check(settings)
    empty = empty_results("online_permuted", settings, methods, settings.tasks, MEASURES)
    with_plan = lambda group: (make(group), program_of(group, settings, None))
    return prepare_methods(empty, methods, with_plan)


PLAN = Plan(dataclasses.replace(online_permuted, job=job), LANES, TUNING, REPORTING, MEASURES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, told = tmp_path_factory.mktemp("runs") / "whole", []
    return PLAN.prepare("mine", {"a": 1})(out, lambda *args: told.append(args)), out, told


def test_the_best_configuration_of_each_lane_is_reported_with_other_seeds(finished):
    results, out, told = finished
    assert results.attrs["experiment"] == "mine" and results.method.values.tolist() == [lane.name for lane in LANES]
    assert dict(zip(results.method.values, results.chosen.values, strict=True)) == BEST
    assert results.seed.values.tolist() == [0, 1, 2] and results.tuning_seed.values.tolist() == [1000, 1001]
    for lane, numbers in zip(LANES, ({"step_size": 0.03}, {"step_size": 0.02, "l2": 0.1}), strict=False):
        expected = [[accuracy(numbers, seed, task)[0] for task in range(REPORTING.tasks)] for seed in range(3)]
        np.testing.assert_allclose(results.accuracy.loc[{"method": lane.name}], expected, rtol=1e-6)
    np.testing.assert_array_equal(results.l2, [np.nan, 0.1, np.nan, np.nan])
    np.testing.assert_array_equal(results.step_size, [0.03, 0.02, 0.03, 0.02])
    assert json.loads(results.configurations.values[0]) == [{"step_size": step} for step in (0.01, 0.03, 0.1)]
    assert sum(lanes for _, lanes, _ in told) == 3 * (9 * 2 + 3 * 3) == PLAN.total() - 3 * 3
    assert results.identical(load_results(out))


def test_all_tried_settings_are_recorded_and_diverged_ones_are_worst(finished):
    results, out, _ = finished
    tried = results.tuning_performance.transpose("method", "candidate", "tuning_seed").values
    seeds = np.array([1000, 1001])
    expected = [
        np.mean([accuracy({"step_size": step}, seeds, task)[0] for task in range(REPORTING.tasks)], 0)
        for step in (0.01, 0.1)
    ]
    np.testing.assert_allclose(tried[0, [0, 2]], expected, rtol=1e-6)
    assert np.isfinite(tried[2, :2]).all() and np.isfinite(tried[2, 2]).tolist() == [True, False]
    assert np.isnan(tried[3, 1:]).all()
    both = [load_results(out / name) for name in (tuning.TUNING, tuning.REPORTED)]
    assert [part.sizes["method"] for part in both] == [9, 3]  # configurations that lanes share run once
    assert {part.attrs["experiment"] for part in both} == {"online_permuted"}
    two = {"plain": [parse_method(f"bp:step_size={step}") for step in (0.3, 0.01)]}
    (better,) = choose(results.copy(deep=True), two, both[0]).values()
    assert better.text == "bp:step_size=0.01"


def test_the_seconds_of_a_lane_are_those_of_its_search_and_of_its_reported_run(finished):
    results, out, _ = finished
    of_lanes, seconds_of = report.records.seconds_of(results), report.records.seconds_of
    searched, reported = (seconds_of(load_results(out / name)) for name in (tuning.TUNING, tuning.REPORTED))
    l2 = [label for label in searched if label.startswith("l2")]
    assert len(l2) == 3 and min(searched.values()) > 0
    best = next(label for label in l2 if label in reported)
    assert of_lanes["shrinking"] == pytest.approx(sum(searched[label] for label in l2) + reported[best])
    # Two lanes share the time of a configuration that both try, and of the reported run of it.
    assert set(of_lanes) == set(BEST) and min(of_lanes.values()) > 0
    assert sum(of_lanes.values()) == pytest.approx(sum(searched.values()) + sum(reported.values()))


@pytest.mark.parametrize("calls", [7, pytest.param(10, marks=pytest.mark.slow)])
def test_a_stopped_comparison_resumes_to_the_same_results(finished, tmp_path, calls):
    whole, _, told = finished
    left = calls

    def stop(*_):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PLAN.prepare("mine", {"a": 1})(tmp_path / "run", stop)
    part = load_results(tmp_path / "run")
    assert part.accuracy.isnull().any() and part.accuracy.notnull().any() == (calls > 9)
    again = []
    results = PLAN.prepare("mine", {"a": 1})(tmp_path / "run", lambda *args: again.append(args))
    assert same(results, whole) and sum(call[1] for call in again) == sum(call[1] for call in told)
    with pytest.raises(ValueError, match="a is 1 there and 2 now"):
        PLAN.prepare("mine", {"a": 2})(tmp_path / "run")


def test_a_lower_loss_is_better():
    tried = {"one": [parse_method(f"bp:step_size={step}") for step in (0.1, 0.2, 0.3)]}
    labels = [method.label for method in tried["one"]]
    measures = report.stream_measures(accuracy=False)
    tuned = report.new_results(
        labels, ["bp"] * 3, [{}] * 3, seeds=2, tasks=1, settings={}, experiment="x", measures=measures
    )
    report.record_task(tuned, 0, {"loss": [[1.0, 2.0], [0.5, 2.0], [0.1, np.nan]]})
    empty = dataclasses.replace(PLAN, lanes=(Lane("one", "bp", {"step_size": (0.1, 0.2, 0.3)}),))._empty_results(
        "x", {}, tried
    )
    assert choose(empty, tried, tuned)["one"].text == "bp:step_size=0.2"
    np.testing.assert_allclose(empty.tuning_performance, [[[1.0, 2.0], [0.5, 2.0], [0.1, np.nan]]])


WRONG = [
    ({"tuning": dataclasses.replace(TUNING, first_seed=2)}, "tuning seeds must not be reported, and 2 is both"),
    ({"lanes": ()}, "lanes must be at least one, of different names, got"),
    ({"lanes": LANES[:1] * 2}, "lanes must be at least one, of different names, got"),
    (
        {"lanes": (*LANES, Lane("less", "bp", {"step_size": (0.1,)}))},
        "lanes must all try the same number of configurations, got .*'less': 1",
    ),
    ({"lanes": (Lane("x", "bp", {"l2": (0.1,)}),)}, "lane 'x': bp has the settings .*, got l2"),
    ({"lanes": (Lane("x", "bp", {"step_size": (-1.0,)}),)}, "lane 'x': step_size must be .*, got -1.0"),
    ({"lanes": (Lane("x", "bp", {"step_size": LogUniform(0.1, 1)}),)}, "lane 'x': count must be given, as step_size"),
    ({"count": 4}, "lane 'plain': count must be the 3 combinations of the values of .*, got 4"),
    ({"reporting": dataclasses.replace(REPORTING, tasks=0)}, "tasks must be at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_unfair_comparisons_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **change).check()


def factory(learning_rate, decay=0.9):
    return optax.sgd(learning_rate, decay)


def test_a_users_function_has_a_search_space_too():
    lanes = (
        Lane("mine", f"{__name__}:factory(learning_rate=1.0)", {"learning_rate": LogUniform(1e-3, 1.0)}),
        Lane("others", "adam", {"step_size": LogUniform(1e-4, 0.1), "b1": (0.0, 0.9)}),
    )
    tried = dataclasses.replace(PLAN, lanes=lanes, count=5).tried()
    assert {len(methods) for methods in tried.values()} == {5}
    for method in tried["mine"]:
        assert 1e-3 <= method.hyperparameters["learning_rate"] <= 1.0
        assert parse_method(method.text) == method and method.hyperparameters["decay"] == 0.9
    assert {method.hyperparameters["b1"] for method in tried["others"]} <= {0.0, 0.9}


def test_an_experiment_is_made_of_a_plan():
    experiment = tuned_experiment(
        lambda settings: PLAN, name="mine", about="Mine.", Settings=TunedSettings, presets={"smoke": TunedSettings}
    )
    settings = experiment.preset("smoke")
    assert experiment.check(settings) == [lane.name for lane in LANES] and experiment.total(settings) == PLAN.total()


def test_draws_depend_only_on_the_seed_and_the_name_of_the_setting():
    space = {"step_size": LogUniform(1e-4, 1.0), "l2": LogUniform(1e-6, 1e-2), "order": (1, 2)}
    drawn = configurations(space, 200, seed=3)
    steps = np.array([each["step_size"] for each in drawn])
    assert [each["step_size"] for each in configurations({"step_size": space["step_size"]}, 200, seed=3)] == list(steps)
    assert configurations(space, 200, seed=4) != drawn
    logs = (np.log(steps) - np.log(1e-4)) / np.log(1e4)
    assert 0 <= logs.min() and logs.max() <= 1 and abs(np.mean(logs) - 0.5) < 0.06 and abs(np.var(logs) - 1 / 12) < 0.02
    other = np.log([each["l2"] for each in drawn])
    assert abs(np.corrcoef(logs, other)[0, 1]) < 0.2
    assert 60 < sum(each["order"] == 1 for each in drawn) < 140
    assert all(float(f"{step:.3g}") == step for step in steps)


@pytest.mark.parametrize(
    ("space", "count", "message"),
    [
        ({"l2": ()}, None, "space: l2 must have values that all differ"),
        ({"l2": (1, 1)}, None, "space: l2 must have values that all differ"),
        ({"l2": (1, 2)}, 0, "count must be at least 1, got 0"),
    ],
)
def test_spaces_without_a_search_are_refused(space, count, message):
    with pytest.raises(ValueError, match=message):
        configurations(space, count)
    with pytest.raises(ValueError, match="low and high must be finite and 0 < low < high, got 1 and 1"):
        LogUniform(1, 1)
