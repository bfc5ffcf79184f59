"""Label-permuted classification (Elsayed & Mahmood, ICLR 2024): every task renames the classes of the same images."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cbp_jax import data, problems
from cbp_jax.experiments import input_permuted, stream
from cbp_jax.experiments.stream import check, plot, summary, total

__all__ = ["NAME", "PRESETS", "Settings", "check", "plot", "preset", "run", "summary", "total"]

NAME = "label_permuted"


@dataclasses.dataclass(frozen=True)
class Settings(stream.ImageStreamSettings):
    """Label-permuted EMNIST, CIFAR-10, mini-ImageNet, or other labelled images or features."""

    hidden: tuple[int, ...] = (300, 150)
    """Sizes of the hidden dense layers."""
    examples_per_task: int = 2500
    """Examples of each task."""


def preset(name: str, dataset: str | None = None) -> Settings:
    """The settings of a preset.

    Args:
      name: "smoke" (seconds), "laptop" (minutes on 2 cores) or "paper" (the search, for accelerators).
      dataset: images or features; by default digits, and EMNIST in the paper's preset. With "cifar10" the paper's
        network is convolutional.

    Returns:
      the settings.

    Raises:
      ValueError: there is no such preset.

    Example:
      >>> preset("paper").dataset, preset("paper", "cifar10").network, preset("paper", "cifar10").hidden
      ('emnist/balanced', 'lenet', (120, 84))
    """
    return stream.preset(PRESETS, name, dataset)


# Of a small search on one seed of MNIST.
LAPTOP_METHODS = (
    "bp:step_size=0.015",
    "pgd:step_size=0.01,sigma=0.03",
    "shrink_and_perturb:step_size=0.01,l2=1e-4,noise=1e-4",
    "adam:step_size=3e-4",
    "cbp:step_size=0.01",
    "upgd:step_size=0.02,sigma=0.01",
)


def _smoke(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or "digits",
        methods=("bp", "upgd"),
        seeds=2,
        tasks=4,
        examples_per_task=200,
        hidden=(20, 10),
        measured_examples=100,
        measure_every=5,
    )


def _laptop(dataset: str | None) -> Settings:
    digits = (dataset or "digits") == "digits"
    return Settings(
        dataset=dataset or "digits",
        methods=LAPTOP_METHODS,
        seeds=5,
        tasks=150 if digits else 80,
        examples_per_task=1000 if digits else 2500,
        hidden=(50, 25) if digits else (150, 75),
        measured_examples=1000,
        measure_every=10,
    )


def _paper(dataset: str | None) -> Settings:
    convolutional = (dataset or "").split("/")[0].startswith("cifar")
    return Settings(
        dataset=dataset or "emnist/balanced",
        methods=input_permuted.paper_grid(),
        seeds=20,
        tasks=400,
        network="lenet" if convolutional else "mlp",
        hidden=(120, 84) if convolutional else (300, 150),
        measure_every=1,
    )


PRESETS: dict[str, Callable[[str | None], Settings]] = {"smoke": _smoke, "laptop": _laptop, "paper": _paper}


def run(settings: Settings, out: Path, progress: stream.Progress | None = None) -> Any:
    """Runs the experiment; as `cbp_jax.experiments.stream.run`, on inputs normalised as the paper's.

    Args:
      settings: what to run.
      out: folder for the results.
      progress: called after each task.

    Returns:
      the results, an `xarray.Dataset`; see `report.new_results`.

    Raises:
      ValueError: a setting is out of range or unknown, before anything is computed.
      cbp_jax.data.DatasetUnavailable: the dataset is not on this machine.
    """
    check(settings)
    images = data.load(settings.dataset, data_dir=settings.data_dir)
    problem = problems.label_permuted(
        images,
        examples_per_task=settings.examples_per_task,
        batch_size=settings.batch_size,
        normalize=data.normalization(images),
        flatten=stream.flat(settings, images),
    )
    measured = min(settings.measured_examples, len(images))
    options = input_permuted.network_options(settings)
    return stream.run(NAME, settings, problem, out, progress, measured_examples=measured, **options)
