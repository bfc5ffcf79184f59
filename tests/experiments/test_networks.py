"""The networks that experiments on images accept."""

import dataclasses
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from cbp_jax import training
from cbp_jax.experiments import (
    class_incremental,
    continual_imagenet,
    input_permuted,
    label_permuted,
    online_permuted,
)

METHODS = ("cbp", "redo", "bp:reset=head")
SMALL = {
    "mlp": "mlp",
    "convnet": "convnet(channels=(3,),kernel_sizes=(3,),hidden=(4,))",
    "lenet": "lenet",
    "resnet18": "resnet18:widths=(3,4),blocks=(1,1)",
    "vit": "vit:patch=8,width=8,depth=1,heads=2,hidden=3",
    "own": "my_nets:Own(width=2)",
}
IMAGE = (16, 16, 1)


class Own(nn.Module):
    """A user's module, with sizes that the experiment sets and one setting of its own."""

    num_outputs: int
    hidden: tuple[int, ...]
    width: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x)).mean((1, 2))
        for size in self.hidden:
            x = nn.relu(nn.Dense(size)(x))
        return nn.Dense(self.num_outputs)(x)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_nets", sys.modules[__name__])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.integers(0, 256, (30, *IMAGE), dtype=np.uint8), y=np.arange(30) % 3)
    return str(path)


@pytest.fixture
def increments(monkeypatch, trained):
    """Replace the training of increments, too."""

    def run_increments(learner, problem, seeds, hyperparameters, tasks, *, epochs, early_stopping, **settings):
        rows = training.run_tasks(learner, problem, seeds, hyperparameters, tasks, measure_every=None, **settings)
        return ({"replaced_units": values["replaced_units"]} for values in rows)

    monkeypatch.setattr(training, "run_increments", run_increments)
    return trained


@pytest.mark.slow
@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize(
    "experiment",
    [online_permuted, input_permuted, label_permuted, continual_imagenet, class_incremental],
    ids=lambda experiment: experiment.name,
)
def test_every_experiment_on_images_takes_every_network(increments, images, tmp_path, experiment, network):
    sizes = {"train_per_class": 4, "test_per_class": 3} if hasattr(experiment.Settings, "train_per_class") else {}
    sizes |= {"validation_per_class": 2, "classes_per_increment": 1} if experiment is class_incremental else {}
    settings = dataclasses.replace(
        experiment.preset("smoke", images),
        methods=METHODS,
        tasks=2,
        seeds=1,
        batch_size=1,
        network=SMALL[network],
        hidden=(5, 4),
        **({"examples_per_task": 10} if hasattr(experiment.Settings, "examples_per_task") else {}),
        **sizes,
    )
    experiment.run(settings, tmp_path / "run")
    for method, group in zip(METHODS, increments, strict=True):
        flat = network == "mlp" and experiment in (online_permuted, input_permuted, label_permuted)
        assert group.problem.input_shape == ((256,) if flat else IMAGE)
        params = jax.eval_shape(group.learner.init, jax.random.key(0))
        layers = params["params"]
        if network in ("mlp", "own", "lenet"):
            assert layers["Dense_1"]["kernel"].shape == (5, 4)  # from the settings
        if network == "own":
            assert layers["Conv_0"]["kernel"].shape == (3, 3, 1, 2)
        if method != METHODS[0]:
            continue
        numbers = {name: values[0] for name, values in group.hyperparameters.items()}
        optimizer = group.learner.optimizer(numbers, jax.random.key(0))
        state = jax.eval_shape(optimizer.init, params)
        assert {name: age.shape for name, age in state.age.items()} == {
            unit.name: (unit.size,) for unit in group.learner.units
        }
