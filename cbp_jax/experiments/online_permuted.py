"""Online Permuted MNIST (Dohare et al., Nature 2024): every task shuffles the pixels anew."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cbp_jax import data, problems
from cbp_jax.experiments import stream
from cbp_jax.experiments.stream import check, plot, summary, total

__all__ = ["NAME", "PRESETS", "Settings", "check", "plot", "preset", "run", "summary", "total"]

NAME = "online_permuted"


@dataclasses.dataclass(frozen=True)
class Settings(stream.ImageStreamSettings):
    """Online Permuted MNIST, or the same with other images: a task is a permutation of the pixels."""


def preset(name: str, dataset: str | None = None) -> Settings:
    """The settings of a preset.

    Args:
      name: "smoke" (seconds), "laptop" (the comparison on 2 cores in minutes) or "paper".
      dataset: images; by default digits, and MNIST in the paper's preset.

    Returns:
      the settings.

    Raises:
      ValueError: there is no such preset.

    Example:
      >>> preset("paper").hidden
      (2000, 2000, 2000)
    """
    return stream.preset(PRESETS, name, dataset)


def _smoke(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or "digits",
        methods=("bp", "cbp"),
        seeds=2,
        tasks=4,
        examples_per_task=200,
        hidden=(20, 20),
        measured_examples=100,
    )


def _laptop(dataset: str | None) -> Settings:
    # Each learner has the best of the settings that a small search on one seed found for it.
    if (dataset or "digits") == "digits":
        return Settings(
            dataset="digits",
            methods=(
                "bp:step_size=0.01",
                "adam:step_size=3e-4",
                "l2:step_size=0.003,l2=1e-3",
                "l2_init:step_size=0.01,l2=1e-2",
                "shrink_and_perturb:step_size=0.01,l2=1e-2,noise=2e-3",
                "cbp:step_size=0.01",
            ),
            seeds=5,
            tasks=300,
            hidden=(50, 50, 50),
        )
    return Settings(
        dataset=dataset,
        methods=(
            "bp:step_size=0.003",
            "adam:step_size=1e-4",
            "l2:step_size=0.003,l2=3e-3",
            "l2_init:step_size=0.003,l2=1e-2",
            "shrink_and_perturb:step_size=0.003,l2=3e-3,noise=2e-4",
            "dropout:step_size=0.003",
            "cbp:step_size=0.003",
        ),
        seeds=5,
        tasks=150,
        examples_per_task=4000,
        hidden=(100, 100, 100),
    )


def _paper(dataset: str | None) -> Settings:
    paper = "step_size=0.003"
    return Settings(
        dataset=dataset or "mnist",
        methods=(
            *(f"bp:step_size={step}" for step in (0.01, 0.003, 0.001)),
            *(f"l2:{paper},l2={l2}" for l2 in (1e-3, 1e-4, 1e-5)),
            *(f"shrink_and_perturb:{paper},l2=1e-4,noise={noise}" for noise in (1e-4, 1e-5, 1e-6)),
            *(f"adam:step_size={step}" for step in (1e-4, 5e-5, 3e-5)),
            *(f"cbp:{paper},replacement_rate={rate},utility=adaptable_contribution" for rate in (1e-4, 1e-5, 1e-6)),
        ),
        seeds=30,
        tasks=800,
        examples_per_task=60_000,
        hidden=(2000, 2000, 2000),
    )


PRESETS: dict[str, Callable[[str | None], Settings]] = {"smoke": _smoke, "laptop": _laptop, "paper": _paper}


def run(settings: Settings, out: Path, progress: stream.Progress | None = None) -> Any:
    """Runs the experiment.

    All methods with the same seed see the same tasks and start from the same weights. Results and the state are
    written as tasks end: a run that is killed leaves what it finished, and goes on from there when it is started again.

    Args:
      settings: what to run.
      out: folder for the results.
      progress: called after each task with the labels of the methods that ran, how many lanes (methods times seeds)
        finished it, and the means of what was measured.

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
        flatten=stream.flat(settings, images),
    )
    measured = min(settings.measured_examples, len(images))
    return stream.run(NAME, settings, problem, out, progress, measured_examples=measured)
