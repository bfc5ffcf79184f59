import numpy as np
import pytest
from scipy import stats

from cbp_jax.report import benchmark_rows, benchmark_table, new_results, plot_benchmark, record_task, stream_measures
from cbp_jax.report.benchmarks import COST, overall, standing

SEEDS, TASKS = 8, 10
RNG = np.random.default_rng(0)
HARD = RNG.normal(0, 0.2, SEEDS)  # differences between seeds


def results_of(values, measure="accuracy", costs=None, **others):
    """Make results with a performance [seeds] of each method, the same in all tasks."""
    methods = list(values)
    measures = stream_measures(accuracy=measure == "accuracy")
    results = new_results(
        methods, methods, [{}] * len(methods), seeds=SEEDS, tasks=TASKS, settings={}, experiment="x", measures=measures
    )
    for task in range(TASKS):
        rows = {"loss": np.ones((len(methods), SEEDS)), measure: np.stack(list(values.values()))}
        rows |= {name: np.full((len(methods), SEEDS), value) for name, value in others.items()}
        record_task(results, task, rows)
    return results.assign_coords({COST: ("method", costs or [1.0] * len(methods)), "chosen": ("method", methods)})


ACCURACY = {"bp": 0.4 + HARD, "good": 0.6 + HARD, "half": 0.5 + HARD, "bad": 0.0 + HARD}
LOSS = {"bp": np.exp(HARD), "good": 0.5 * np.exp(HARD), "half": 0.75 * np.exp(HARD), "worse": 1.2 * np.exp(HARD)}
PROBLEMS = {
    "digits": results_of(ACCURACY, costs=[1.0, 2.0, 8.0, 1.0], dead_units=0.25, effective_rank=0.5),
    "targets": results_of(LOSS, "loss", [1.0, 2.0, 2.0, 1.0], dead_units=0.75, effective_rank=0.5),
}


def test_a_score_is_what_a_run_gains_over_backpropagation_with_its_seed():
    found = standing(PROBLEMS["digits"])
    expected = np.repeat([[0.0], [1.0], [0.5], [-1.0]], SEEDS, 1)  # -2, clipped
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)
    assert found.ranks.tolist() == [3, 1, 2, 4] and found.measure == "accuracy"
    np.testing.assert_allclose(found.symptoms, np.tile([25.0, 50.0], (4, 1)))


def test_a_lower_loss_is_better():
    found = standing(PROBLEMS["targets"])
    assert found.ranks.tolist() == [3, 1, 2, 4] and (found.values < 0).all()
    unit = stats.trim_mean(LOSS["bp"] - LOSS["good"], 0.25)
    np.testing.assert_allclose(found.scores, [(LOSS["bp"] - LOSS[m]) / unit for m in LOSS], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats.trim_mean(found.scores[1], 0.25), 1, rtol=1e-6)


def test_if_no_method_gains_the_worst_score_is_minus_one():
    found = standing(results_of({"bp": 0.5 + HARD, "worse": 0.4 + HARD, "worst": 0.3 + HARD}))
    np.testing.assert_allclose(found.scores, np.repeat([[0.0], [-0.5], [-1.0]], SEEDS, 1), atol=1e-5)
    assert (standing(results_of({"bp": HARD})).scores == 0).all()


def test_runs_that_diverged_are_worse_than_all_others():
    diverged = LOSS | {"good": np.where(np.arange(SEEDS) < 1, np.nan, LOSS["good"]), "worse": np.full(SEEDS, np.nan)}
    problems = {"targets": results_of(diverged, "loss")}
    found = standing(problems["targets"])
    assert found.ranks.tolist() == [3, 1, 2, 4] and np.isneginf(found.values[1, 0])
    assert found.scores[1, 0] == -1 and (found.scores[3] == -1).all()
    page = benchmark_table(problems)
    assert "| `worse` | diverged | -1.00 [-1.00, -1.00] | 4 |" in page
    backprop = {"bp": np.where(np.arange(SEEDS) < 1, np.nan, LOSS["bp"]), "good": LOSS["good"]}
    assert np.isfinite(standing(results_of(backprop, "loss")).scores).all()
    backprop["bp"] = np.full(SEEDS, np.nan)
    assert standing(results_of(backprop, "loss")).scores is None


def test_the_overall_score_is_over_the_runs_of_all_problems():
    standings = {name: standing(results) for name, results in PROBLEMS.items()}
    rows = {row.method: row for row in overall(standings)}
    assert list(rows) == ["good", "half", "bp", "worse", "bad"]  # by score
    both = np.concatenate([standings["digits"].scores[1], standings["targets"].scores[1]])
    assert rows["good"].score[0] == stats.trim_mean(both, 0.25)
    assert rows["good"].score[1] <= rows["good"].score[0] <= rows["good"].score[2]
    # "bad" and "worse" have one problem each, so they have no rank among the methods with both.
    assert {name: row.complete for name, row in rows.items()} == {name: name not in ("bad", "worse") for name in rows}
    assert [rows[name].rank[0] for name in ("good", "half", "bp")] == [1, 2, 3] and np.isnan(rows["bad"].rank[0])
    assert [row.method for row in overall(standings, ["targets"]) if row.complete] == ["good", "half", "bp", "worse"]
    with pytest.raises(ValueError, match=r"counted must be some of \['digits', 'targets'\], got \['x'\]"):
        overall(standings, ["x"])


def test_the_table_has_all_problems_together_and_one_by_one():
    page = benchmark_table(PROBLEMS, ["digits"], title="Mine")
    assert page.startswith("# Mine\n\nValues are interquartile means")
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        *("## All problems", "## Digits", "## Targets")
    ]
    assert "| `good` | 1.00 [1.00, 1.00] | 1.0 [1.0, 1.0] | 1.00 | 1.00 | 25.0 | 50.0 | 2.00x |" in page
    assert "Not counted in the overall score and rank: Targets." in page
    mean = 100 * stats.trim_mean(ACCURACY["good"].astype(np.float32), 0.25)
    assert f"| `good` | {mean:.2f} [" in page and "| as given |" in page
    row = benchmark_rows(PROBLEMS, ["half"]).splitlines()
    assert len(row) == 3 and row[0].count("|") == row[1].count("|") == row[2].count("|")
    assert row[2].endswith("| 50.0 | 50.0 | 4.00x |")  # the geometric mean of 8 and 2
    assert "`bad` | -1.00 [-1.00, -1.00] (1 problem) | - |" in benchmark_rows(PROBLEMS, ["bad"])


def test_without_plain_backpropagation_there_are_only_ranks():
    page = benchmark_table({"digits": results_of({"good": 0.6 + HARD, "half": 0.5 + HARD})})
    assert "There are no scores: bp, plain backpropagation, is not in the table." in page
    assert "| `good` | - | 1.0 [1.0, 1.0] | - |" in page


def test_the_picture_has_a_panel_for_all_problems_and_one_for_each():
    figure = plot_benchmark(PROBLEMS)
    axes = figure.axes
    assert [ax.get_title() for ax in axes] == ["All problems", "Digits", "Targets"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["Bad", "Worse", "Bp", "Half", "Good"]
    dots = {line.get_ydata()[0]: line for line in axes[0].lines if line.get_marker() == "o"}
    assert dots[4].get_xdata()[0] > dots[2].get_xdata()[0] == 0
    assert [dots[i].get_markerfacecolor() == "white" for i in range(5)] == [True, True, False, False, False]
    assert axes[2].xaxis_inverted() and not axes[1].xaxis_inverted()
    assert "right is better" in figure.texts[0].get_text() and "hollow" in figure.texts[0].get_text()
    figure.canvas.draw()


def test_the_labels_of_the_picture_do_not_touch_and_its_note_explains_only_what_is_drawn():
    tested = results_of(ACCURACY | {"a_method_with_a_long_name": HARD})
    tested = tested.assign(test_accuracy=tested.accuracy)
    figure = plot_benchmark({name: tested for name in "abcde"})
    assert not any(text in figure.texts[0].get_text() for text in ("right is better", "hollow"))
    figure.draw_without_rendering()
    row = figure.axes[3:]
    boxes = [ax.xaxis.label.get_window_extent() for ax in row]
    assert row[0].get_xlabel().startswith("Test") and boxes[0].x1 + 9 < boxes[1].x0 and boxes[1].x1 + 9 < boxes[2].x0
    assert row[0].get_yticklabels()[0].get_fontsize() == figure.axes[0].get_yticklabels()[0].get_fontsize()
