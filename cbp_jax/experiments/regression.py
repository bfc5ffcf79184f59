"""Slowly-Changing Regression (Dohare et al., Nature 2024): a small network tracks a target as single inputs change."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbp_jax import nets, problems
from cbp_jax.experiments import stream
from cbp_jax.experiments.experiment import Experiment

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


def _problem(settings: Settings) -> problems.Problem:
    names = ("num_inputs", "flipping_bits", "examples_per_task", "target_units", "beta", "batch_size")
    return problems.slowly_changing_regression(**{name: getattr(settings, name) for name in names})


def _network(settings: Settings) -> dict[str, Any]:
    """Hidden layers start with the gain of their activation, and the output layer with that of none."""
    del settings
    return {"init_of_activation": nets.kaiming_uniform, "output_init": nets.kaiming_uniform("identity")}


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


slowly_changing_regression = Experiment(
    name="slowly_changing_regression",
    about="Slowly-Changing Regression (Dohare et al., Nature 2024): a small network tracks a target as single inputs "
    "change.",
    Settings=Settings,
    presets={"smoke": _smoke, "laptop": _laptop, "paper": _paper},
    problem=_problem,
    network=_network,
    plot=plot,
)
