"""What sets all weights right after an update, always or now and then.

With `every` as long as a task, the last update of a task is followed by what the papers do before new data.
"""

import dataclasses
from typing import ClassVar

import chex
import optax

import cbp_jax
from cbp_jax import nets
from cbp_jax.experiments.learners.method import choice, ranged
from cbp_jax.experiments.learners.plain import MomentumSGD
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizeAndProject(MomentumSGD):
    """SGD with layer normalization and kernels of constant norm.

    Attributes:
      pull: fraction by which what is no kernel returns to its start at every projection.
      every: updates from one projection to the next.
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
    """SGD with kernels made orthogonal now and then."""

    name = "fire"
    about = "SGD with kernels made orthogonal now and then"
    look = Look("FIRE")

    space: ClassVar[Space] = {"every": LogUniform(100, 10_000)}

    every: float = ranged(1000.0, at_least=1)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.fire(self.sgd(), every=self.every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DASH(MomentumSGD):
    """SGD with direction-aware shrinking now and then."""

    name = "dash"
    about = "SGD with weights shrunk now and then, the less the more they point where the loss falls"
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
    """SGD that goes back to the running mean of its weights now and then."""

    name = "hare_tortoise"
    about = "SGD that goes back to the running mean of its weights now and then"
    look = Look("Hare and tortoise")

    space: ClassVar[Space] = {"decay": (0.99, 0.999, 0.9999), "every": LogUniform(100, 10_000)}

    decay: float = ranged(0.999, at_most=1)
    every: float = ranged(1000.0, at_least=1)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.hare_and_tortoise(self.sgd(), decay=self.decay, every=self.every)
