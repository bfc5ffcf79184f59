"""Input-permuted MNIST (Elsayed & Mahmood, ICLR 2024): every task shuffles the pixels, online, after few examples."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cbp_jax import data, nets, problems
from cbp_jax.experiments import stream
from cbp_jax.experiments.stream import check, plot, summary, total

__all__ = ["NAME", "PRESETS", "Settings", "check", "paper_grid", "plot", "preset", "run", "summary", "total"]

NAME = "input_permuted"


def network_options(settings: stream.ImageStreamSettings) -> dict[str, Any]:
    """Weights and biases of the paper's network start as in PyTorch; others, as they do by themselves."""
    papers = nets.read(settings.network).name == "mlp"
    return {"kernel_init": nets.fan_in_uniform(), "bias_init": "fan_in"} if papers else {}


@dataclasses.dataclass(frozen=True)
class Settings(stream.ImageStreamSettings):
    """Input-permuted MNIST, or the same with other images: a task is a permutation of the pixels."""

    hidden: tuple[int, ...] = (300, 150)
    """Sizes of the hidden layers."""


def paper_grid() -> tuple[str, ...]:
    """The methods of the paper's search: learners with all combinations of the values that it tried.

    Where the paper leaves a value open (the strength of consolidation), it is a decade to either side of the default.

    >>> len([method for method in paper_grid() if method.startswith("upgd:step_size")])
    120
    """
    steps = {"step_size": ("1e-2", "1e-3", "1e-4", "1e-5")}
    noise = {"sigma": ("0.01", "0.1", "1")}
    decay = {"weight_decay": ("0", "0.1", "0.01", "0.001", "0.0001")}
    utility = {"beta_utility": ("0.999", "0.9999")}
    strength = {"strength": ("0.01", "0.1", "1")}
    grids: dict[str, dict[str, tuple[str, ...]]] = {
        "bp": steps,
        "pgd": steps | noise | decay,  # with decay it is the paper's shrink-and-perturb
        "adam": steps,
        "upgd": steps | utility | noise | decay,
        "upgd:protect=false": steps | utility | noise | decay,
        "ewc": steps | strength,
        "mas": steps | strength,
        "synaptic_intelligence": steps | strength,
        "rwalk": steps | strength,
    }
    return tuple(
        f"{learner}{',' if ':' in learner else ':'}"
        + ",".join(f"{name}={value}" for name, value in zip(grid, values, strict=True))
        for learner, grid in grids.items()
        for values in itertools.product(*grid.values())
    )


def preset(name: str, dataset: str | None = None) -> Settings:
    """The settings of a preset.

    Args:
      name: "smoke" (seconds), "laptop" (minutes on 2 cores) or "paper" (the search, for accelerators).
      dataset: images; by default digits, and MNIST in the paper's preset.

    Returns:
      the settings.

    Raises:
      ValueError: there is no such preset.

    Example:
      >>> preset("paper").tasks * preset("paper").examples_per_task
      1000000
    """
    return stream.preset(PRESETS, name, dataset)


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


# Of a small search on one seed of MNIST.
LAPTOP_METHODS = (
    "bp:step_size=0.005",
    "pgd:step_size=0.005,sigma=0.01",
    "shrink_and_perturb:step_size=0.01,l2=1e-2,noise=1e-4",
    "adam:step_size=3e-4",
    "cbp:step_size=0.005",
    "upgd:step_size=0.01,sigma=0.01,weight_decay=1e-2",
)


def _paper(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or "mnist",
        methods=paper_grid(),
        seeds=20,
        tasks=200,
        examples_per_task=5000,
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
    problem = problems.online_permuted(
        images,
        examples_per_task=settings.examples_per_task,
        batch_size=settings.batch_size,
        normalize=data.normalization(images),
        flatten=stream.flat(settings, images),
    )
    measured = min(settings.measured_examples, len(images))
    return stream.run(NAME, settings, problem, out, progress, measured_examples=measured, **network_options(settings))
