import dataclasses

import jax
import numpy as np
import pytest
from cbp_jax.experiments.class_incremental import check, plot, preset, run

from cbp_jax import load_results, training
from cbp_jax.experiments import EXPERIMENTS, class_incremental
from cbp_jax.report import plot_tasks

TINY = dataclasses.replace(preset("smoke"), epochs=1, train_per_class=10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return run(dataclasses.replace(TINY, network="mlp"), out), out


def test_the_papers_preset_has_the_papers_numbers():
    paper = preset("paper")
    assert (paper.dataset, paper.test_split, paper.batch_size, paper.epochs) == ("cifar100", "test", 90, 200)
    assert (paper.train_per_class, paper.validation_per_class, paper.test_per_class) == (450, 50, 100)
    assert (paper.tasks, paper.classes_per_increment) == (20, 5)
    assert (paper.hidden, paper.blocks) == ((64, 128, 256, 512), (2, 2, 2, 2))
    assert (paper.flip, paper.padding, paper.max_rotation, paper.early_stopping) == (True, 4, 15.0, True)
    assert paper.dormant_threshold == 0.01
    methods = check(paper)
    assert [(method.learner, method.options.get("reset")) for method in methods] == [
        ("l2", None),
        ("l2", "head"),
        ("shrink_and_perturb", None),
        ("cbp", None),
        ("l2", "network"),
    ]
    for method in methods:
        assert method.hyperparameters["step_size"] == 0.1 and method.options["momentum"] == 0.9
        assert {**method.options, **method.hyperparameters}["l2"] == 5e-4
    assert methods[2].hyperparameters["noise"] == 1e-5
    cbp = methods[3]
    assert (cbp.hyperparameters["replacement_rate"], cbp.hyperparameters["maturity_threshold"]) == (1e-5, 1000)
    assert cbp.options["utility"] == "contribution"
    assert preset("paper", "drawings.npz").test_split is None


@pytest.mark.parametrize("dataset", [None, "drawings.npz"])
def test_the_other_presets_compare_what_they_promise(dataset):
    laptop, smoke = preset("laptop", dataset), preset("smoke", dataset)
    assert laptop.dataset == smoke.dataset == (dataset or "procedural")
    assert {method.learner for method in check(laptop)} == {"l2", "shrink_and_perturb", "cbp"}
    assert laptop.train_per_class + laptop.validation_per_class + laptop.test_per_class <= 100
    assert any("reset=network" in text for text in laptop.methods) and check(smoke)
    perceptron = check(preset("perceptron", dataset))
    assert {**perceptron[0].hyperparameters, **perceptron[0].options} == {"step_size": 0.1, "momentum": 0.9, "l2": 5e-4}
    assert [method.label for method in perceptron].count(perceptron[0].label) == 1 and len(perceptron) == 5
    with pytest.raises(ValueError, match=r"preset must be one of .*'perceptron', 'paper'\], got 'large'"):
        preset("large")
    assert EXPERIMENTS["class_incremental"] is class_incremental


@pytest.mark.slow
def test_a_linear_network_has_no_units_to_measure(tmp_path):
    settings = dataclasses.replace(TINY, network="mlp", hidden=(), methods=("bp:step_size=0.1",), tasks=1)
    results = run(settings, tmp_path)
    assert np.isfinite(results.test_accuracy).all() and np.isnan(results.dormant_units).all()


def test_a_run_measures_every_increment(finished):
    check_a_run(*finished)


@pytest.mark.slow
def test_a_run_of_a_residual_network_measures_every_increment(tmp_path):
    check_a_run(run(TINY, tmp_path), tmp_path)


def check_a_run(results, out):
    assert results.identical(load_results(out)) and dict(results.sizes) == {"method": 2, "seed": 1, "task": 2}
    assert {"test_accuracy", "validation_accuracy", "dormant_units", "stable_rank"} <= set(results.data_vars)
    for name, values in results.data_vars.items():
        assert np.isfinite(values).all(), name
    # Both methods start from the same network, and one of them does so again in the second increment.
    first, second = (results.test_loss.values[:, 0, task] for task in (0, 1))
    assert first[0] == pytest.approx(first[1], rel=1e-5) and abs(second[0] - second[1]) > 1e-4


def test_its_picture_shows_the_accuracy_minus_that_of_training_from_scratch(finished, tmp_path, monkeypatch):
    results, _ = finished
    assert class_incremental.summary(results).startswith("class_incremental: test accuracy in percent")
    assert [path.name for path in plot(results, tmp_path)] == ["tasks.png", "measures.png"]
    seen = []
    monkeypatch.setattr("cbp_jax.report.plot_run", lambda drawn, *args, **kwargs: seen.append(drawn) or [])
    plot(results, tmp_path)
    plot(results.isel(method=[0]), tmp_path)
    names = [text.get_text() for text in plot_tasks(seen[0]).legends[0].get_texts()]
    assert names == ["Plain", "Retrained"]
    assert [text.get_text() for text in plot_tasks(seen[1]).legends[0].get_texts()] != ["Plain"], "nothing to compare"
    difference = results.test_accuracy.values[0] - results.test_accuracy.values[1]
    np.testing.assert_allclose(seen[0].relative_accuracy.values, [difference, 0 * difference])
    assert "relative_accuracy" not in seen[1] and "relative_accuracy" not in results


def test_the_network_and_images_are_those_of_the_settings(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, each in (("train", 9), ("test", 4)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (6 * each, 16, 16), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(6 * each) % 6
    np.savez(tmp_path / "drawings.npz", **arrays)
    calls = []

    def run_increments(learner, problem, seeds, hyperparameters, tasks, **settings):
        calls.append((learner, problem, settings))
        yield from ({"replaced_units": np.ones(len(seeds))} for _ in range(tasks))

    monkeypatch.setattr(training, "run_increments", run_increments)
    settings = dataclasses.replace(
        TINY,
        dataset=str(tmp_path / "drawings.npz"),
        test_split="test",
        methods=("bp",),
        tasks=3,
        train_per_class=5,
        validation_per_class=4,
        test_per_class=4,
        batch_size=5,
        downsample=2,
        hidden=(3, 5),
        blocks=(1, 2),
        early_stopping=False,
    )
    run(settings, tmp_path / "run")
    ((learner, problem, given),) = calls
    layers = jax.eval_shape(learner.init, jax.random.key(0))["params"]
    assert layers["head"]["kernel"].shape == (5, 6) and "stage2_block2_conv2" in layers and learner.batch_stats
    assert (problem.input_shape, problem.num_classes, problem.increments) == ((8, 8, 1), 6, 3)
    assert (given["epochs"], given["early_stopping"], given["measured_examples"]) == (1, False, 10)
    assert problem.held_out(problem.data, "test", 0)[0].shape == (4, 8, 8, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"downsample": 0}, "downsample must be at least 1, got 0"),
        ({"dormant_threshold": -0.1}, r"dormant_threshold must not be negative, got -0\.1"),
        ({"measure_every": 5}, "measure_every cannot be given for class_incremental, got 5"),
        ({"test_split": "test"}, "test_split must be left out: procedural images have one split; got 'test'"),
        ({"activation": "tanh"}, "activation must be 'relu', as network 'resnet18' has no setting for it, got 'tanh'"),
        ({"blocks": (1, 1)}, "widths and blocks must be of one length"),
        ({"methods": ("dropout",)}, "method 'dropout': network 'resnet18' has no dropout_rate"),
        ({"methods": ("bp:normalization=layer",)}, "network 'resnet18' has no normalization"),
        ({"methods": ("c_chain",)}, "class_incremental has no reference batches"),
        ({"methods": ("upgd:order=2",)}, "class_incremental has no curvature"),
        (
            {"methods": ("optax:sgd(learning_rate=1)",)},
            "its step size must be a floating-point setting called step_size",
        ),
        ({"methods": ("bp:reset=all",)}, r"reset must be one of \('', 'head', 'network'\), got 'all'"),
        ({"batch_size": 21}, "batch_size must be an integer from 1 to 20; got 21"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_features_are_refused(tmp_path):
    np.savez(tmp_path / "vectors.npz", features=np.zeros((4, 3), np.float32), label=np.arange(4))
    with pytest.raises(ValueError, match=r"dataset must hold images, and .* holds features"):
        run(dataclasses.replace(TINY, dataset=str(tmp_path / "vectors.npz")), tmp_path / "run")
