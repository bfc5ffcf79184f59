"""Online Permuted MNIST (Dohare et al., Nature 2024): every task shuffles the pixels anew."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cbp_jax import data, problems
from cbp_jax.experiments import learners
from cbp_jax.nets import get_activation
from cbp_jax.training import run_tasks

NAME = "online_permuted"
_SAVE_EVERY = 2.0  # seconds


@dataclasses.dataclass(frozen=True)
class Settings:
    """Online Permuted MNIST, or the same with other images."""

    dataset: str = "digits"
    """Images: a name of `cbp_jax.data.names()`, or of tensorflow-datasets."""
    methods: tuple[str, ...] = ("bp", "cbp")
    """Learners to compare, each a name, with settings if wanted: "cbp:replacement_rate=1e-5,utility=weight"."""
    seeds: int = 3
    """Number of runs of each method, seeds 0, 1, ..."""
    tasks: int = 10
    """Number of permutations."""
    examples_per_task: int | None = None
    """Examples of each task, all of the dataset by default."""
    batch_size: int = 1
    """Examples of an update."""
    hidden: tuple[int, ...] = (100, 100, 100)
    """Sizes of the hidden layers."""
    activation: str = "relu"
    """Activation of the hidden layers."""
    measured_examples: int = 2000
    """Examples on which dead units and ranks are measured before each task."""
    data_dir: Path | None = None
    """Where prepared datasets are; tensorflow-datasets' own default if not given."""
    lanes: Literal["auto", "vmap", "map"] = "auto"
    """How seeds run on one device: together (vmap) or in turn (map); auto chooses by device."""


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
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {list(PRESETS)}, got {name!r}")
    return PRESETS[name](dataset)


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


def run(settings: Settings, out: Path, progress: Callable[[str, int, dict[str, float]], None] | None = None) -> Any:
    """Runs the experiment.

    All methods with the same seed see the same tasks and start from the same weights. Results are written as tasks
    end, so that a run that is killed leaves those of the tasks that it finished.

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
    from cbp_jax import report

    methods = check(settings)
    images = data.load(settings.dataset, data_dir=settings.data_dir)
    problem = problems.online_permuted(
        images, examples_per_task=settings.examples_per_task, batch_size=settings.batch_size
    )
    results = report.new_results(
        [method.label for method in methods],
        [method.learner for method in methods],
        [{**method.hyperparameters, **_numbers(method.options)} for method in methods],
        seeds=settings.seeds,
        tasks=settings.tasks,
        settings=settings,
        experiment=NAME,
    )
    groups = [
        (
            group,
            learners.make_learner(
                group, settings.hidden, settings.activation, problem.input_shape, problem.num_classes
            ),
        )
        for group in _compiled_together(methods)
    ]
    report.save_results(results, out)
    saved = time.monotonic()
    try:
        for group, learner in groups:
            numbers = {
                name: np.repeat([method.hyperparameters[name] for method in group], settings.seeds)
                for name in group[0].hyperparameters
            }
            stream = run_tasks(
                learner,
                problem,
                np.tile(np.arange(settings.seeds), len(group)),
                numbers,
                settings.tasks,
                mode=settings.lanes,
                measured_examples=min(settings.measured_examples, len(images)),
            )
            labels = [method.label for method in group]
            for task, measures in enumerate(stream):
                rows = {name: values.reshape(len(group), -1) for name, values in measures.items()}
                report.record_task(results, task, rows, methods=labels)
                if time.monotonic() - saved > _SAVE_EVERY:
                    report.save_results(results, out)
                    saved = time.monotonic()
                if progress is not None:
                    means = {name: float(np.mean(values)) for name, values in measures.items()}
                    progress(", ".join(labels), len(group) * settings.seeds, means)
    finally:
        report.save_results(results, out)
    return results


def check(settings: Settings) -> list[learners.Method]:
    """Checks settings before anything is computed.

    Returns:
      the methods.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    for name in ("seeds", "tasks", "batch_size", "measured_examples"):
        value = getattr(settings, name)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not settings.hidden or min(settings.hidden) < 1:
        raise ValueError(f"hidden must be sizes of at least one hidden layer, got {settings.hidden}")
    get_activation(settings.activation)
    if settings.lanes not in ("auto", "vmap", "map"):
        raise ValueError(f"lanes must be 'auto', 'vmap' or 'map', got {settings.lanes!r}")
    if not settings.methods:
        raise ValueError(f"methods must name at least one of {list(learners.LEARNERS)}")
    methods = [learners.parse_method(text) for text in settings.methods]
    labels = [method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise ValueError(f"methods must differ, got {list(settings.methods)}")
    return methods


def _numbers(options: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in options.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _compiled_together(methods: list[learners.Method]) -> list[list[learners.Method]]:
    """Methods of one learner that differ in their numbers alone run as lanes of one program."""
    groups: dict[Any, list[learners.Method]] = {}
    for method in methods:
        groups.setdefault((method.learner, tuple(method.options.items())), []).append(method)
    return list(groups.values())
