import warnings

import numpy as np

from cbp_jax.report import (
    comparison_table,
    diverged_tasks,
    finished_tasks,
    join_results,
    last_tenth,
    load_results,
    mark_diverged,
    new_results,
    paired_differences,
    plot_differences,
    plot_grid,
    plot_run,
    plot_sensitivity,
    plot_tasks,
    record_task,
    save_results,
    sensitivity,
    summary,
)
from cbp_jax.report.divergence import left_out_note, told, without_diverged

SICK = "bp(step_size=2, momentum=0.9)"
DEAD = "bp(step_size=9, momentum=0.9)"


def sick_results(seeds=(0, 1, 2)):
    """Make results in which seed 1 of one method diverges in task 6, and all seeds of another at once."""
    labels = ["bp(step_size=1, momentum=0)", "bp(step_size=1, momentum=0.9)", SICK, DEAD]
    numbers = [{"step_size": s, "momentum": m} for s, m in ((1, 0), (1, 0.9), (2, 0.9), (9, 0.9))]
    results = new_results(labels, ["bp"] * 4, numbers, seeds=seeds, tasks=10, settings={}, experiment="toy")
    found = []
    for task in range(10):
        loss = np.full((4, len(seeds)), 0.5)
        loss[3] = np.inf
        if task >= 6 and 1 in seeds:
            loss[2, list(seeds).index(1)] = np.nan
        accuracy = np.where(np.isfinite(loss), 0.75, 0.1)
        record_task(results, task, {"loss": loss, "accuracy": accuracy, "dead_units": 0 * accuracy})
        found += [(task, *lane) for lane in mark_diverged(results, task)]
    return results, found


def test_lanes_are_marked_once_and_kept_in_the_file(tmp_path):
    results, found = sick_results()
    assert found == [(0, DEAD, 0), (0, DEAD, 1), (0, DEAD, 2), (6, SICK, 1)]
    save_results(results, tmp_path)
    kept = load_results(tmp_path)
    np.testing.assert_array_equal(diverged_tasks(kept, SICK), [np.nan, 6, np.nan])
    joined = join_results([kept, sick_results(seeds=(5,))[0]])
    np.testing.assert_array_equal(diverged_tasks(joined, SICK), [np.nan, 6, np.nan, np.nan])
    healthy = results.drop_vars("diverged")
    assert np.isnan(diverged_tasks(healthy, SICK)).all()


def test_the_td_error_of_agents_is_a_loss():
    measures = {"td_error": "mean absolute TD error"}
    results = new_results(["obgd"], ["obgd"], [{}], seeds=2, tasks=3, settings={}, experiment="toy", measures=measures)
    record_task(results, 1, {"td_error": [[0.5, np.nan]]})
    assert mark_diverged(results, 1) == [("obgd", 1)]


def test_a_lane_diverges_if_its_loss_is_not_finite_in_any_order_of_the_tasks():
    results = new_results(["a", "b"], ["a", "b"], [{}, {}], seeds=3, tasks=2, settings={}, experiment="toy")
    results["loss"] = results.loss.expand_dims(order=2).transpose("method", "order", "seed", "task").fillna(0.5).copy()
    results.loss[1, 1, 2, 0] = np.inf
    assert mark_diverged(results, 1) == [] and mark_diverged(results, 0, ["a"]) == []
    assert mark_diverged(results, 0) == [("b", 2)]


def test_seeds_are_left_out_for_all_methods_where_one_diverged_unless_none_would_be_left():
    results, _ = sick_results()
    alive = results.isel(method=slice(3))
    assert without_diverged(alive).seed.values.tolist() == [0, 2] and without_diverged(alive).sizes["method"] == 3
    assert told(alive, paired=True) == [
        f"{SICK}: 1 of 3 seeds diverged and are left out for all methods (seed 1 in task 7)"
    ]
    assert left_out_note(alive) == "; 1 of 3 seeds left out, because a method diverged"
    assert without_diverged(results).identical(results)
    assert "are not left out, because no seed would be left" in told(results, paired=True)[0]
    assert left_out_note(results) == "; with every seed a method diverged, so none is left out"
    for healthy in (results.isel(method=[0, 1]), results.isel(method=[0, 1]).drop_vars("diverged")):
        assert without_diverged(healthy).identical(healthy)
        assert left_out_note(healthy) == "" and told(healthy, paired=True) == []
    others = results.isel(method=[0, 1, 2]).assign_coords(seed=[3, 4, 5]).drop_vars("diverged")
    assert without_diverged(join_results([alive, others])).seed.values.tolist() == [0, 2, 3, 4, 5]


def test_statistics_leave_out_diverged_lanes_and_say_how_many():
    results, _ = sick_results()
    seeds, tasks = finished_tasks(results, SICK)
    assert seeds.tolist() == [0, 2] and tasks == 10
    np.testing.assert_allclose(last_tenth(results, SICK), [0.75, 0.75])
    table = summary(results)
    row = next(line for line in table.splitlines() if line.startswith(SICK))
    assert row.removeprefix(SICK).split()[:5] == ["2", "10", "75.00", "±", "0.00"]
    assert f"{SICK}: 1 of 3 seeds diverged and are left out (seed 1 in task 7)" in table
    assert f"{DEAD}: 3 of 3 seeds diverged" in table and "momentum=0):" not in table
    found = sensitivity(results)
    assert int(found.diverged.sum()) == 4 and int(found.accuracy.notnull().sum()) == 3 + 3 + 2


def test_methods_that_diverged_are_not_compared():
    results, _ = sick_results()
    first, second, *_ = results.method.values.tolist()
    found = paired_differences(results, first)
    assert found[second].mean == 0 and np.isnan([found[SICK].mean, found[DEAD].mean]).all()
    table = comparison_table(results, [first])
    row = next(line for line in table.splitlines() if line.startswith(f"{SICK} "))
    assert row.removeprefix(SICK).split() == ["-", "-", "-"]
    assert f"{SICK}: 1 of 3 seeds diverged, so it is not compared." in table and f"{second}:" not in table
    assert len(plot_differences(results, [first]).axes[0].get_yticklabels()) == 2


def test_pictures_mark_diverged_lanes(tmp_path):
    results, _ = sick_results()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_tasks(results)
        ax = figure.axes[0]
        lines = {line.get_gid(): line for line in ax.lines if line.get_gid() != "diverged"}
        np.testing.assert_allclose(lines[SICK].get_ydata(), 75)  # not affected by the value 10
        assert len(lines[DEAD].get_xdata()) == 0
        crosses = [line for line in ax.lines if line.get_gid() == "diverged"]
        assert [line.get_xdata()[0] for line in crosses] == [7, 1]
        assert any("cross: a seed diverged" in text.get_text() for text in figure.texts)
        for picture, place in ((plot_sensitivity(results, hyperparameter="step_size"), 0), (plot_grid(results), 0)):
            (cross,) = (line for line in picture.axes[place].lines if line.get_gid() == "diverged")
            assert list(cross.get_xdata()) == [2, 9]
        assert len(plot_run(results, tmp_path)) == 3
