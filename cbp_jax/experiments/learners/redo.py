"""Recycling of inactive units, or of units that learn little, around several optimizers."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import chex
import optax

import cbp_jax
from cbp_jax.experiments.learners.continual_backprop import Replacing
from cbp_jax.experiments.learners.method import ranged
from cbp_jax.experiments.learners.plain import SGD, Moments
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recycling(Replacing):
    """Base class of learners that recycle dormant units."""

    space: ClassVar[Space] = {"threshold": LogUniform(1e-3, 0.3), "every": LogUniform(100, 10_000)}

    threshold: float = ranged(0.1)
    every: float = ranged(1000.0, at_least=1)

    @property
    def recycle(self) -> Callable[..., optax.GradientTransformation]:
        """The function that recycles units: `redo`, or one with the same arguments."""
        return cbp_jax.redo

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.recycle(
            self._keeping_statistics(self.inner(key)),
            units,
            threshold=self.threshold,
            every=self.every,
            initializer=self.kernel_init,
            key=key,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReDo(Recycling, SGD):
    """SGD with recycling of dormant units."""

    name = "redo"
    about = "SGD with recycling of dormant units"
    look = Look("ReDo")

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        return optax.sgd(self.step_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReDoAdam(Recycling, Moments):
    """Adam with recycling of dormant units."""

    name = "redo_adam"
    about = "Adam with a step count per weight, with recycling of dormant units"
    look = Look("ReDo, Adam")

    l2: float = ranged(0.0, traced=False, optional=True)

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        return self.adam(cbp_jax.adam, self.l2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecyclingByGradient(Recycling):
    """Base class of learners that recycle units with small gradients."""

    space: ClassVar[Space] = {"threshold": LogUniform(1e-4, 0.1)}

    threshold: float = ranged(0.01)

    @property
    def recycle(self) -> Callable[..., optax.GradientTransformation]:
        """See `Recycling`."""
        return cbp_jax.regrama


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReGraMa(RecyclingByGradient, ReDo):
    """SGD with recycling of units with small gradients."""

    name = "regrama"
    about = "SGD with recycling of units with small gradients"
    look = Look("ReGraMa")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReGraMaAdam(RecyclingByGradient, ReDoAdam):
    """Adam with recycling of units with small gradients."""

    name = "regrama_adam"
    about = "Adam with a step count per weight, with recycling of units with small gradients"
    look = Look("ReGraMa, Adam")
