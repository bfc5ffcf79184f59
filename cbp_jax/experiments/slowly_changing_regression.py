"""Slowly-Changing Regression (Dohare et al., Nature 2024): a small network tracks a target as single inputs change."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cbp_jax import nets, problems
from cbp_jax.experiments import stream
from cbp_jax.experiments.stream import check, summary, total

__all__ = ["ACTIVATIONS", "NAME", "PRESETS", "Settings", "check", "plot", "preset", "run", "summary", "total"]

NAME = "slowly_changing_regression"
ACTIVATIONS = ("sigmoid", "tanh", "elu", "leaky_relu", "relu", "swish")  # of the paper


@dataclasses.dataclass(frozen=True)
class Settings(stream.StreamSettings):
    """Slowly-Changing Regression: a task is the stretch between two flips of an input bit."""

    hidden: tuple[int, ...] = (5,)
    """Sizes of the hidden layers."""
    num_inputs: int = 20
    """Input bits, besides a constant 1."""
    flipping_bits: int = 15
    """Input bits that stay as they are during a task, one of which flips before the next."""
    examples_per_task: int = 10_000
    """Examples from one flip to the next."""
    target_units: int = 100
    """Linear threshold units of the target network."""
    beta: float = 0.7
    """Fraction of the inputs that must agree with a threshold unit's weights for it to be on."""


def preset(name: str, dataset: str | None = None) -> Settings:
    """The settings of a preset.

    Args:
      name: "smoke" (seconds), "laptop" (a few minutes on 2 cores) or "paper" (3 million examples, 100 runs).
      dataset: must be None: the samples are drawn.

    Returns:
      the settings.

    Raises:
      ValueError: there is no such preset, or a dataset is given.

    Example:
      >>> preset("paper").tasks * preset("paper").examples_per_task, len(preset("paper").methods)
      (3000000, 18)
    """
    if dataset is not None:
        raise ValueError(f"{NAME} draws its samples; it takes no dataset, got {dataset!r}")
    return stream.preset(PRESETS, name)


def _smoke() -> Settings:
    return Settings(methods=("bp", "cbp"), seeds=2, tasks=4, examples_per_task=200, measured_examples=100)


def _laptop() -> Settings:
    return Settings(
        methods=(
            *(f"bp:activation={activation}" for activation in ACTIVATIONS),
            "cbp:activation=relu",
            "upgd:activation=relu,sigma=0.1,weight_decay=1e-2",  # of a small search on two seeds
        ),
        seeds=10,
        tasks=100,
        measured_examples=1000,
    )


def _paper() -> Settings:
    return Settings(
        methods=tuple(
            f"bp:activation={activation},step_size={step}"
            for activation in ACTIVATIONS
            for step in ("0.01", "0.003", "0.001")
        ),
        seeds=100,
        tasks=300,
        measured_examples=1000,
    )


PRESETS: dict[str, Callable[[], Settings]] = {"smoke": _smoke, "laptop": _laptop, "paper": _paper}


def run(settings: Settings, out: Path, progress: stream.Progress | None = None) -> Any:
    """Runs the experiment; as `cbp_jax.experiments.stream.run`. Its results have a loss and no accuracy.

    Args:
      settings: what to run.
      out: folder for the results.
      progress: called after each task.

    Returns:
      the results, an `xarray.Dataset`; see `report.new_results`.

    Raises:
      ValueError: a setting is out of range or unknown, before anything is computed.
    """
    check(settings)
    problem = problems.slowly_changing_regression(
        num_inputs=settings.num_inputs,
        flipping_bits=settings.flipping_bits,
        examples_per_task=settings.examples_per_task,
        target_units=settings.target_units,
        beta=settings.beta,
        batch_size=settings.batch_size,
    )
    # Hidden layers start with the gain of their activation, and the output layer with that of none.
    network = {"init_of_activation": nets.kaiming_uniform, "output_init": nets.kaiming_uniform("identity")}
    return stream.run(NAME, settings, problem, out, progress, **network)


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draws the pictures of a run, with some 20 bins of tasks: how hard a task is varies more than what is lost.

    Args:
      results: results of a run, finished or not.
      out: folder for the pictures.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      paths of the pictures; see `report.plot_run`.
    """
    from cbp_jax import report

    return report.plot_run(results, out, bin_size=max(1, results.sizes["task"] // 20), formats=formats)
