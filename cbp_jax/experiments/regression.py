"""Slowly-Changing Regression (Dohare et al., Nature 2024): a small network tracks a target as some inputs change
slowly.

The paper flips one of 15 slow bits at a time, over 3 million examples. Its program does so in some configurations. In
the configurations that its documentation mentions first, it redraws all bits, over 1 million examples: `redraw`, the
preset `paper_redraw`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbp_jax import nets, problems
from cbp_jax.experiments import stream
from cbp_jax.experiments.experiment import Experiment

PERTURBED = ("shrink_and_perturb", "shrink_and_perturb_adam")
ACTIVATIONS = ("sigmoid", "tanh", "elu", "leaky_relu", "relu", "swish")  # those of the paper


@dataclasses.dataclass(frozen=True)
class Settings(stream.StreamSettings):
    """Slowly-Changing Regression: a task is the time between two changes of the slow input bits."""

    hidden: tuple[int, ...] = (5,)
    """Sizes of the hidden layers, unless a method sets its own; none for a linear network."""
    num_inputs: int = 20
    """Number of input bits, without the constant 1."""
    flipping_bits: int = 15
    """Number of input bits that are fixed during a task; before the next task, one of them flips."""
    redraw: bool = False
    """Whether all these bits are redrawn before the next task, instead of flipping one."""
    examples_per_task: int = 10_000
    """Number of examples in a task."""
    target_units: int = 100
    """Number of linear threshold units in the target network."""
    beta: float = 0.7
    """Fraction of the inputs that must agree with a threshold unit's weights to activate it."""


def _smoke() -> Settings:
    return Settings(methods=("bp", "cbp"), seeds=2, tasks=4, examples_per_task=200, measured_examples=100)


def _laptop() -> Settings:
    return Settings(
        methods=(
            *(f"bp:activation={activation}" for activation in ACTIVATIONS),
            "cbp:activation=relu",
            "upgd:activation=relu,sigma=0.1,weight_decay=1e-2",  # of a small search on two seeds
            "bp:hidden=none",
        ),
        seeds=10,
        tasks=100,
        measured_examples=1000,
    )


def _paper(*, redraw: bool = False, tasks: int = 300) -> Settings:
    """Return the learners of the paper's program at its step sizes; for ReLU also with some of its weight decays, noise
    levels and replacement rates."""
    steps = ("0.01", "0.003", "0.001")
    networks = (*(f"activation={activation}" for activation in ACTIVATIONS), "hidden=none")
    decays = ("1e-5", "1e-4", "1e-3", "1e-2")
    relu = "activation=relu,step_size=0.01"
    return Settings(
        methods=(
            *(
                f"{name}:{network},step_size={step}"
                for name in ("bp", "adam")
                for network in networks
                for step in steps
            ),
            *(f"l2:{relu},l2={l2}" for l2 in decays),
            *(f"adam:{relu},l2={l2}" for l2 in decays),
            *(f"{name}:{relu},l2=1e-2,noise={noise}" for name in PERTURBED for noise in ("1e-4", "1e-3", "1e-2")),
            *(
                f"cbp:{relu},replacement_rate={rate},maturity_threshold=100,utility=adaptable_contribution"
                for rate in ("1e-5", "1e-4", "1e-3", "1e-2")
            ),
        ),
        seeds=100,
        tasks=tasks,
        measured_examples=1000,
        redraw=redraw,
    )


def _problem(settings: Settings) -> problems.Problem:
    names = ("num_inputs", "flipping_bits", "redraw", "examples_per_task", "target_units", "beta", "batch_size")
    return problems.slowly_changing_regression(**{name: getattr(settings, name) for name in names})


def _network(settings: Settings) -> dict[str, Any]:
    """Return network options: hidden layers are initialized with the gain of their activation, the output layer with
    1."""
    del settings
    return {"init_of_activation": nets.kaiming_uniform, "output_init": nets.kaiming_uniform("identity")}


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw the pictures of a run, with about 20 bins of tasks, because the difficulty of tasks varies strongly.

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
    presets={
        "smoke": _smoke,
        "laptop": _laptop,
        "paper": _paper,
        "paper_redraw": lambda: _paper(redraw=True, tasks=100),
    },
    problem=_problem,
    network=_network,
    plot=plot,
)
