import json

import matplotlib.colors
import numpy as np
import pytest

from cbp_jax.report import (
    comparison_table,
    estimate,
    new_results,
    paired_differences,
    plot_differences,
    plot_search,
    plot_tasks,
    record_task,
    stream_measures,
)
from cbp_jax.report.comparisons import chosen_settings

TASKS, SEEDS = 20, 10
SPACE = [{"rate": rate, "step_size": step} for rate in (1e-4, 1e-3, 1e-2) for step in (0.1, 0.2)]
TRIED = {"plain": [{}], "good": SPACE, "like": SPACE}
SCORES = {"plain": [0.5], "good": [0.5, 0.6, 0.7, 0.8, np.nan, 0.7], "like": [0.5, 0.4, 0.3, 0.2, 0.9, 0.1]}


def comparison(measure="accuracy", sign=1):
    """Make results in which seeds differ more than methods: "good" is better by 0.05, "like" is as good as "plain"."""
    rng = np.random.default_rng(0)
    methods = list(TRIED)
    results = new_results(
        methods, methods, [{}] * 3, seeds=SEEDS, tasks=TASKS, settings={}, experiment="mine", measures=MEASURES[measure]
    )
    of_seeds, of_pairs = rng.normal(0.5, 0.2, SEEDS), rng.normal(0, 0.01, (3, SEEDS))
    of_pairs[2] -= of_pairs[2].mean() - of_pairs[0].mean()
    for task in range(TASKS):
        values = of_seeds + sign * (np.array([[0.0], [0.05], [0.0]]) + of_pairs + task / 100)
        dead = np.full((3, SEEDS), task / 100)
        record_task(results, task, {measure: values, "dead_units": dead})
    scores = [np.resize(np.append(SCORES[name], np.full(5, np.nan)), 6) for name in methods]
    scores = np.stack([scores, scores], -1) * sign
    return results.assign(tuning_performance=(("method", "candidate", "tuning_seed"), scores)).assign_coords(
        configurations=("method", [json.dumps(TRIED[name]) for name in methods]), chosen=("method", methods)
    )


MEASURES = {"accuracy": stream_measures(), "loss": stream_measures(accuracy=False)}


def resampled(values, resamples=20_000):
    """Compute percentiles of the means of resampled seeds, with other draws."""
    means = np.random.default_rng(1).choice(values, (resamples, len(values))).mean(1)
    return values.mean(), *np.percentile(means, [2.5, 97.5])


def test_differences_are_paired_by_seed_and_have_the_interval_of_the_bootstrap():
    results = comparison()
    values = results.accuracy.values.astype(np.float64)
    found = paired_differences(results, "plain")
    assert list(found) == ["good", "like"]
    for i, name in ((1, "good"), (2, "like")):
        np.testing.assert_allclose(found[name], resampled((values[i] - values[0]).mean(1)), atol=5e-4)
    assert found["good"].excludes_zero and not found["like"].excludes_zero
    unpaired = estimate(values[1].mean(1))
    assert unpaired.high - unpaired.low > 5 * (found["good"].high - found["good"].low)
    late = paired_differences(results, "good", "dead_units", tasks=slice(-2, None))["plain"]
    assert late == (0.0, 0.0, 0.0) and not late.excludes_zero
    with pytest.raises(ValueError, match=r"baseline must be one of \['plain', 'good', 'like'\], got 'bp'"):
        paired_differences(results, "bp")


def test_unfinished_methods_and_single_seeds_have_no_interval():
    results = comparison()
    results.accuracy.values[1, 3, -1] = np.nan
    found = paired_differences(results, "plain")
    assert np.isnan(found["good"]).all() and found["good"].text() == "-" and not found["good"].excludes_zero
    assert np.isfinite(found["like"]).all()
    one = estimate(np.array([0.25]))
    assert one.mean == 0.25 and np.isnan(one.low) and one.text() == "0.25" and not one.excludes_zero
    assert estimate(np.array([1.0, 1.0])).text(1, sign=True) == "+1.0 [+1.0, +1.0]"


@pytest.mark.parametrize(("measure", "sign"), [("accuracy", 1), ("loss", -1)])
def test_the_table_claims_only_what_its_intervals_show(measure, sign):
    results = comparison(measure, sign)
    table = comparison_table(results, ("plain", "absent"), ("dead_units", "weight_rank"))
    first = table.partition("last tenth of tasks")[0]
    lines = {line.partition(" ")[0]: line for line in first.splitlines()}
    assert lines["good"].endswith("better") and "better" not in lines["like"] and "worse" not in lines["like"]
    assert "minus absent" not in table and "weight rank" not in table
    scale, digits = (100, 2) if measure == "accuracy" else (1, 3)
    expected = scale * (results[measure].values[1] - results[measure].values[0]).astype(np.float64).mean()
    assert f"{expected:+.{digits}f} [" in lines["good"]
    assert "rate=0.001, step_size=0.2" in lines["good"] and "!" not in lines["good"]
    assert "rate=0.01!, step_size=0.1" in lines["like"] and "!: at an end" in table
    against = comparison_table(results, ("good",))
    assert sum(line.endswith("worse") for line in against.splitlines()) == 2
    assert "0.185 [0.185, 0.185]" in table  # dead units of the last tenth


def test_a_run_without_a_search_has_a_table_and_differences_too():
    results = comparison().drop_vars(["tuning_performance", "configurations", "chosen"])
    assert "other seed" not in comparison_table(results, ("plain",))
    assert all(chosen == ("", False) for chosen in chosen_settings(results).values())
    assert len(plot_differences(results, ("plain",)).axes) == 1
    with pytest.raises(ValueError, match="no search has ended"):
        plot_search(results)


def test_the_picture_of_differences_draws_their_means_and_intervals():
    results = comparison()
    figure = plot_differences(results, ("plain", "good", "absent"))
    assert len(figure.axes) == 2
    texts = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert texts[-1] == "Good" and "Like !" in texts  # the best is on top; the choice is at the end of its range
    names = [text.removesuffix(" !") for text in texts]
    found = paired_differences(results, "plain")
    dots = {names[int(line.get_ydata()[0])]: line for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert set(dots) == {"Good", "Like"}
    for name, line in dots.items():
        assert line.get_xdata()[0] == pytest.approx(100 * found[name.lower()].mean)
    hollow = {name: matplotlib.colors.to_hex(line.get_markerfacecolor()) == "#ffffff" for name, line in dots.items()}
    assert hollow == {"Good": False, "Like": True}
    assert [ax.get_title() for ax in figure.axes] == ["minus Plain", "minus Good"]
    assert [ax.get_xlabel() for ax in figure.axes] == ["Difference (points)"] * 2
    three = plot_differences(results, ("plain", "good", "like"))
    assert [bool(ax.get_xlabel()) for ax in three.axes] == [False, True, False]
    (note,) = (text.get_text() for text in figure.texts)
    assert "hollow: the interval includes 0" in note and "!: best setting at the end of the range tried" in note
    (note,) = (
        text.get_text() for text in plot_differences(results.sel({"method": ["plain", "good"]}), ("plain",)).texts
    )
    assert "hollow" not in note, "nothing is"
    with pytest.raises(ValueError, match="no method to compare has finished"):
        plot_differences(results, ("absent",))


def test_the_picture_of_a_search_draws_all_tried_settings_and_circles_the_choice():
    figure = plot_search(comparison())
    assert [ax.get_title() for ax in figure.axes] == ["Good", "Like"]  # the other has no settings to choose
    low, high, ring = figure.axes[0].lines
    np.testing.assert_allclose(low.get_ydata(), 100 * np.array([0.5, 0.7, np.nan]), rtol=1e-6)
    np.testing.assert_allclose(high.get_ydata(), 100 * np.array([0.6, 0.8, 0.7]), rtol=1e-6)
    assert [*map(float, low.get_xdata())] == [1e-4, 1e-3, 1e-2]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (1e-3, pytest.approx(80))


def test_measures_to_draw_over_tasks_can_be_chosen():
    figure = plot_tasks(comparison(), measures=("dead_units", "accuracy", "weight_rank"))
    assert [ax.get_ylabel() for ax in figure.axes] == ["Dead units (%)", "Accuracy (%)"]
