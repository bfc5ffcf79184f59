import dataclasses

import jax
import numpy as np
import pytest
from cbp_jax.experiments.input_permuted import check, preset, run

from cbp_jax import data, load_results
from cbp_jax.experiments import EXPERIMENTS, input_permuted
from cbp_jax.experiments.published import best_methods, paper_grid

TINY = dataclasses.replace(preset("smoke"), seeds=1, tasks=2, examples_per_task=12, hidden=(4,), measured_examples=20)


def test_the_papers_preset_has_the_papers_numbers():
    paper = preset("paper")
    assert (paper.dataset, paper.hidden, paper.activation, paper.batch_size) == ("mnist", (300, 150), "relu", 1)
    assert paper.tasks * paper.examples_per_task == 1_000_000 and paper.examples_per_task == 5000
    assert paper.seeds == 20 and paper.measure_every == 1
    assert preset("paper", "fashion_mnist") == dataclasses.replace(paper, dataset="fashion_mnist")
    assert len(check(paper)) == len(paper.methods) and paper.methods == paper_grid("input_permuted_mnist")


def test_adam_with_restarts_is_compared_with_plain_adam():
    methods = check(preset("restarts"))
    assert preset("restarts") == dataclasses.replace(preset("paper"), methods=preset("restarts").methods)
    resets = {name: [m.hyperparameters["step_size"] for m in methods if m.reset == name] for name in ("", "network")}
    assert resets[""] == resets["network"] == [0.1, 0.01, 0.001, 0.0001, 0.00001] and len(methods) == 10


def test_the_preset_best_runs_the_papers_learners_at_their_published_best_at_its_sizes():
    best, paper = preset("best"), preset("paper")
    assert best == dataclasses.replace(paper, methods=best_methods("input_permuted_mnist"))
    assert preset("best", "fashion_mnist") == dataclasses.replace(best, dataset="fashion_mnist")
    assert [method.learner for method in check(best)] == [
        *("l2", "pgd", "shrink_and_perturb", "adam", "upgd", "upgd"),
        *("ewc", "mas", "synaptic_intelligence", "rwalk"),
    ]


@pytest.mark.parametrize("dataset", [None, "mnist"])
def test_the_other_presets_compare_what_they_promise(dataset):
    for name in ("smoke", "laptop"):
        settings = preset(name, dataset)
        assert settings.dataset == (dataset or "digits") and settings.measure_every
        assert {"bp", "upgd"} <= {method.learner for method in check(settings)}
    assert preset("laptop").examples_per_task <= len(data.load("digits"))
    smoke = preset("smoke", dataset)
    assert smoke.seeds * smoke.tasks * smoke.examples_per_task * len(smoke.methods) < 10_000  # takes seconds
    with pytest.raises(
        ValueError, match=r"preset must be one of \['smoke', 'laptop', 'paper', 'best', 'restarts'\], got 'large'"
    ):
        preset("large")
    assert EXPERIMENTS["input_permuted"] is input_permuted


@pytest.mark.slow
def test_networks_are_initialized_as_in_the_paper_and_inputs_are_normalized(trained, tmp_path):
    settings = dataclasses.replace(TINY, methods=("bp",), hidden=(300, 150), measured_examples=5000)
    run(settings, tmp_path)
    (group,) = trained
    layers = jax.jit(group.learner.init)(jax.random.key(0))["params"]
    assert [layer["kernel"].shape for layer in layers.values()] == [(64, 300), (300, 150), (150, 10)]
    for layer in layers.values():
        bound = layer["kernel"].shape[0] ** -0.5
        for values in layer.values():  # uniform in ±1/sqrt(fan-in), biases too
            assert 0.75 * bound < np.abs(values).max() <= bound
    images = data.load("digits")
    problem = group.problem
    assert group.measured_examples == len(images) == 1797  # not more than the dataset has
    show = lambda data, key: problem.evaluation(data, problem.make_task(data, key, 1), 1797)
    x, y = jax.jit(show)(problem.data, jax.random.key(0))
    mean, std = data.normalization(images)
    np.testing.assert_allclose(
        np.sort(x.ravel()), np.sort((images.images / images.max_value - mean) / std, axis=None), atol=1e-4
    )
    assert np.bincount(y).tolist() == np.bincount(images.labels).tolist()
    # Pixels are permuted and labels are not: the means of the pixels are those of the images in another order.
    plain = ((images.images.reshape(1797, 64) / images.max_value - mean) / std).mean(0)
    np.testing.assert_allclose(np.sort(x.mean(0)), np.sort(plain), atol=1e-4)
    assert not np.allclose(x.mean(0), plain, atol=0.1) and problem.steps_per_task == 12


def test_a_run_from_end_to_end(tmp_path):
    results = run(dataclasses.replace(TINY, methods=("upgd",)), tmp_path)
    assert results.identical(load_results(tmp_path)) and results.attrs["experiment"] == "input_permuted"
    assert {"accuracy", "plasticity", "gradient_l0", "weight_rank"} <= set(results.data_vars)
    for name, values in results.data_vars.items():
        assert np.isfinite(values).all() and values.shape == (1, 1, 2), name
    for name in ("accuracy", "plasticity", "gradient_l0", "weight_rank", "dead_units"):
        assert (results[name] >= 0).all() and (results[name] <= 1).all(), name
    assert results.loss.values[0, 0, 1] != results.loss.values[0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples_per_task": 0}, "examples_per_task must be an integer of at least 1; got 0"),
        ({"measure_every": 0}, "measure_every must be at least 1, got 0"),
        ({"measure_every": 13}, "measure_every must be at most the 12 updates of a task, got 13"),
        ({"measure_every": 7, "batch_size": 2}, "measure_every must be at most the 6 updates of a task, got 7"),
        ({"hidden": (5, 0)}, r"hidden must be sizes of at least 1, or none for a linear network, got \(5, 0\)"),
        ({"methods": ("upgd:scope=layer",)}, r"scope must be one of \('global', 'local'\), got 'layer'"),
        ({"methods": ("upgd:order=3",)}, r"order must be one of \(1, 2\), got 3"),
        ({"methods": ("upgd:beta_utility=1",)}, r"beta_utility must be in \[0, 1\), got 1"),
        ({"methods": ("bp:normalization=batch",)}, "normalization must be one of .*, got 'batch'"),
        ({"dataset": "no_such_dataset"}, "unknown dataset 'no_such_dataset'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_is_trained_or_written(trained, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not trained and not (tmp_path / "run").exists()
