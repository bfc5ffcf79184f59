"""Continual ImageNet (Dohare et al., Nature 2024): a new pair of classes in each task, for many epochs.

Pixels are scaled to [-1, 1] (see `cbp_jax.data.normalization`); the paper's images are normalized in its own file. As
in its program, the decay of shrink-and-perturb passes through the momentum, and the output layer is set to 0 before
each task. Its momentum is set to 0 then, too; the program keeps it. In results, `accuracy` and `loss` are those
of training, averaged over all epochs. Dead and dormant units and ranks are measured on images of the next task. Dormant
units are defined by mean activation (`metrics.dormant_fraction`); the paper's program counts units that are active on
less than 1% of the examples.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cbp_jax import data, nets, problems
from cbp_jax.experiments import learners, pools
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.pools import PROCEDURAL

BIN = 50  # number of tasks averaged in the paper's figure


@dataclasses.dataclass(frozen=True)
class Settings(pools.PoolSettings):
    """Continual ImageNet, or the same with other images of many classes: a task is to distinguish two classes."""

    batch_size: int = 100
    """Number of examples in an update."""
    hidden: tuple[int, ...] = (128, 128)
    """Sizes of the hidden dense layers."""
    procedural_classes: int = 1000
    """Number of classes of procedural images."""
    train_per_class: int = 600
    """Number of training examples of each class."""
    epochs: int = 250
    """How often a task shows each of its training examples."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Channels of the convolutions of "convnet", each followed by 2x2 max pooling."""
    kernel_sizes: tuple[int, ...] = (5, 3, 3)
    """Height and width of the convolutions' kernels."""
    padding: Literal["VALID", "SAME"] = "VALID"
    """Padding of the convolutions."""


def _smoke(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or PROCEDURAL,
        methods=("bp:step_size=0.01,momentum=0.9", "cbp:step_size=0.01,momentum=0.9,replacement_rate=1e-2"),
        seeds=2,
        tasks=3,
        batch_size=10,
        channels=(4, 8),
        procedural_classes=6,
        procedural_size=16,
        train_per_class=20,
        kernel_sizes=(5, 3),
        test_per_class=10,
        epochs=2,
        hidden=(10,),
        measured_examples=20,
    )


def _laptop(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or PROCEDURAL,
        methods=(
            *(f"bp:step_size={step},momentum=0.9" for step in (0.003, 0.01, 0.03)),
            # The best of a small search on one seed, at a step size with which plasticity is lost.
            "l2:step_size=0.03,momentum=0.9,l2=1e-3",
            "shrink_and_perturb:step_size=0.03,momentum=0.9,l2=1e-3,noise=1e-3",
            *(
                f"cbp:step_size={step},momentum=0.9,replacement_rate=1e-3,utility=adaptable_contribution"
                for step in (0.01, 0.03)
            ),
        ),
        seeds=10,
        hidden=(32, 32),
        tasks=200,
        batch_size=20,
        procedural_classes=400,
        procedural_size=28,
        downsample=2,
        channels=(8, 16),
        train_per_class=80,
        kernel_sizes=(5, 3),
        test_per_class=20,
        epochs=50,
        measured_examples=100,
    )


def _paper(dataset: str | None) -> Settings:
    # The program's configuration of backpropagation has 2,000 tasks; here all learners have 5,000.
    momentum = "momentum=0.9"
    return Settings(
        dataset=dataset or "imagenet_resized/32x32",
        methods=(
            *(f"bp:step_size={step},{momentum}" for step in (0.01, 0.001, 0.0001)),
            f"l2:step_size=0.03,{momentum},l2=3e-6",
            f"shrink_and_perturb:step_size=0.01,{momentum},l2=1e-5,noise=1e-5",
            f"cbp:step_size=0.01,{momentum},replacement_rate=3e-4,decay_rate=0.99,maturity_threshold=100,"
            "utility=adaptable_contribution",
        ),
        seeds=30,
        tasks=5000,
        measured_examples=1200,
    )


def check(settings: Settings) -> list[learners.Method]:
    """Check settings, as `stream.check` does, all but those that depend on the images."""
    if settings.procedural_classes < 1:
        raise ValueError(f"procedural_classes must be at least 1, got {settings.procedural_classes}")
    methods = pools.check(settings)
    nets.ConvNet(2, settings.channels, settings.kernel_sizes, padding=settings.padding)
    return methods


def _problem(settings: Settings) -> problems.Problem:
    images = pools.load(
        settings,
        classes=settings.procedural_classes,
        per_class=settings.train_per_class + settings.test_per_class,
    )
    return problems.continual_images(
        images,
        train_per_class=settings.train_per_class,
        test_per_class=settings.test_per_class,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        normalize=data.normalization(images),
    )


def _network_options(settings: Settings) -> dict[str, Any]:
    """Return network options: the output layer, and the optimizer's state for it, are reset to 0 before each task."""
    convolutions = ("channels", "kernel_sizes", "padding") if nets.read(settings.network).name == "convnet" else ()
    return {"reset_head": True, **{name: getattr(settings, name) for name in convolutions}}


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw the pictures of a run; see `report.plot_run`. With at least four bins of 50 tasks, bins have 50 tasks."""
    from cbp_jax import report

    return report.plot_run(results, out, bin_size=BIN if results.sizes["task"] >= 4 * BIN else None, formats=formats)


continual_imagenet = Experiment(
    name="continual_imagenet",
    about="Continual ImageNet (Dohare et al., Nature 2024): a new pair of classes in each task, for many epochs.",
    Settings=Settings,
    presets={"smoke": _smoke, "laptop": _laptop, "paper": _paper},
    problem=_problem,
    network=_network_options,
    check=check,
    plot=plot,
)
