import dataclasses

import jax
import numpy as np
import pytest
from cbp_jax.experiments.continual_imagenet import check, plot, preset, run

from cbp_jax import load_results
from cbp_jax.experiments import EXPERIMENTS, continual_imagenet

TINY = dataclasses.replace(
    preset("smoke"),
    methods=preset("smoke").methods[1:],
    tasks=2,
    epochs=1,
    channels=(3,),
    kernel_sizes=(5,),
    hidden=(4,),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return run(TINY, out), out


def test_the_papers_preset_has_the_papers_numbers():
    paper = preset("paper")
    assert (paper.dataset, paper.batch_size, paper.epochs) == ("imagenet_resized/32x32", 100, 250)
    assert (paper.train_per_class, paper.test_per_class, paper.seeds, paper.tasks) == (600, 100, 30, 5000)
    assert (paper.channels, paper.kernel_sizes, paper.hidden) == ((32, 64, 128), (5, 3, 3), (128, 128))
    assert (paper.padding, paper.downsample, paper.activation) == ("VALID", 1, "relu")
    methods = check(paper)
    assert all(method.options["momentum"] == 0.9 for method in methods)
    numbers = [(method.learner, dict(method.hyperparameters)) for method in methods]
    assert numbers == [
        ("bp", {"step_size": 0.01}),
        ("bp", {"step_size": 0.001}),
        ("bp", {"step_size": 0.0001}),
        ("l2", {"step_size": 0.03, "l2": 3e-6}),
        ("shrink_and_perturb", {"step_size": 0.01, "l2": 1e-5, "noise": 1e-5}),
        ("cbp", {"step_size": 0.01, "replacement_rate": 3e-4, "decay_rate": 0.99, "maturity_threshold": 100}),
    ]
    assert methods[-1].options["utility"] == "adaptable_contribution"


@pytest.mark.parametrize("dataset", [None, "drawings.npz"])
def test_the_other_presets_compare_what_they_promise(dataset):
    laptop, smoke = preset("laptop", dataset), preset("smoke", dataset)
    assert laptop.dataset == smoke.dataset == (dataset or "procedural")
    learners = [method.learner for method in check(laptop)]
    assert list(dict.fromkeys(learners)) == ["bp", "l2", "shrink_and_perturb", "cbp"]
    assert all(method.options["momentum"] == 0.9 for method in check(laptop))
    assert laptop.seeds >= 3 and laptop.tasks >= 200 and laptop.train_per_class + laptop.test_per_class <= 100
    assert {method.learner for method in check(smoke)} == {"bp", "cbp"}
    with pytest.raises(ValueError, match=r"preset must be one of \['smoke', 'laptop', 'paper'\], got 'large'"):
        preset("large")
    assert EXPERIMENTS["continual_imagenet"] is continual_imagenet


def test_a_run_measures_every_task(finished):
    results, out = finished
    assert results.identical(load_results(out)) and dict(results.sizes) == {"method": 1, "seed": 2, "task": 2}
    assert {"test_accuracy", "test_loss", "accuracy", "loss", "dead_units", "dormant_units"} <= set(results.data_vars)
    for name, values in results.data_vars.items():
        assert np.isfinite(values).all(), name
    assert results.momentum.values.tolist() == [0.9]
    in_twentieths = results.test_accuracy.values * 20  # 2 classes with 10 test images each
    np.testing.assert_allclose(in_twentieths, np.rint(in_twentieths), atol=1e-4)


def test_its_table_and_pictures_show_accuracy_on_test_images(finished, tmp_path):
    results, _ = finished
    table = continual_imagenet.summary(results)
    assert table.startswith("continual_imagenet: test accuracy in percent")
    assert [path.name for path in plot(results, tmp_path)] == ["tasks.png", "measures.png"]


@pytest.mark.parametrize(("tasks", "bin_size"), [(199, None), (200, 50)])
def test_long_runs_are_drawn_in_bins_of_fifty_tasks(monkeypatch, tmp_path, finished, tasks, bin_size):
    seen = {}
    monkeypatch.setattr("cbp_jax.report.plot_run", lambda *args, **kwargs: seen.update(kwargs) or [])
    plot(finished[0].isel(task=np.zeros(tasks, int)), tmp_path)
    assert seen["bin_size"] == bin_size


def test_the_network_and_images_are_those_of_the_settings(trained, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 16, 24), dtype=np.uint8)
    np.savez(tmp_path / "drawings.npz", image=images, label=np.arange(24) % 3)
    settings = dataclasses.replace(
        TINY,
        dataset=str(tmp_path / "drawings.npz"),
        methods=("bp",),
        train_per_class=5,
        test_per_class=3,
        downsample=2,
        padding="SAME",
        kernel_sizes=(3,),
        measured_examples=1000,
    )
    run(settings, tmp_path / "run")
    (group,) = trained
    layers = jax.eval_shape(group.learner.init, jax.random.key(0))["params"]
    shapes = {name: layer["kernel"].shape for name, layer in layers.items()}
    assert shapes == {"Conv_0": (3, 3, 1, 3), "Dense_0": (4 * 6 * 3, 4), "Dense_1": (4, 2)}
    assert group.problem.input_shape == (8, 12, 1) and group.measured_examples == 10
    assert group.dormant_threshold == 0.01
    x, _ = group.problem.test(group.problem.data, group.problem.make_task(group.problem.data, jax.random.key(0), 0))
    assert x.min() < -0.1 and abs(x).max() <= 1 and abs(x.mean()) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"downsample": 0}, "downsample must be at least 1, got 0"),
        ({"dormant_threshold": -0.1}, r"dormant_threshold must not be negative, got -0\.1"),
        ({"padding": "full"}, "padding must be 'VALID' or 'SAME', got 'full'"),
        ({"channels": (3, 4)}, "channels and kernel_sizes must be of one length"),
        ({"hidden": (0,)}, r"hidden must be sizes of at least 1, or none for a linear network, got \(0,\)"),
        ({"methods": ("bp:momentum=1",)}, r"momentum must be in \[0, 1\), got 1"),
        ({"methods": ("adam:momentum=0.9",)}, r"expected setting=value with one of .*, got 'momentum=0\.9'"),
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
