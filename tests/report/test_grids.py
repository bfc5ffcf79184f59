import itertools

import numpy as np
import pytest
from scipy import stats

from cbp_jax.report import load_results, looks, new_results, plot_grid, plot_run, record_task, save_results, sensitivity
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
    owned = {style.color for style in looks.PALETTE}
    assert not owned & {bars.lines[0].get_color() for ax in figure.axes for bars in ax.containers}, "of learners"
    assert [text.get_text() for text in by_rate.get_xticklabels()] == ["0", "1e-5", "1e-4"]
    drawn = by_rate.containers[1]  # the line of step size 0.01
    assert drawn.lines[0].get_marker() == "*" and all(cap.get_markeredgewidth() > 0.5 for cap in drawn.lines[1])
    last = 100 * accuracy[[4, 2, 0], :, -2:].astype(np.float32).mean(2)
    np.testing.assert_allclose(drawn.lines[0].get_ydata(), last.mean(1), rtol=1e-6)
    segments = drawn.lines[2][0].get_segments()
    half = stats.t.ppf(0.975, 2) * stats.sem(last, axis=1)
    np.testing.assert_allclose([np.ptp(segment[:, 1]) / 2 for segment in segments], half, rtol=1e-4)
    assert [path.name for path in plot_run(results, tmp_path)] == ["tasks.png", "sensitivity.png", "grid.png"]


def text_results(cells):
    """Make results of methods that are given by their learner, their numbers, and their texts as in labels."""
    labels = [f"{cell[0]}({', '.join(f'{k}={v}' for k, v in {**cell[2], **cell[1]}.items())})" for cell in cells]
    learners, numbers, texts = zip(*cells, strict=True)
    texts = [dict(own) for own in texts]
    for own in (own for own, learner in zip(texts, learners, strict=True) if learner == "cbp"):
        own.setdefault("bias", "False")  # a default that labels do not show
    options = {"seeds": 3, "tasks": 10, "settings": {}, "experiment": "toy", "texts": texts}
    results = new_results(labels, learners, numbers, **options)
    accuracy = np.random.default_rng(1).uniform(0.5, 0.9, (len(labels), 3)).astype(np.float32)
    for task in range(10):
        record_task(results, task, {"accuracy": accuracy})
    return results, accuracy


def test_a_swept_text_has_an_axis_in_the_order_of_the_run(tmp_path):
    cells = [("cbp", {"rate": rate}, {"utility": utility}) for utility in ("weight", "random") for rate in (0.1, 0.2)]
    results, accuracy = text_results([*cells, ("bp", {"step_size": 0.1}, {}), ("cbp", {"rate": 0.1}, {"bias": "True"})])
    found = sensitivity(load_results(save_results(results, tmp_path)))
    # The last method differs from each of the others in two settings, so that its text belongs to its variant.
    assert found.variant.values.tolist() == ["cbp", "bp", "cbp(bias=True)"]
    assert found.accuracy.dims == ("variant", "rate", "utility", "seed")
    assert found.utility.values.tolist() == ["weight", "random"]
    np.testing.assert_allclose(found.accuracy[0].transpose("utility", "rate", "seed"), accuracy[:4].reshape(2, 2, 3))
    np.testing.assert_allclose(found.accuracy[1], np.broadcast_to(accuracy[4], (2, 2, 3)))
    np.testing.assert_allclose(found.accuracy[2], [2 * [accuracy[5]], np.full((2, 3), np.nan)])
    assert swept_settings(results) == {"rate": ["cbp"], "utility": ["cbp"]}


def test_texts_with_otherwise_different_settings_are_variants_and_a_text_left_out_is_the_default():
    tuned = [("bp", {"step_size": 0.1}, {"reset": "head"}), ("bp", {"step_size": 0.2}, {"reset": "network"})]
    with pytest.raises(ValueError, match="several values of a setting"):
        sensitivity(text_results(tuned)[0])
    with pytest.raises(ValueError, match="several values of a setting"):
        sensitivity(text_results([tuned[0], ("bp", {"step_size": 0.1}, {})])[0])  # two variants, named by hand
    resets = [("bp", {"step_size": 0.1}, reset) for reset in ({}, {"reset": "head"}, {"reset": "network"})]
    results, accuracy = text_results([*resets, ("bp", {"step_size": 0.1}, {"hidden": "none"})])
    found = sensitivity(results)
    assert found.variant.values.tolist() == ["bp", "bp(hidden=none)"] and "hidden" not in found.coords
    assert found.reset.values.tolist() == ["default", "head", "network"]
    np.testing.assert_allclose(found.accuracy, [accuracy[:3], 3 * [accuracy[3]]])
    narrow = [("bp", {"step_size": 0.1}, {"hidden": "none", **reset}) for reset in ({}, {"reset": "head"})]
    results, accuracy = text_results([*resets, *narrow])
    narrow = sensitivity(results).accuracy.loc[{"variant": "bp(hidden=none)"}]
    np.testing.assert_allclose(narrow, [*accuracy[3:], np.full(3, np.nan)])
    by_hand = [("cbp", {"rate": 0.1}, {}), ("cbp", {"rate": 0.1}, {"bias": "True"})]
    assert sensitivity(text_results(by_hand)[0]).bias.values.tolist() == ["False", "True"]
    assert swept_settings(results.drop_vars("reset")) == {}, "as in results of earlier versions"


def test_a_number_that_only_some_methods_have_belongs_to_their_variant():
    plain = [("bp", {"step_size": step}, {}) for step in (0.1, 0.2)]
    once = [("bp", {"step_size": step, "dropout_rate": 0.5}, {}) for step in (0.1, 0.2)]
    results, accuracy = text_results([*plain, *once])
    found = sensitivity(results)
    assert found.variant.values.tolist() == ["bp", "bp(dropout_rate=0.5)"]
    assert found.accuracy.dims == ("variant", "step_size", "seed")
    np.testing.assert_allclose(found.accuracy, accuracy.reshape(2, 2, 3))
    assert swept_settings(results) == {"step_size": ["bp", "bp(dropout_rate=0.5)"]}
    # Where the number is swept, its axis has no place for the methods without it, whatever their order.
    swept = [("bp", {"step_size": 0.1, "dropout_rate": rate}, {}) for rate in (0.2, 0.5)]
    results, accuracy = text_results([*swept, plain[0], ("bp", {"step_size": 0.1, "every": 10}, {})])
    found = sensitivity(results)
    without = ["bp(dropout_rate=default)", "bp(dropout_rate=default, every=10)"]
    assert found.variant.values.tolist() == ["bp", *without]
    assert found.accuracy.dims == ("variant", "dropout_rate", "seed")
    np.testing.assert_allclose(found.accuracy[0], accuracy[:2])
    np.testing.assert_allclose(found.accuracy[1:], accuracy[2:, None].repeat(2, 1))
    assert [ax.get_title() for ax in plot_grid(results).axes] == ["Bp"]
    # A setting that is a number for one method may be a text for another, which is no coordinate then.
    both = [("mine", {"step_size": step, "gain": 0.5}, {}) for step in (0.1, 0.2)]
    results, accuracy = text_results([*both, ("mine", {"step_size": 0.1}, {}), ("mine", {"step_size": 0.2}, {})])
    labels = [*results.method.values[:2], "mine(gain=low, step_size=0.1)", "mine(gain=high, step_size=0.2)"]
    found = sensitivity(results.assign_coords(method=labels))
    assert found.variant.values.tolist() == ["mine", "mine(gain=low)", "mine(gain=high)"]
    np.testing.assert_allclose(found.accuracy[0], accuracy[:2])
    none = np.full(3, np.nan)
    np.testing.assert_allclose(found.accuracy[1:], [[accuracy[2], none], [none, accuracy[3]]])


def test_the_values_of_a_text_are_drawn_side_by_side_with_intervals(tmp_path):
    utilities = ("weight", "adaptable_contribution")
    cells = [("cbp", {"rate": rate}, {"utility": utility}) for utility in utilities for rate in (0.1, 0.2)]
    results, accuracy = text_results(cells)
    by_rate, by_utility = plot_grid(results).axes
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in (by_rate, by_utility)]
    assert legends == [["utility weight", "utility adaptable\ncontribution"], ["rate 0.1", "rate 0.2"]]
    assert [text.get_text() for text in by_utility.get_xticklabels()] == ["weight", "adaptable\ncontribution"]
    assert by_utility.get_xlabel() == "Utility" and by_utility.get_xscale() == "linear"
    for line, (drawn, shift) in enumerate(zip(by_utility.containers, (-0.06, 0.06), strict=True)):
        assert drawn.lines[0].get_linestyle() == "None"
        np.testing.assert_allclose(drawn.lines[0].get_xdata(), [shift, 1 + shift])
        last = 100 * accuracy[[line, line + 2]]
        np.testing.assert_allclose(drawn.lines[0].get_ydata(), last.mean(1), rtol=1e-6)
        half = stats.t.ppf(0.975, 2) * stats.sem(last, axis=1)
        lengths = [np.ptp(segment[:, 1]) / 2 for segment in drawn.lines[2][0].get_segments()]
        np.testing.assert_allclose(lengths, half, rtol=1e-4)
    alone, _ = text_results(cells[::2])
    assert [path.name for path in plot_run(alone, tmp_path)] == ["tasks.png", "grid.png"]


def test_a_variant_at_another_value_than_the_first_is_drawn():
    cells = [("cbp", {"rate": 0.1}, {"utility": utility}) for utility in ("weight", "random")]
    cells += [("cbp_adam", {"b1": b1}, {"utility": "random"}) for b1 in (0.9, 0.99)]
    results, accuracy = text_results(cells)
    of_adam = plot_grid(results).axes[-1]
    assert of_adam.get_title() == "Cbp adam(utility=random)"
    np.testing.assert_allclose(of_adam.lines[0].get_ydata(), 100 * accuracy[2:].mean(1), rtol=1e-6)


def test_errors_say_what_was_not_swept_or_not_run():
    results, _ = grid_results(run=0)
    assert sensitivity(results).accuracy.isnull().all()
    with pytest.raises(ValueError, match="no swept method has finished a task"):
        plot_grid(results)
    with pytest.raises(ValueError, match="results must be of a sweep, with several values of a setting; got bp"):
        sensitivity(new_results(["bp"], ["bp"], [{"step_size": 1}], seeds=1, tasks=1, settings={}, experiment="x"))
