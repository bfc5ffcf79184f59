"""Learners that modify all weights after updates, always or periodically.

If `every` is the length of a task, this happens after the last update of each task, as in the papers before new data.
"""

import dataclasses
from typing import ClassVar

import chex
import optax

import cbp_jax
from cbp_jax import nets
from cbp_jax.experiments.learners.method import choice, ranged
from cbp_jax.experiments.learners.plain import SGD, MomentumSGD
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.report import looks
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizeAndProject(MomentumSGD):
    """SGD with layer normalization and kernels of constant norm.

    Attributes:
      pull: fraction by which parameters other than kernels return to their initial values at every projection.
      every: number of updates between projections.
    """

    name = "nap"
    about = "SGD with layer normalization and kernels of constant norm"
    look = Look("Normalize and project")

    space: ClassVar[Space] = {"every": (1.0, 10.0, 100.0, 1000.0)}

    pull: float = ranged(0.0, at_most=1)
    every: float = ranged(1.0, at_least=1)
    normalization: str = choice("layer", "", *nets.NORMALIZATIONS)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.normalize_and_project(self.sgd(), every=self.every, pull=self.pull)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FIRE(MomentumSGD):
    """SGD with kernels made orthogonal periodically."""

    name = "fire"
    about = "SGD with kernels made orthogonal periodically"
    look = Look("FIRE")

    space: ClassVar[Space] = {"every": LogUniform(100, 10_000)}

    every: float = ranged(1000.0, at_least=1)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.fire(self.sgd(), every=self.every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DASH(MomentumSGD):
    """SGD with periodic direction-aware shrinking."""

    name = "dash"
    about = "SGD with periodic shrinking of weights, less for weights along the negative gradient"
    look = Look("DASH")

    space: ClassVar[Space] = {
        "least": LogUniform(0.03, 1.0),
        "alpha": LogUniform(0.03, 1.0),
        "every": LogUniform(100, 10_000),
    }

    least: float = ranged(0.3, at_most=1)
    alpha: float = ranged(0.3, at_most=1)
    every: float = ranged(1000.0, at_least=1)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.dash(self.sgd(), every=self.every, least=self.least, alpha=self.alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HareAndTortoise(MomentumSGD):
    """SGD with periodic resets to the running mean of its weights."""

    name = "hare_tortoise"
    about = "SGD with periodic resets to the running mean of its weights"
    look = Look("Hare and tortoise")

    space: ClassVar[Space] = {"decay": (0.99, 0.999, 0.9999), "every": LogUniform(100, 10_000)}

    decay: float = ranged(0.999, at_most=1)
    every: float = ranged(1000.0, at_least=1)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.hare_and_tortoise(self.sgd(), decay=self.decay, every=self.every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resetting(SGD):
    """Base class of learners with periodic resets; see `cbp_jax.periodic_reset`. What is reset is its `reset`.

    Attributes:
      every: number of updates between resets. Unlike `reset_every`, a setting of other learners, it is traced, so that
        methods with different numbers share a program.
    """

    space: ClassVar[Space] = {"every": LogUniform(100, 10_000)}

    every: float = ranged(1000.0, at_least=1)

    @property
    def reset_every(self) -> chex.Numeric:
        """See `Method`."""
        return self.every


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResetHead(Resetting):
    """SGD with periodic reinitialization of the output layer."""

    name = "reset_head"
    about = "SGD with periodic reinitialization of the output layer"
    look = Look("Head resets", looks.PETROL)

    reset = "head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResetNetwork(Resetting):
    """SGD with periodic reinitialization of the whole network."""

    name = "reset_network"
    about = "SGD with periodic reinitialization of the whole network"
    look = Look("Network resets", looks.with_other(looks.PETROL))

    reset = "network"
