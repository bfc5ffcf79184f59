"""Self-normalized resets around several optimizers."""

import dataclasses
from typing import ClassVar

import chex
import optax

import cbp_jax
from cbp_jax.experiments.learners.continual_backprop import Replacing
from cbp_jax.experiments.learners.method import count, ranged
from cbp_jax.experiments.learners.plain import SGD, Moments
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfNormalized(Replacing):
    """Base class of learners with self-normalized resets; see `self_normalized_resets`.

    Attributes:
      rejection: probability of a silence below which a unit is reset.
      every: number of updates between computations of the thresholds.
      max_silence: largest threshold, in updates.
      max_resets: the most resets in one step and group. 1 is fast, and units hardly ever have to wait.
    """

    space: ClassVar[Space] = {"rejection": LogUniform(1e-3, 0.1)}

    rejection: float = ranged(0.02, at_most=1)
    every: float = ranged(1000.0, at_least=1)
    max_silence: int = count(1000)
    max_resets: int = count(1)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.self_normalized_resets(
            self._keeping_statistics(self.inner(key)),
            units,
            rejection=self.rejection,
            every=self.every,
            max_silence=self.max_silence,
            max_resets=self.max_resets,
            initializer=self.kernel_init,
            key=key,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SNR(SelfNormalized, SGD):
    """SGD with self-normalized resets."""

    name = "snr"
    about = "SGD with self-normalized resets of silent units"
    look = Look("SNR")

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        return optax.sgd(self.step_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SNRAdam(SelfNormalized, Moments):
    """Adam with self-normalized resets."""

    name = "snr_adam"
    about = "Adam with a step count per weight, with self-normalized resets of silent units"
    look = Look("SNR, Adam")

    l2: float = ranged(0.0, traced=False, optional=True)

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        return self.adam(cbp_jax.adam, self.l2)
