import math

import numpy as np
import pytest
from scipy import stats

from cbp_jax.report import (
    blocks_of_tasks,
    finished_tasks,
    last_tenth,
    new_results,
    record_task,
    stream_measures,
    summary,
)
from cbp_jax.report.statistics import bootstrap_interval, interval_text, mean_and_error, performance


def results_of(accuracy, tasks=None, **measures):
    """Make results of methods a, b, ... from accuracies [methods, seeds, tasks]."""
    accuracy = np.asarray(accuracy)
    labels = list("abcdef"[: len(accuracy)])
    tasks = tasks or accuracy.shape[2]
    results = new_results(
        labels, labels, [{}] * len(labels), seeds=accuracy.shape[1], tasks=tasks, settings={}, experiment="x"
    )
    for task in range(accuracy.shape[2]):
        values = {name: measure[..., task] for name, measure in measures.items()}
        record_task(results, task, {"accuracy": accuracy[..., task], **values})
    return results


def row(table, method):
    return next(line for line in table.splitlines() if line.startswith(method + " "))


def test_mean_and_error_of_the_seeds_that_have_a_value():
    values = np.random.default_rng(0).normal(size=(5, 4))
    mean, error = mean_and_error(values)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(error, stats.sem(values))
    holes = values.copy()
    holes[3:, 0] = np.nan, np.inf
    holes[1:, 1] = np.nan
    holes[:, 2] = np.nan
    mean, error = mean_and_error(holes)
    np.testing.assert_allclose(mean, [values[:3, 0].mean(), values[0, 1], np.nan, values[:, 3].mean()])
    np.testing.assert_allclose(error, [stats.sem(values[:3, 0]), np.nan, np.nan, stats.sem(values[:, 3])])


@pytest.mark.parametrize("tasks", [1, 3, 9, 10, 11, 19, 150, 800])
def test_blocks_cover_the_tasks_and_the_last_is_a_tenth_rounded_up(tasks):
    blocks = blocks_of_tasks(tasks)
    assert np.concatenate([np.arange(tasks)[block] for block in blocks]).tolist() == list(range(tasks))
    sizes = [block.stop - block.start for block in blocks]
    assert len(sizes) == min(10, tasks) and max(sizes) - min(sizes) <= 1 and sizes[-1] == math.ceil(tasks / 10)


def test_finished_tasks_are_those_that_all_begun_seeds_have_finished():
    accuracy = np.full((2, 4, 6), np.nan)
    accuracy[0, 1, :5] = accuracy[0, 3, :3] = 0.5
    results = results_of(accuracy)
    seeds, tasks = finished_tasks(results, "a")
    assert seeds.tolist() == [1, 3] and tasks == 3
    seeds, tasks = finished_tasks(results, "b")
    assert seeds.tolist() == [] and tasks == 0
    assert last_tenth(results, "b").shape == (0,)


def test_last_tenth_of_an_unfinished_run_is_that_of_its_finished_tasks():
    accuracy = np.arange(2 * 20).reshape(1, 2, 20) / 100
    np.testing.assert_allclose(last_tenth(results_of(accuracy), "a"), [0.185, 0.385], rtol=1e-6)
    np.testing.assert_allclose(last_tenth(results_of(accuracy, tasks=40), "a"), [0.185, 0.385], rtol=1e-6)
    np.testing.assert_allclose(last_tenth(results_of(accuracy[..., :5]), "a"), [0.04, 0.24], rtol=1e-6)


def test_summary_gives_best_last_and_lost_with_student_intervals():
    accuracy = np.full((2, 3, 20), 0.5)
    accuracy[0, :, 4:6] = np.array([0.90, 0.92, 0.94])[:, None]
    accuracy[0, :, 18:] = np.array([0.80, 0.83, 0.83])[:, None]
    dead = np.zeros((2, 3, 20))
    dead[0, :, 18:] = 0.25
    table = summary(results_of(accuracy, dead_units=dead))
    half = [stats.t.ppf(0.975, 2) * stats.sem(x) for x in ([90, 92, 94], [80, 83, 83], [10, 9, 11])]
    fields = [field.strip() for field in row(table, "a").replace(" ± ", "±").split()]
    assert fields == [
        "a",
        "3",
        "20",
        "50.00±0.00",
        f"92.00±{half[0]:.2f}",
        "5-6",
        f"82.00±{half[1]:.2f}",
        f"10.00±{half[2]:.2f}",
        "25.0",
    ]
    assert len({len(line) for line in table.splitlines()[2:]}) == 1, "columns are aligned"


def test_a_summary_has_no_intervals_for_one_seed_and_dashes_for_missing_values():
    table = summary(results_of([[[0.5, 0.75]], [[np.nan, np.nan]]], tasks=7))
    assert row(table, "a").split() == ["a", "1", "2/7", "50.00", "75.00", "2", "75.00", "0.00", "-"]
    assert row(table, "b").split() == ["b", "0", "0/7", "-", "-", "-", "-", "-", "-"]


def test_intervals_are_of_the_seeds_that_have_a_value():
    values = np.array([1.0, 3.0, np.nan])
    assert interval_text(values, 2) == interval_text(values[:2], 2) == "2.00 ± 12.71"  # t of one degree of freedom
    assert interval_text(values[1:], 2) == "3.00"
    low, high = bootstrap_interval(np.array([[1.0, 5.0], [np.nan, 6.0]]))
    np.testing.assert_array_equal([low, high], [[np.nan, 5], [np.nan, 6]])


def test_plasticity_in_a_summary_is_the_mean_over_all_tasks():
    results = results_of([[[0.5] * 15]], tasks=15)
    plasticity = np.broadcast_to(np.arange(15) < 5, (1, 1, 15)).astype(np.float32)
    results = results.assign(plasticity=(("method", "seed", "task"), plasticity))
    assert "0.333" in row(summary(results), "a").split()  # 5 of 15


def test_the_best_loss_in_a_summary_is_the_least():
    results = new_results(
        ["a"],
        ["a"],
        [{}],
        seeds=1,
        tasks=20,
        settings={},
        experiment="x",
        measures=stream_measures(accuracy=False, updates=True),
    )
    for task in range(20):
        record_task(
            results, task, {"loss": [[abs(task - 7.0) / 8]], "plasticity": [[task / 20]], "dead_units": [[0.5]]}
        )
    table = summary(results)
    assert table.startswith("x: loss, mean over seeds") and "plasticity" in table
    expected = ["a", "1", "20", "0.812", "0.062", "7-8", "1.438", "1.375", "0.475", "50.0"]
    assert row(table, "a").split() == expected


def test_tasks_with_test_examples_are_compared_on_them():
    measures = stream_measures(test=True, dormant=True)
    results = new_results(["a"], ["a"], [{}], seeds=2, tasks=10, settings={}, experiment="x", measures=measures)
    for task in range(10):
        test = (0.9 - 0.01 * task) * np.ones((1, 2))
        record_task(results, task, {"accuracy": 0.99 * np.ones((1, 2)), "test_accuracy": test})
    assert performance(results) == "test_accuracy"
    np.testing.assert_allclose(last_tenth(results, "a"), [0.81, 0.81], rtol=1e-6)
    table = summary(results)
    assert table.startswith("x: test accuracy in percent")
    assert row(table, "a").replace(" ± ", "±").split()[3:7] == ["90.00±0.00", "90.00±0.00", "1", "81.00±0.00"]
