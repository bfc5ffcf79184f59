import dataclasses

import jax
import numpy as np
import pytest
from cbp_jax.experiments.label_permuted import check, preset, run

from cbp_jax import data, load_results
from cbp_jax.experiments import EXPERIMENTS, label_permuted, published

TINY = dataclasses.replace(
    preset("smoke"), methods=("upgd",), seeds=1, tasks=2, examples_per_task=12, hidden=(4,), measured_examples=20
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write an array file with color images, and one with features."""
    rng = np.random.default_rng(0)
    folder, labels = tmp_path_factory.mktemp("arrays"), np.arange(30) % 3
    images = rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", image=images, label=labels)
    np.savez(folder / "features.npz", features=rng.normal(size=(30, 5)).astype(np.float32), label=labels)
    return {"images": str(folder / "images.npz"), "features": str(folder / "features.npz")}


def test_the_papers_preset_has_the_papers_numbers():
    paper = preset("paper")
    assert (paper.dataset, paper.network, paper.hidden, paper.batch_size) == ("emnist/balanced", "mlp", (300, 150), 1)
    assert paper.examples_per_task == 2500 and paper.tasks * paper.examples_per_task == 1_000_000
    assert paper.seeds == 20 and paper.activation == "relu" and paper.measure_every == 1
    cifar = preset("paper", "cifar10")
    assert (cifar.network, cifar.hidden) == ("lenet:conv_activation=identity", (120, 84))
    same = {"dataset": None, "network": None, "hidden": None, "methods": None}
    assert dataclasses.replace(cifar, **same) == dataclasses.replace(paper, **same)
    features = preset("paper", "mini_imagenet.npz")
    assert dataclasses.replace(features, **same) == dataclasses.replace(paper, **same) and features.network == "mlp"


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        (None, "label_permuted_emnist"),
        ("mnist", "label_permuted_emnist"),
        ("cifar10", "label_permuted_cifar10"),
        ("folder/mini-ImageNet.npz", "label_permuted_mini_imagenet"),
    ],
)
def test_methods_follow_the_dataset(dataset, problem):
    paper, best = preset("paper", dataset), preset("best", dataset)
    assert paper.methods == published.paper_grid(problem) and best.methods == published.best_methods(problem)
    assert best == dataclasses.replace(paper, methods=best.methods) and len(check(best)) == 10


def test_the_preset_restarts_follows_the_dataset():
    for dataset in (None, "cifar10"):
        restarts, paper = preset("restarts", dataset), preset("paper", dataset)
        assert restarts == dataclasses.replace(paper, methods=restarts.methods)
        found = [(method.learner, method.hyperparameters["step_size"], method.reset) for method in check(restarts)]
        assert found == [("adam", 10.0**-power, reset) for power in range(1, 6) for reset in ("", "network")]


@pytest.mark.parametrize("dataset", [None, "mnist"])
def test_the_other_presets_compare_what_they_promise(dataset):
    for name in ("smoke", "laptop"):
        settings = preset(name, dataset)
        assert settings.dataset == (dataset or "digits") and settings.measure_every and settings.network == "mlp"
        assert {"bp", "upgd"} <= {method.learner for method in check(settings)}
    smoke = preset("smoke", dataset)
    assert smoke.seeds * smoke.tasks * smoke.examples_per_task * len(smoke.methods) < 10_000  # takes seconds
    with pytest.raises(
        ValueError, match=r"preset must be one of \['smoke', 'laptop', 'paper', 'best', 'restarts'\], got 'large'"
    ):
        preset("large")
    assert EXPERIMENTS["label_permuted"] is label_permuted


def shapes(learner):
    layers = jax.eval_shape(learner.init, jax.random.key(0))["params"]
    return {name: layer["kernel"].shape for name, layer in layers.items()}


@pytest.mark.slow
def test_networks_have_dense_layers_only_or_after_convolutions(trained, files, tmp_path):
    run(dataclasses.replace(TINY, hidden=(300, 150)), tmp_path / "digits")
    run(dataclasses.replace(TINY, dataset=files["features"]), tmp_path / "features")
    run(dataclasses.replace(TINY, dataset=files["images"], network="lenet", hidden=(120, 84)), tmp_path / "images")
    digits, features, images = trained
    assert shapes(digits.learner) == {"Dense_0": (64, 300), "Dense_1": (300, 150), "Dense_2": (150, 10)}
    assert shapes(features.learner) == {"Dense_0": (5, 4), "Dense_1": (4, 3)}
    assert shapes(images.learner) == {
        "Conv_0": (5, 5, 3, 6),
        "Conv_1": (5, 5, 6, 16),
        "Dense_0": (16, 120),
        "Dense_1": (120, 84),
        "Dense_2": (84, 3),
    }
    for group in trained:  # weights and biases are uniform in ±1/sqrt(fan-in)
        for layer in jax.jit(group.learner.init)(jax.random.key(0))["params"].values():
            bound = np.prod(layer["kernel"].shape[:-1]) ** -0.5
            for values in layer.values():
                assert 0.3 * bound < np.abs(values).max() <= bound * (1 + 1e-6)
    assert [group.measured_examples for group in trained] == [20, 20, 20]


@pytest.mark.slow
def test_the_papers_lenet_has_no_activation_after_its_convolutions(trained, files, tmp_path):
    papers = preset("paper", "cifar10").network
    for network in (papers, "lenet"):
        settings = dataclasses.replace(TINY, dataset=files["images"], network=network)
        run(settings, tmp_path / network.replace(":", "_"))
    x = np.random.default_rng(0).normal(size=(8, *trained[0].problem.input_shape)).astype(np.float32)
    for group, activated in zip(trained, (False, True), strict=True):
        _, features = jax.jit(lambda x, of=group.learner: of.predict(of.init(jax.random.key(0)), x))(x)
        least = {name.removeprefix("params/"): float(np.min(values)) for name, values in features.items()}
        assert set(least) == {"Conv_0", "Conv_1", "Dense_0"} and least["Dense_0"] >= 0
        assert [least["Conv_0"] >= 0, least["Conv_1"] >= 0] == [activated] * 2


def test_labels_are_permuted_and_images_only_normalized(trained, tmp_path):
    run(dataclasses.replace(TINY, measured_examples=5000), tmp_path)
    (group,) = trained
    assert group.measured_examples == 1797  # not more than the dataset has
    images, problem = data.load("digits"), group.problem
    show = lambda data, key: problem.evaluation(data, problem.make_task(data, key, 1), 1797)
    x, y = jax.jit(show)(problem.data, jax.random.key(0))
    mean, std = data.normalization(images)
    plain = (images.images.reshape(1797, 64) / images.max_value - mean) / std
    np.testing.assert_allclose(x.mean(0), plain.mean(0), atol=1e-4)
    counts, original = np.bincount(y).tolist(), np.bincount(images.labels).tolist()
    assert sorted(counts) == sorted(original) and counts != original


@pytest.mark.slow
def test_a_run_of_a_convolutional_network_from_end_to_end(files, tmp_path):
    results = run(dataclasses.replace(TINY, methods=("bp",), dataset=files["images"], network="lenet"), tmp_path)
    assert results.identical(load_results(tmp_path)) and results.attrs["experiment"] == "label_permuted"
    assert {"accuracy", "plasticity", "gradient_l0", "weight_rank"} <= set(results.data_vars)
    for name, values in results.data_vars.items():
        assert np.isfinite(values).all() and values.shape == (1, 1, 2), name
    for name in ("accuracy", "plasticity", "gradient_l0", "weight_rank", "dead_units"):
        assert (results[name] >= 0).all() and (results[name] <= 1).all(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "resnet"}, "network 'resnet': the network must be one of"),
        ({"network": "lenet"}, "images of 8x8 are too small for kernel_sizes"),
        ({"network": "lenet", "dataset": "features"}, "network 'lenet' needs images, and .* holds features"),
        ({"examples_per_task": 0}, "examples_per_task must be an integer of at least 1; got 0"),
        ({"batch_size": 13}, "batch_size must be an integer from 1 to 12; got 13"),
        ({"measure_every": 13}, "measure_every must be at most the 12 updates of a task, got 13"),
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"methods": ("ewc:beta_importance=1",)}, r"beta_importance must be in \[0, 1\), got 1"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_is_trained_or_written(trained, files, tmp_path, change, message):
    change = {name: files.get(value, value) if name == "dataset" else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not trained and not (tmp_path / "run").exists()
