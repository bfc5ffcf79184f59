import sys
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from cbp_jax.experiments.learners import looks_by_learner
from cbp_jax.report import (
    best_variants,
    new_results,
    plot_run,
    plot_sensitivity,
    plot_tasks,
    plot_updates,
    record_task,
    save_results,
    stream_measures,
)
from cbp_jax.report.drawing import COLUMN, legend_columns
from cbp_jax.report.looks import Look, to_json
from cbp_jax.report.plots import _default_bin
from cbp_jax.report.statistics import binned

SEVEN = ["bp", "adam", "l2", "l1", "shrink_and_perturb", "dropout", "cbp"]


def results_of(methods, *, learners=None, hyperparameters=None, seeds=2, tasks=6, run=None):
    """Make results with accuracy 50 + 5m + s + t percent for method m, seed s, task t, in the first `run` tasks."""
    results = new_results(
        methods,
        learners or methods,
        hyperparameters or [{}] * len(methods),
        seeds=seeds,
        tasks=tasks,
        settings={},
        experiment="online_permuted",
        looks=looks_by_learner(learners or methods),
    )
    base = 0.5 + 0.05 * np.arange(len(methods))[:, None] + 0.01 * np.arange(seeds)
    for task in range(tasks if run is None else run):
        value = base + 0.01 * task
        record_task(
            results,
            task,
            {
                "accuracy": value,
                "dead_units": value / 4,
                "weight_magnitude": value,
                "effective_rank": value / 2,
            },
        )
    return results


def lines(ax):
    return {line.get_gid(): line for line in ax.lines}


def test_four_panels_with_a_line_and_a_band_for_each_method():
    figure = plot_tasks(results_of(["bp", "cbp"]))
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert [label.split()[0] for label in labels] == ["Accuracy", "Dead", "Weight", "Effective"]
    assert all(ax.yaxis.get_tick_params()["labelleft"] for ax in figure.axes)
    scales = [100, 25, 1, 50]
    for ax, scale in zip(figure.axes, scales, strict=True):
        assert set(lines(ax)) == {"bp", "cbp"}
        task, mean = lines(ax)["cbp"].get_data()
        np.testing.assert_array_equal(task, [1, 2, 3, 4, 5, 6])
        np.testing.assert_allclose(mean, scale * (0.555 + 0.01 * np.arange(6)), rtol=1e-6)
        band = ax.collections[1].get_paths()[0].vertices[:, 1]
        assert band.max() == pytest.approx(scale * (0.605 + 0.005), rel=1e-6), "the error of seeds 0.01 apart is 0.005"
        assert band.min() == pytest.approx(scale * (0.555 - 0.005), rel=1e-6)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Backprop", "Continual backprop"]
    assert any("standard error of 2 seeds" in text.get_text() for text in figure.texts)


def test_lines_are_distinguishable_without_their_colors():
    styles = [
        (line.get_linestyle(), str(line._dash_pattern), line.get_marker())
        for line in plot_tasks(results_of(SEVEN)).axes[0].lines
    ]
    drawn = plot_tasks(results_of(SEVEN, tasks=60)).axes[0].lines
    assert len({line.get_markevery() for line in drawn}) == len(SEVEN), "markers of lines that coincide alternate"
    markers = [marker for *_, marker in styles]
    assert len(set(markers)) == len(SEVEN)
    assert len(set(styles)) == len(SEVEN) and len({style[:2] for style in styles}) >= len(SEVEN) - 1


def test_a_learner_keeps_its_style_and_variants_and_strangers_get_their_own():
    def style(line):
        return line.get_color(), str(line._dash_pattern), line.get_marker(), line.get_markerfacecolor()

    alone = lines(plot_tasks(results_of(["cbp"])).axes[0])["cbp"]
    among = lines(plot_tasks(results_of(SEVEN)).axes[0])["cbp"]
    assert style(alone) == style(among)
    variants = plot_tasks(results_of(["a", "b"], learners=["bp"] * 2)).axes[0].lines
    assert len({style(line)[:2] for line in variants}) == 2
    assert len({line.get_marker() for line in variants}) == 1
    brightness = [sum(to_rgb(line.get_color())) for line in variants]
    assert brightness == sorted(brightness)
    names, learners = ["a", "b", "c", "d", "cbp", "mine"], ["bp"] * 4 + ["cbp", "mine"]
    some = lines(plot_tasks(results_of(names, learners=learners)).axes[0])
    assert style(some["cbp"]) == style(alone)
    faces = {(line.get_marker(), line.get_markerfacecolor() == "white") for line in some.values()}
    assert len({line.get_color() for line in some.values()}) == len(faces) == 6
    strangers = plot_tasks(results_of([*SEVEN, "mine"])).axes[0].lines
    assert len({style(line) for line in strangers}) == 8
    many = [f"learner_{i}" for i in range(12)]
    assert len({style(line) for line in plot_tasks(results_of(many)).axes[0].lines}) == 12


def test_learners_with_the_same_title_are_distinguished_by_their_names():
    names = ["first.module:make", "second.module:make"]
    steps = [{"step_size": step} for step in (0.1, 0.2)] * 2
    labels = [f"{name}(step_size={step})" for name in names for step in (0.1, 0.2)]
    learners = [name for name in names for _ in range(2)]
    results = results_of(labels, learners=learners, hyperparameters=steps)
    results = results.assign_attrs(looks=to_json({name: Look("Make") for name in names}))
    assert [text.get_text() for text in plot_tasks(results).legends[0].get_texts()] == labels
    legend = plot_sensitivity(results).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == names
    only = plot_tasks(results, methods=labels[:2]).legends[0].get_texts()
    assert [text.get_text() for text in only] == ["Make, 0.1", "Make, 0.2"]


def test_legends_are_short():
    def legend(labels, learners, hyperparameters):
        results = results_of(labels, learners=learners, hyperparameters=hyperparameters)
        return [text.get_text() for text in plot_tasks(results).legends[0].get_texts()]

    adams = [f"adam(step_size=0.001{rest})" for rest in ("", ", b1=0.99, b2=0.99", ", b1=0.99, b2=0.99, l2=0.0001")]
    decays = [{}, {"b1": 0.99, "b2": 0.99}, {"b1": 0.99, "b2": 0.99, "l2": 1e-4}]
    names = legend([*adams, "cbp(step_size=0.001)"], ["adam"] * 3 + ["cbp"], [*decays, {}])
    assert names == ["Adam", "Tuned Adam", "Tuned Adam + L2", "Continual backprop"]
    resets = ["l2(step_size=0.1)", "l2(step_size=0.3, reset=head)", "l2(step_size=0.1, reset=network)"]
    assert legend(resets, ["l2"] * 3, [{}] * 3) == ["L2", "L2, new head each task", "L2, fresh each task"]
    sizes = [f"bp(step_size={size}, momentum=0.9)" for size in (0.1, 0.2)]
    steps = [{"step_size": size, "momentum": 0.9} for size in (0.1, 0.2)]
    assert legend(sizes, ["bp"] * 2, steps) == ["Backprop, 0.1", "Backprop, 0.2"]
    activations = ["bp(activation=tanh)", "bp(activation=leaky_relu)"]
    assert legend(activations, ["bp"] * 2, [{}] * 2) == ["Backprop (tanh)", "Backprop (leaky ReLU)"]


def test_pictures_are_as_wide_as_a_column_and_their_legends_fit():
    for methods in (SEVEN, [f"learner_{i}" for i in range(8)], ["bp", "cbp_adam", "l1_init", "proximal_l1_init"]):
        figure = plot_tasks(results_of(methods))
        figure.draw_without_rendering()
        assert figure.get_figwidth() == COLUMN
        box = figure.legends[0].get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
        assert min(sizes) >= 6


def test_a_learner_has_its_color_in_pictures_of_some_of_the_methods():
    names = ["bp", "mine", "yours"]
    both = lines(plot_tasks(results_of(names)).axes[0])
    alone = lines(plot_tasks(results_of(names), methods=["yours"]).axes[0])
    assert alone["yours"].get_color() == both["yours"].get_color() != both["mine"].get_color()


def test_bins_average_tasks_within_a_seed_and_then_seeds():
    values = np.array([[1.0, 3.0, 5.0, 7.0, 9.0], [3.0, 5.0, 7.0, np.nan, np.nan]])
    task, mean, low, high = binned(values, 2)
    np.testing.assert_allclose(mean, [3.0, 6.5, 9.0])
    np.testing.assert_allclose(high - mean, [1.0, 0.5, np.nan])
    np.testing.assert_allclose(mean - low, [1.0, 0.5, np.nan])
    np.testing.assert_allclose(task, [1.5, 10 / 3, 5.0])
    task, mean, *_ = binned(np.full((2, 4), np.nan), 3)
    assert task.size == mean.size == 0
    assert [_default_bin(tasks) for tasks in (1, 100, 150, 800, 5000)] == [1, 1, 2, 20, 100]


def test_bins_are_named_in_the_picture():
    figure = plot_tasks(results_of(["bp"]), bin_size=4)
    np.testing.assert_array_equal(lines(figure.axes[0])["bp"].get_xdata(), [2.5, 5.5])
    assert any("bins of 4 tasks" in text.get_text() for text in figure.texts)


def test_unfinished_methods_end_early_and_unbegun_ones_are_left_out():
    results = results_of(["bp", "cbp", "adam"])
    for variable in results.data_vars.values():
        variable.values[1, :, 3:] = np.nan
        variable.values[2] = np.nan
    figure = plot_tasks(results)
    for ax in figure.axes:
        assert set(lines(ax)) == {"bp", "cbp"}
        np.testing.assert_array_equal(lines(ax)["cbp"].get_xdata(), [1, 2, 3])
    with pytest.raises(ValueError, match="no task has finished"):
        plot_tasks(results_of(["bp"], run=0))


def test_one_seed_and_one_task_draw_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seeds, tasks in ((1, 6), (3, 1)):
            (path,) = plot_run(results_of(["bp", "cbp"], seeds=seeds, tasks=tasks), tmp_path)
            assert path.stat().st_size > 5_000
    figure = plot_tasks(results_of(["bp"], seeds=1))
    assert any(text.get_text() == "One seed" for text in figure.texts)


def test_an_axis_is_logarithmic_only_if_necessary():
    results = results_of(["bp", "cbp"])
    assert plot_tasks(results).axes[2].get_yscale() == "linear"
    results.weight_magnitude.values[0, :, -1] = 1e4
    assert [ax.get_yscale() for ax in plot_tasks(results).axes] == ["linear", "linear", "log", "linear"]


def test_a_collapsed_reward_leaves_the_differences_between_the_others_visible():
    methods = ["adam", "adaptive_upgd", "cbp_adam"]
    results = new_results(
        methods, methods, [{}] * 3, seeds=2, tasks=6, settings={}, experiment="x", measures={"episode_return": ""}
    )
    results = results.assign_coords(step=("task", 1_000_000 * np.arange(1, 7)))
    rewards = np.array([[300.0, 0, -50, -400, -9000, 100], [0, 0, 0, -3999, -500, 0], [0, 500, 1000, 900, 990, 1000]])
    results.episode_return.values[:] = rewards[:, None]
    ax = plot_tasks(results).axes[0]
    assert ax.get_ylim() == (-1000, 1050)
    # Each beside its line, on the side with more room, one above the other.
    texts = {text.get_text(): text for text in ax.texts if "\u2193" in text.get_text()}
    assert list(texts) == ["\u2193 \u22129,000", "\u2193 \u22123,999"]
    assert [text.xy[0] for text in texts.values()] == [5, 4] and {text.get_ha() for text in texts.values()} == {"right"}
    heights = [text.get_position()[1] for text in texts.values()]
    assert heights[1] > heights[0]
    for text, method in zip(texts.values(), methods, strict=False):
        assert text.get_color() == lines(ax)[method].get_color()
    # A fall that is not deep is drawn completely.
    results.episode_return.values[:2] = -2999
    ax = plot_tasks(results).axes[0]
    assert ax.get_ylim()[0] < -2999 and not [text for text in ax.texts if "\u2193" in text.get_text()]
    # At the right there is more room for a text.
    results.episode_return.values[:2] = [[[-9000, 300, 300, 300, 300, 300]], [[0.0] * 6]]
    (text,) = (text for text in plot_tasks(results).axes[0].texts if "\u2193" in text.get_text())
    assert text.xy[0] == 1 and text.get_ha() == "left"


def test_an_axis_of_percentages_ends_at_a_hundred():
    results = results_of(["bp", "cbp"])
    assert plot_tasks(results).axes[0].get_ylim()[1] < 80
    results.accuracy.values[:, :, -1] = 1.0
    low, high = plot_tasks(results).axes[0].get_ylim()
    assert low < 60 and 100 < high < 102
    for constant in (0.0, 1.0):
        results.dead_units.values[:] = constant
        assert plot_tasks(results).axes[1].get_ylim() == (-3, 103)


def test_panels_that_were_not_measured_are_left_out():
    results = results_of(["bp"])
    assert len(plot_tasks(results.drop_vars("dead_units")).axes) == 3
    three = plot_tasks(results.drop_vars("dead_units"))
    assert [bool(ax.get_xlabel()) for ax in three.axes] == [False, True, True]


def test_a_picture_of_nothing_that_was_measured_is_refused():
    with pytest.raises(
        ValueError, match=r"measures: the results have none of \['plasticity'\]; they have \['accuracy'"
    ):
        plot_tasks(results_of(["bp"]), measures=["plasticity"])


def test_many_methods_are_cut_to_the_best_variant_of_each_learner():
    methods = [f"bp(step_size={i})" for i in range(6)] + [f"cbp(rate={i})" for i in range(6)]
    results = results_of(methods, learners=["bp"] * 6 + ["cbp"] * 6)
    assert best_variants(results) == ["bp(step_size=5)", "cbp(rate=5)"]
    figure = plot_tasks(results)
    assert set(lines(figure.axes[0])) == {"bp(step_size=5)", "cbp(rate=5)"}
    assert any("best variant" in text.get_text() for text in figure.texts)
    chosen = plot_tasks(results, methods=["cbp(rate=1)", "bp(step_size=0)"])
    assert [text.get_text() for text in chosen.legends[0].get_texts()] == [
        "Continual backprop",
        "Backprop",
    ], "nothing has to be told apart"
    results.accuracy.values[5, :, 5:] = np.nan  # the best, but with fewer finished tasks
    assert best_variants(results)[0] == "bp(step_size=4)"
    with pytest.raises(ValueError, match="methods: got 'adam'"):
        plot_tasks(results, methods=["adam"])


def swept():
    methods = ["bp", "cbp(0)", "cbp(1e-5)", "cbp(1e-4)", "cbp(1e-4, decay)"]
    rates = [{"step_size": 0.01}, *({"replacement_rate": rate, "decay": 0.9} for rate in (0, 1e-5, 1e-4)), {}]
    rates[-1] = {"replacement_rate": 1e-4, "decay": 0.99}
    return results_of(methods, learners=["bp"] + ["cbp"] * 4, hyperparameters=rates, tasks=20)


def test_sensitivity_is_the_best_accuracy_of_the_last_tenth_at_each_value():
    results = swept()
    for variable in results.data_vars.values():
        variable.values[2, :, 10:] = np.nan
    figure = plot_sensitivity(results, hyperparameter="replacement_rate")
    (ax,) = figure.axes
    assert ax.get_xscale() == "symlog", "0 has its place on the axis"
    assert ax.get_xlabel() == "Replacement rate"
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(x, [0, 1e-5, 1e-4])
    np.testing.assert_allclose(y, [55.5 + 18.5, 60.5 + 9, 70.5 + 18.5], rtol=1e-6)
    (bars,) = (container for container in ax.containers if container.has_yerr)
    heights = [np.ptp(segment[:, 1]) for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(heights, 3 * [1.0], rtol=1e-5)
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    np.testing.assert_allclose(np.concatenate([line.get_xdata() for line in hollow]), [1e-5])
    assert any("hollow: unfinished" in text.get_text() for text in figure.texts)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Continual backprop"]


def test_sensitivity_has_a_panel_for_each_hyperparameter_that_was_swept():
    results = swept()
    assert [ax.get_xlabel() for ax in plot_sensitivity(results).axes] == ["Replacement rate", "Decay"]
    assert [ax.get_xscale() for ax in plot_sensitivity(results).axes] == ["symlog", "log"]
    with pytest.raises(ValueError, match=r"hyperparameter: got 'step_size'; .*\['replacement_rate', 'decay'\]"):
        plot_sensitivity(results, hyperparameter="step_size")
    with pytest.raises(ValueError, match="no learner has finished tasks with several values"):
        plot_sensitivity(results_of(["bp", "cbp"]))


def test_plot_run_writes_beside_the_results_or_where_it_is_told(tmp_path):
    run = save_results(swept(), tmp_path / "run")
    paths = plot_run(run.parent)
    assert paths == [tmp_path / "run" / "tasks.png", tmp_path / "run" / "sensitivity.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    run, out = save_results(results_of(["bp"]), tmp_path / "other"), tmp_path / "new" / "place"
    assert plot_run(run, out, formats=["svg"]) == [out / "tasks.svg"]
    assert (out / "tasks.svg").is_file()
    with pytest.raises(ValueError, match="out must name a folder"):
        plot_run(swept())
    with pytest.raises(FileNotFoundError):
        plot_run(tmp_path / "nowhere")


def regression(methods=("bp", "cbp"), learners=None, hyperparameters=None):
    """Make results with losses that grow with the method's number, and plasticity as the only measure of updates."""
    results = new_results(
        methods,
        learners or methods,
        hyperparameters or [{}] * len(methods),
        seeds=2,
        tasks=5,
        settings={},
        experiment="slowly_changing_regression",
        measures=stream_measures(accuracy=False, updates=True),
    )
    for task in range(5):
        loss = np.arange(1.0, 1 + len(methods))[:, None] + 0.1 * np.arange(2) + task
        record_task(results, task, {"loss": loss, "plasticity": 0.1 / loss, "weight_rank": loss / 100})
    return results


def test_a_run_without_accuracy_is_drawn_and_compared_by_its_loss():
    figure = plot_tasks(regression())
    assert figure.axes[0].get_ylabel() == "Loss"
    np.testing.assert_allclose(lines(figure.axes[0])["cbp"].get_ydata(), 2.05 + np.arange(5), rtol=1e-6)
    methods, sizes = ["bp(1)", "bp(2)", "bp(3)"], [{"step_size": size} for size in (1, 2, 3)]
    swept = regression(methods, ["bp"] * 3, sizes)
    assert best_variants(swept) == ["bp(1)"]
    (ax,) = plot_sensitivity(swept).axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [5.05, 6.05, 7.05], rtol=1e-6)
    assert ax.get_ylabel() == "Loss, last tenth of tasks"


@pytest.mark.slow
def test_tasks_with_test_examples_have_panels_of_these_and_of_dormant_units(tmp_path):
    measures = stream_measures(test=True, dormant=True)
    results = new_results(["bp"], ["bp"], [{}], seeds=2, tasks=3, settings={}, experiment="x", measures=measures)
    for task in range(3):
        record_task(results, task, {name: np.array([[0.5, 0.7]]) for name in measures})
    figure = plot_tasks(results)
    labels = [ax.get_ylabel().split(" (")[0] for ax in figure.axes]
    assert labels == ["Test accuracy", "Dormant units", "Stable rank", "Weight magnitude"]
    assert [path.name for path in plot_run(results, tmp_path)] == ["tasks.png", "measures.png"]
    np.testing.assert_allclose(lines(figure.axes[0])["bp"].get_ydata(), 60, rtol=1e-6)


def test_updates_have_a_panel_for_each_measure(tmp_path):
    results = regression()
    figure = plot_updates(results)
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "Plasticity",
        "Loss",
        "Dead units (%)",
        "Weight rank (%)",
        "L1 norm of weights",
        "L2 norm of weights",
        "Gradients not 0 (%)",
        "L1 norm of gradients",
        "L2 norm of gradients",
    ]
    plasticity, _, _, rank = figure.axes[:4]
    bp = np.mean([[0.1 / (1 + 0.1 * seed + task) for task in range(5)] for seed in range(2)], 0)
    np.testing.assert_allclose(lines(plasticity)["bp"].get_ydata(), bp, rtol=1e-6)
    np.testing.assert_allclose(lines(rank)["bp"].get_ydata(), 1.05 + np.arange(5), rtol=1e-6)
    assert [path.name for path in plot_run(results, tmp_path)] == ["tasks.png", "updates.png"]
    with pytest.raises(ValueError, match="updates were not measured; run with measure_every"):
        plot_updates(results_of(["bp"]))


def test_pyplot_and_the_users_settings_are_left_alone(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "font.size", 31.0)
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    monkeypatch.setitem(matplotlib.rcParamsDefault, "backend", "pdf")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    before = dict(matplotlib.rcParams.copy())
    plot_run(results_of(["bp"]), tmp_path)
    assert dict(matplotlib.rcParams.copy()) == before
    assert plot_tasks(results_of(["bp"])).axes[0].yaxis.label.get_size() < 10, "their font size is not ours"


def test_a_long_legend_takes_fewer_columns():
    assert legend_columns(["Backprop"] * 8, 7.2) == 4
    assert legend_columns(["Continual backprop (replacement rate 1e-5)"] * 8, 7.2) == 2
    assert legend_columns(["L1"] * 6 + ["Continual backprop"], 3.4) == 4
    assert legend_columns(["L1"] * 3 + ["L1 init, proximal", "Continual backprop"], 3.4) == 2
    assert legend_columns(["x" * 300] * 8, 7.2) == 1


def test_bad_bins_and_missing_matplotlib(monkeypatch):
    results = results_of(["bp"])
    with pytest.raises(ValueError, match="bin_size must be at least 1; got 0"):
        plot_tasks(results, bin_size=0)
    for other in (results.drop_vars(["accuracy", "loss"]), results.isel(method=0)):
        with pytest.raises(
            ValueError, match=r"results must have an accuracy, a loss or an episode_return \[method, seed, task\]; got"
        ):
            plot_tasks(other)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "cbp-jax\[report\]"'):
        plot_tasks(results)
