"""Class-incremental CIFAR-100 (Dohare et al., Nature 2024): a residual network learns more and more classes.

A task is an increment of the classes. Images of CIFAR-100 are normalized as in the paper, others by
`cbp_jax.data.normalization`. A method with `reset=network` is trained from scratch in each increment, as the baseline
for the others. In results, `accuracy` and `loss` are those of training, averaged over all epochs. Dead and dormant
units and ranks are measured on images of the new classes. Dormant units are defined by mean activation
(`metrics.dormant_fraction`); the paper's program counts units that are active on less than 1% of the examples.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cbp_jax import data, nets, problems, training
from cbp_jax.experiments import learners, pools
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.pools import PROCEDURAL

# Mean and deviation of CIFAR-100's training images, from the paper's public program.
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@dataclasses.dataclass(frozen=True)
class Settings(pools.PoolSettings):
    """Class-incremental CIFAR-100, or the same with other images: a task is an increment of the classes."""

    tasks: int = 20
    """Number of increments."""
    network: str = "resnet18"
    """One of mlp, convnet, lenet, resnet18 and vit, optionally with settings: "vit:depth=2,width=32"; or a Flax module:
    "my_module:MyNet(width=64)"."""
    batch_size: int = 90
    """Number of examples in an update."""
    hidden: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each stage of "resnet18", or sizes of the hidden dense layers of another network."""
    measured_examples: int = 1000
    """Number of examples of the new classes on which dead and dormant units and ranks are measured beforehand."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Number of blocks in each stage of "resnet18"."""
    test_split: str | None = None
    """Split of the dataset for test examples; by default these follow the training examples in the split "train"."""
    classes_per_increment: int = 5
    """Number of classes added by each increment."""
    validation_per_class: int = 50
    """Number of validation examples of each class, for choosing the final weights of an increment."""
    epochs: int = 200
    """Number of epochs of each increment. The step size is divided by 5 after 30%, 60% and 80% of them."""
    flip: bool = True
    """Whether training images are flipped from left to right at random."""
    padding: int = 4
    """Pixels of reflection padding around a training image for random crops."""
    max_rotation: float = 15.0
    """Largest random rotation of training images, in degrees."""
    early_stopping: bool = True
    """Whether an increment ends with the weights of best validation accuracy."""


def _methods(replacement_rate: str, maturity_threshold: int, noise: str) -> tuple[str, ...]:
    base = "step_size=0.1,momentum=0.9,l2=5e-4"
    return (
        f"l2:{base}",
        f"l2:{base},reset=head",
        f"shrink_and_perturb:{base},noise={noise}",
        f"cbp:{base},replacement_rate={replacement_rate},maturity_threshold={maturity_threshold}",
        f"l2:{base},reset=network",
    )


def _examples(train: int, validation: int, test: int, measured: int) -> dict[str, int]:
    """Return numbers of examples for each class in a preset, and of measured examples."""
    each = {"train_per_class": train, "validation_per_class": validation, "test_per_class": test}
    return {**each, "measured_examples": measured}


def _smoke(dataset: str | None) -> Settings:
    return Settings(
        hidden=(4,),
        blocks=(1,),
        dataset=dataset or PROCEDURAL,
        methods=("l2:step_size=0.1,momentum=0.9", "l2:step_size=0.1,momentum=0.9,reset=network"),
        seeds=1,
        tasks=2,
        batch_size=10,
        procedural_size=8,
        classes_per_increment=2,
        padding=1,
        epochs=2,
        **_examples(train=20, validation=5, test=10, measured=20),
    )


def _laptop(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or PROCEDURAL,
        methods=_methods(replacement_rate="1e-4", maturity_threshold=100, noise="1e-5"),
        seeds=2,
        tasks=10,
        batch_size=50,
        procedural_size=28,
        downsample=2,
        hidden=(8, 16, 32),
        blocks=(1, 1, 1),
        padding=2,
        epochs=10,
        **_examples(train=70, validation=10, test=20, measured=300),
    )


def _paper(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or "cifar100",
        test_split="test" if dataset in (None, "cifar100") else None,
        methods=_methods(replacement_rate="1e-5", maturity_threshold=1000, noise="1e-5"),
        seeds=15,
    )


def _perceptron(dataset: str | None) -> Settings:
    """Return a small setup in which plasticity is lost: no batch normalization, with the paper's step size, momentum
    and L2."""
    base = "step_size=0.1,momentum=0.9"
    return Settings(
        dataset=dataset or PROCEDURAL,
        network="mlp",
        hidden=(100, 100),
        methods=(
            f"l2:{base},l2=5e-4",
            f"l2:{base},l2=5e-4,reset=head",
            f"shrink_and_perturb:{base},l2=2e-3,noise=3e-3",
            f"cbp:{base},l2=5e-4,replacement_rate=1e-3,maturity_threshold=100",
            f"l2:{base},l2=5e-4,reset=network",
        ),
        seeds=5,
        tasks=20,
        batch_size=50,
        procedural_size=28,
        downsample=2,
        epochs=60,
        flip=False,
        padding=0,
        max_rotation=0.0,
        **_examples(train=70, validation=10, test=20, measured=300),
    )


def check(settings: Settings) -> list[learners.Method]:
    """Check settings, as `stream.check` does, all but those that depend on the images."""
    if settings.classes_per_increment < 1:
        raise ValueError(f"classes_per_increment must be at least 1, got {settings.classes_per_increment}")
    if settings.test_split is not None and settings.dataset == PROCEDURAL:
        raise ValueError(f"test_split must be left out: procedural images have one split; got {settings.test_split!r}")
    if settings.measure_every is not None:
        raise ValueError(f"measure_every cannot be given for class_incremental, got {settings.measure_every}")
    methods = pools.check(settings)
    for text, method in zip(learners.texts_of(settings.methods, methods), methods, strict=True):
        if method.curvature or method.reference:
            what = "curvature" if method.curvature else "reference batches"
            raise ValueError(f"method {text!r}: class_incremental has no {what}")
        if not method.scheduled:
            raise ValueError(
                f"method {text!r}: its step size must be a floating-point setting called step_size or learning_rate, "
                "because it falls in the course of an increment"
            )
    return methods


def _problem(settings: Settings) -> problems.IncrementalProblem:
    load = functools.partial(
        pools.load,
        settings,
        classes=settings.tasks * settings.classes_per_increment,
        per_class=settings.train_per_class + settings.validation_per_class + settings.test_per_class,
    )
    images, test = load(), None if settings.test_split is None else load(settings.test_split)
    return problems.class_incremental(
        images,
        test,
        classes_per_increment=settings.classes_per_increment,
        train_per_class=settings.train_per_class,
        validation_per_class=settings.validation_per_class,
        num_classes=settings.tasks * settings.classes_per_increment,
        test_per_class=settings.test_per_class,
        batch_size=settings.batch_size,
        flip=settings.flip,
        padding=settings.padding,
        max_rotation=settings.max_rotation,
        normalize=CIFAR100 if images.name.split(":")[0] == "cifar100" else data.normalization(images),
    )


def _train(settings: Settings) -> Callable[..., Iterator[dict[str, Any]]]:
    def train(*args: Any, measure_every: None, **given: Any) -> Iterator[dict[str, Any]]:
        del measure_every
        return training.run_increments(*args, epochs=settings.epochs, early_stopping=settings.early_stopping, **given)

    return train


def _measures(settings: Settings) -> dict[str, str]:
    from cbp_jax import report

    return report.stream_measures(test=True, dormant=True) | report.VALIDATION_MEASURES


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw the pictures of a run; see `report.plot_run`.

    If a method was trained from scratch in each increment, differences to its accuracy are drawn too.
    """
    from cbp_jax import report
    from cbp_jax.report import looks

    results = looks.with_names(results, _names(results))
    for label in results.method.values.tolist():
        if "reset=network" in label:
            accuracy = results.test_accuracy
            relative = accuracy.copy(data=accuracy.values - accuracy.loc[{"method": label}].values)
            results = results.assign(relative_accuracy=relative)
            break
    return report.plot_run(results, out, formats=formats)


def _names(results: Any) -> dict[str, str]:
    """Return names of the methods without a remedy, by what they reset; none if two would have the same name."""
    names, resets = {}, {"head": "Head reset", "network": "Retrained"}
    for method, learner in zip(results.method.values.tolist(), results.learner.values.tolist(), strict=True):
        if learner in ("bp", "l2"):
            names[method] = next((name for reset, name in resets.items() if f"reset={reset}" in method), "Plain")
    return names if 1 < len(names) == len(set(names.values())) else {}


def _network_options(settings: Settings) -> dict[str, Any]:
    if nets.read(settings.network).name != "resnet18":
        return {}
    return {"widths": settings.hidden, "blocks": settings.blocks}


class_incremental = Experiment(
    name="class_incremental",
    about="Class-incremental CIFAR-100 (Dohare et al., Nature 2024): a residual network learns more and more classes.",
    Settings=Settings,
    check=check,
    problem=_problem,
    network=_network_options,
    presets={"smoke": _smoke, "laptop": _laptop, "perceptron": _perceptron, "paper": _paper},
    train=_train,
    measures=_measures,
    plot=plot,
)
