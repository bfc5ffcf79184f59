import itertools

import numpy as np
import pytest
from scipy import stats

from cbp_jax.report import new_results, plot_grid, plot_run, record_task, sensitivity
from cbp_jax.report.grids import swept_settings

RATES, STEPS = (1e-4, 1e-5, 0.0), (0.01, 0.003)


def grid_results(tasks=20, run=20):
    """Make results of cbp with 3 rates and 2 step sizes, bp with 2 step sizes, and cbp with another utility, once."""
    cells = [("cbp", {"replacement_rate": rate, "step_size": step}) for rate, step in itertools.product(RATES, STEPS)]
    cells += [("bp", {"step_size": step}) for step in STEPS]
    labels = [f"{learner}({', '.join(f'{k}={v:g}' for k, v in numbers.items())})" for learner, numbers in cells]
    labels.append("cbp(utility=weight, step_size=0.003)")
    cells.append(("cbp", {"replacement_rate": 1e-4, "step_size": 0.003}))
    learners, numbers = zip(*cells, strict=True)
    results = new_results(labels, learners, numbers, seeds=[4, 7, 9], tasks=tasks, settings={}, experiment="toy")
    accuracy = np.random.default_rng(0).uniform(0.5, 0.9, (len(labels), 3, run))
    for task in range(run):
        record_task(results, task, {"accuracy": accuracy[..., task]})
    return results, accuracy


def test_results_of_a_sweep_have_an_axis_for_each_setting():
    results, accuracy = grid_results()
    found = sensitivity(results)
    assert found.variant.values.tolist() == ["cbp", "bp", "cbp(utility=weight)"]
    assert found.accuracy.dims == ("variant", "replacement_rate", "step_size", "seed")
    np.testing.assert_array_equal(found.replacement_rate, sorted(RATES))
    np.testing.assert_array_equal(found.step_size, sorted(STEPS))
    last = accuracy[..., -2:].astype(np.float32).mean(2)
    for number, (rate, step) in enumerate(itertools.product(RATES, STEPS)):
        cell = found.accuracy.loc[{"variant": "cbp", "replacement_rate": rate, "step_size": step}]
        np.testing.assert_allclose(cell, last[number], rtol=1e-6)
    for rate, (number, step) in itertools.product(RATES, enumerate(STEPS, start=6)):
        cell = found.accuracy.loc[{"variant": "bp", "replacement_rate": rate, "step_size": step}]
        np.testing.assert_allclose(cell, last[number], rtol=1e-6)
    weight = found.accuracy.loc[{"variant": "cbp(utility=weight)"}]
    assert int(weight.notnull().sum()) == 3 and int(found.tasks.max()) == 20
    assert swept_settings(results) == {"replacement_rate": ["cbp"], "step_size": ["cbp", "bp"]}


def test_a_line_for_each_value_of_the_other_setting_with_intervals_over_seeds(tmp_path):
    results, accuracy = grid_results()
    figure = plot_grid(results)
    by_rate, by_step, of_bp = figure.axes
    assert [ax.get_xlabel() for ax in figure.axes] == ["Replacement rate", "Step size", "Step size"]
    assert [ax.get_xscale() for ax in figure.axes] == ["symlog", "log", "log"]
    assert [text.get_text() for text in by_rate.get_legend().get_texts()] == ["step size 0.003", "step size 0.01"]
    assert len(by_step.get_legend().get_texts()) == 3 and of_bp.get_legend() is None
    drawn = by_rate.containers[1]  # the line of step size 0.01
    last = 100 * accuracy[[4, 2, 0], :, -2:].astype(np.float32).mean(2)
    np.testing.assert_allclose(drawn.lines[0].get_ydata(), last.mean(1), rtol=1e-6)
    segments = drawn.lines[2][0].get_segments()
    half = stats.t.ppf(0.975, 2) * stats.sem(last, axis=1)
    np.testing.assert_allclose([np.ptp(segment[:, 1]) / 2 for segment in segments], half, rtol=1e-4)
    assert [path.name for path in plot_run(results, tmp_path)] == ["tasks.png", "sensitivity.png", "grid.png"]


def test_errors_say_what_was_not_swept_or_not_run():
    results, _ = grid_results(run=0)
    assert sensitivity(results).accuracy.isnull().all()
    with pytest.raises(ValueError, match="no swept method has finished a task"):
        plot_grid(results)
    with pytest.raises(ValueError, match="results must be of a sweep, with several values of a number; got bp"):
        sensitivity(new_results(["bp"], ["bp"], [{"step_size": 1}], seeds=1, tasks=1, settings={}, experiment="x"))
