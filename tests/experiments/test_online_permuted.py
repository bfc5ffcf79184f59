import dataclasses
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from cbp_jax.experiments.online_permuted import Settings, check, preset, run
from same_runs import same

from cbp_jax import load_results
from cbp_jax.experiments import EXPERIMENTS, lanes, learners, online_permuted
from cbp_jax.experiments.learners import parse_method

SETTINGS = Settings(
    methods=(
        "cbp:step_size=0.02,replacement_rate=0.2,maturity_threshold=3",
        "bp:step_size=0.02",
        "cbp:step_size=0.02,replacement_rate=0.15,maturity_threshold=3",
    ),
    seeds=2,
    tasks=3,
    examples_per_task=30,
    hidden=(7,),
    measured_examples=20,
)
RATES = [0.2, np.nan, 0.15]


class Calls(list):
    """A progress callback that records its calls, and stops the run like Ctrl-C after a number of calls."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after

    def __call__(self, *args):
        self.append(args)
        if len(self) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, calls = tmp_path_factory.mktemp("runs") / "finished", Calls()
    return run(SETTINGS, out, calls), out, calls


def test_results_are_complete_and_equal_those_on_disk(finished):
    results, out, _ = finished
    assert results.identical(load_results(out))
    assert dict(results.sizes) == {"method": 3, "seed": 2, "task": 3}
    assert results.method.values.tolist() == [parse_method(text).label for text in SETTINGS.methods]
    assert results.learner.values.tolist() == ["cbp", "bp", "cbp"]
    np.testing.assert_array_equal(results.replacement_rate, RATES)
    np.testing.assert_array_equal(results.step_size, [0.02] * 3)
    assert results.seed.values.tolist() == [0, 1] and results.task.values.tolist() == [0, 1, 2]
    assert results.attrs["experiment"] == "online_permuted"
    kept = json.loads(results.attrs["settings"])
    assert kept["methods"] == list(SETTINGS.methods) and kept["hidden"] == [7] and kept["tasks"] == 3
    assert [path.name for path in out.iterdir()] == ["results.nc"]


def test_results_belong_to_the_right_method_and_seed(finished):
    results, _, _ = finished
    for name, values in results.data_vars.items():
        assert values.dims == ("method", "seed", "task") and np.isfinite(values).all(), name
    for name in ("accuracy", "dead_units", "effective_rank", "stable_rank"):
        assert (results[name] >= 0).all() and (results[name] <= 1).all()
    replaced = results.replaced_units.values.sum((1, 2))
    assert replaced[1] == 0 and replaced[0] > replaced[2] > 0
    # Before the first task, methods differ only in their labels, and seeds in everything.
    for name in ("weight_magnitude", "effective_rank", "stable_rank", "dead_units"):
        first = results[name].values[:, :, 0]
        np.testing.assert_allclose(first, np.broadcast_to(first[0], first.shape), rtol=1e-6, err_msg=name)
    assert abs(np.diff(results.weight_magnitude.values[0, :, 0])) > 1e-4
    assert len(np.unique(results.loss.values)) == results.loss.size


def test_progress_is_reported_after_each_task_of_the_methods_that_run_together(finished):
    results, _, calls = finished
    cbp = ", ".join(results.method.values[[0, 2]])
    assert [call[:2] for call in calls] == 3 * [(cbp, 4)] + 3 * [("bp(step_size=0.02)", 2)]
    assert sum(call[1] for call in calls) == results.accuracy.size  # so that the progress bar reaches its end
    for task, (_, _, means) in enumerate(calls[:3]):
        assert set(means) == set(results.data_vars)
        assert means["loss"] == pytest.approx(float(results.loss.values[[0, 2], :, task].mean()), rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_keeps_the_tasks_that_it_finished(finished, tmp_path, monkeypatch):
    whole, _, _ = finished
    monkeypatch.setattr(lanes, "SAVE_EVERY", 1e9)  # results are saved when the run stops, not earlier
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, tmp_path / "run", Calls(stop_after=4))  # the three tasks of cbp, and the first of bp
    results = load_results(tmp_path / "run")
    for name, values in results.data_vars.items():
        done = np.ones(values.shape, bool)
        done[1, :, 1:] = False
        np.testing.assert_array_equal(values, np.where(done, whole[name], np.nan), err_msg=name)
    assert same(results.drop_vars(results.data_vars), whole.drop_vars(whole.data_vars))


@pytest.mark.slow
def test_a_killed_run_keeps_the_tasks_that_it_finished(tmp_path):
    settings = dataclasses.replace(SETTINGS, methods=("bp:step_size=0.02",), tasks=100_000)
    script = f"""
import sys
sys.path.insert(0, {sys.path[0]!r})
from pathlib import Path
from cbp_jax.experiments import lanes, online_permuted
from cbp_jax.experiments.permuted import Online
lanes.SAVE_EVERY = 0.0
settings = {settings!r}
online_permuted.run(settings, Path({str(tmp_path)!r}), lambda *args: print("a task", flush=True))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        told = [process.stdout.readline() for _ in range(4)]
        process.kill()
    assert told == ["a task\n"] * 4 and process.returncode == -signal.SIGKILL
    accuracy = load_results(tmp_path).accuracy.values
    done = np.isfinite(accuracy).all((0, 1)).sum()
    assert 4 <= done < 100_000
    assert np.isfinite(accuracy[..., :done]).all() and np.isnan(accuracy[..., done:]).all()


def numbers(settings, learner):
    methods = [method for method in check(settings) if method.learner == learner]
    return [dict(method.hyperparameters) for method in methods], [dict(method.options) for method in methods]


def test_the_papers_preset_has_the_papers_numbers():
    paper = preset("paper")
    assert (paper.dataset, paper.hidden, paper.activation) == ("mnist", (2000, 2000, 2000), "relu")
    assert (paper.tasks, paper.examples_per_task, paper.batch_size, paper.seeds) == (800, 60_000, 1, 30)
    plain, options = numbers(paper, "bp")
    assert plain == [{"step_size": step} for step in (0.01, 0.003, 0.001, 0.003)]
    assert options == [{}, {}, {}, {"hidden": ()}]  # the last is the linear baseline
    assert numbers(paper, "online_norm")[0] == [{"step_size": 0.003}]
    assert numbers(paper, "dropout")[1] == [{"dropout_rate": rate} for rate in (0.01, 0.1, 0.3)]
    assert numbers(paper, "l2")[0] == [{"step_size": 0.003, "l2": l2} for l2 in (1e-3, 1e-4, 1e-5)]
    assert numbers(paper, "shrink_and_perturb")[0] == [
        {"step_size": 0.003, "l2": 1e-4, "noise": noise} for noise in (1e-4, 1e-5, 1e-6)
    ]
    assert numbers(paper, "adam")[0] == [{"step_size": step, "b1": 0.9, "b2": 0.999} for step in (1e-4, 5e-5, 3e-5)]
    cbp, options = numbers(paper, "cbp")
    assert cbp == [
        {"step_size": 0.003, "replacement_rate": rate, "decay_rate": 0.99, "maturity_threshold": 100}
        for rate in (1e-4, 1e-5, 1e-6)
    ]
    assert options == [
        {"utility": "adaptable_contribution", "compensate_bias": False, "max_replacements": None} for _ in cbp
    ]
    assert len(paper.methods) == 20


def test_presets_of_the_papers_robustness_figures_have_its_settings():
    for name in ("step_size", "network_size", "task_length_10k", "task_length_100k", "task_length_1m"):
        settings = preset(name)
        assert settings.tasks * settings.examples_per_task == 48_000_000 and settings.seeds == 10, name
        assert settings.hidden == (2000, 2000, 2000) and {method.learner for method in check(settings)} == {"bp"}
    assert numbers(preset("step_size"), "bp")[0] == [{"step_size": step} for step in (0.01, 0.003, 0.001)]
    assert [method.hidden for method in check(preset("network_size"))] == [(n,) * 3 for n in (100, 1000, 10_000)]
    lengths = [preset(f"task_length_{name}").examples_per_task for name in ("10k", "100k", "1m")]
    assert lengths == [10_000, 100_000, 1_000_000] and preset("step_size").examples_per_task == 60_000
    for settings in map(preset, ("network_size", "task_length_1m")):
        assert {method.hyperparameters["step_size"] for method in check(settings)} == {0.003}


def test_the_output_layer_has_gain_1_and_hidden_layers_that_of_relu():
    settings = dataclasses.replace(preset("smoke"), hidden=(40,))
    learner = learners.make_learner(
        check(settings)[:1], settings.hidden, "relu", (60,), 50, **online_permuted.network(settings)
    )
    hidden, output = learner.init(jax.random.key(0))["params"].values()
    for layer, gain in ((hidden, 2**0.5), (output, 1.0)):
        bound = gain * (3 / layer["kernel"].shape[0]) ** 0.5
        assert 0.95 * bound < np.abs(layer["kernel"]).max() <= bound and not layer["bias"].any()


@pytest.mark.parametrize("dataset", [None, "mnist"])
def test_the_other_presets_compare_what_they_promise(dataset):
    laptop, smoke = preset("laptop", dataset), preset("smoke", dataset)
    for settings in (laptop, smoke):
        assert settings.dataset == (dataset or "digits")
    compared = [method.learner for method in check(laptop)]
    assert {"bp", "adam", "l2", "shrink_and_perturb", "dropout", "online_norm", "cbp"} <= set(
        compared
    ) and laptop.seeds >= 5
    assert {method.learner for method in check(smoke)} == {"bp", "cbp"}
    assert smoke.seeds * smoke.tasks * smoke.examples_per_task * len(smoke.methods) < 10_000  # takes seconds
    assert preset("paper", "fashion_mnist") == dataclasses.replace(preset("paper"), dataset="fashion_mnist")


def test_the_registry_knows_the_experiment_by_its_name():
    assert EXPERIMENTS["online_permuted"] is online_permuted
    assert {"smoke", "laptop", "paper"} < set(online_permuted.PRESETS)
    with pytest.raises(ValueError, match=r"preset must be one of \['smoke', 'laptop', 'paper', .*\], got 'large'"):
        preset("large")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"measured_examples": 0}, "measured_examples must be at least 1, got 0"),
        ({"hidden": ()}, r"method 'cbp:.*no units can be replaced in this network"),
        ({"hidden": (5, 0)}, r"hidden must be sizes of at least 1, or none for a linear network, got \(5, 0\)"),
        ({"activation": "step"}, "activation must be .*, got 'step'"),
        ({"methods": ()}, "methods must name at least one of"),
        ({"methods": ("bp", "sgd")}, r"the learner must be one of .*, got 'sgd'"),
        ({"methods": ("bp", "bp")}, "methods must differ, and 'bp' and 'bp' have the same settings"),
        ({"methods": ("bp", "cbp:replacement_rate=2")}, r"replacement_rate must be in \[0, 1\], got 2"),
        ({"examples_per_task": 0}, "examples_per_task must be an integer of at least 1; got 0"),
        ({"examples_per_task": 10, "batch_size": 11}, "batch_size must be an integer from 1 to 10; got 11"),
        ({"dataset": "no_such_dataset"}, "unknown dataset 'no_such_dataset'"),
        ({"lanes": "pmap"}, "must be 'auto', 'vmap' or 'map', got 'pmap'"),
        ({"methods": ("bp", "cbp:max_replacements=0")}, "max_replacements must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained_or_written(change, message, tmp_path):
    calls = Calls(stop_after=1)
    with pytest.raises(ValueError, match=message):
        try:
            run(dataclasses.replace(SETTINGS, **change), tmp_path / "run", calls)
        except KeyboardInterrupt:
            pass
    assert not calls and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_a_later_first_seed_equals_part_of_a_longer_run(finished, tmp_path):
    results, _, _ = finished
    later = run(dataclasses.replace(SETTINGS, first_seed=1, seeds=1), tmp_path)
    assert later.seed.values.tolist() == [1]
    np.testing.assert_array_equal(later.loss, results.loss.loc[{"seed": [1]}])


def test_the_first_seed_is_checked():
    for first in (-1, 2**31 - 2):
        with pytest.raises(ValueError, match=f"first_seed must be from 0 to 2147483645, got {first}"):
            check(dataclasses.replace(SETTINGS, first_seed=first))
