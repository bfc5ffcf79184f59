"""Plain optimizers."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import chex
import optax

import cbp_jax
from cbp_jax.experiments.learners.method import Method, choice, count, ranged
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.report import looks
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Method):
    """Base class of learners around SGD."""

    space: ClassVar[Space] = {"step_size": LogUniform(1e-3, 1.0)}

    step_size: float = ranged(0.01)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return optax.sgd(self.step_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentumSGD(SGD):
    """Base class of learners with SGD and optional momentum.

    Attributes:
      momentum: decay rate of the sum of gradients.
      reset: "head" or "network": what to reinitialize before each task but the first.
      reset_every: number of updates between these resets, instead of one before each task.
    """

    momentum: float = ranged(0.0, below=1, traced=False, optional=True)
    reset: str = choice("", "head", "network", optional=True)
    reset_every: int | None = count(None, optional=True)

    def sgd(self) -> optax.GradientTransformation:
        """Create SGD. Without momentum there is no trace, which would cost memory and time."""
        return optax.sgd(self.step_size, momentum=self.momentum or None)

    def decayed_sgd(self, l2: chex.Numeric) -> optax.GradientTransformation:
        """Create SGD with L2 toward zero in the loss, whose gradient passes through the momentum."""
        return optax.chain(optax.add_decayed_weights(l2), self.sgd())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments(Method):
    """Base class of learners around Adam.

    Attributes:
      reset: "head" or "network": what to reinitialize before each task but the first, together with Adam's moments and
        step count.
      reset_every: number of updates between these resets, instead of one before each task.
      eps: added to the root of the mean square.
    """

    space: ClassVar[Space] = {"step_size": LogUniform(3e-5, 1e-2)}

    step_size: float = ranged(1e-3)
    b1: float = ranged(0.9, below=1)
    b2: float = ranged(0.999, below=1)
    reset: str = choice("", "head", "network", optional=True)
    reset_every: int | None = count(None, optional=True)
    eps: float = ranged(1e-8, traced=False, optional=True)

    def adam(self, make: Callable[..., optax.GradientTransformation], l2: float = 0.0) -> optax.GradientTransformation:
        """Create Adam by `make`, with L2 as a part of the loss, so that it passes through the moments."""
        if self.reset == "head":
            make = cbp_jax.adam  # with a step count for each weight, so that only the head's is reset
        tx = make(self.step_size, b1=self.b1, b2=self.b2, eps=self.eps)
        return optax.chain(optax.add_decayed_weights(l2), tx) if l2 else tx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backprop(MomentumSGD):
    """Backpropagation: SGD."""

    name = "bp"
    about = "backpropagation, plain SGD"
    look = Look("Backprop", looks.BLACK)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.sgd()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Moments):
    """Adam.

    Attributes:
      l2: strength of L2 in the loss, whose gradient passes through the moments.
      weight_decay: decoupled weight decay, scaled by the step size, as in AdamW.
    """

    name = "adam"
    about = "Adam"
    look = Look("Adam", looks.VERMILION)

    l2: float = ranged(0.0, traced=False, optional=True)
    weight_decay: float = ranged(0.0, traced=False, optional=True)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        tx = self.adam(optax.adam, self.l2)
        return (
            optax.chain(tx, optax.add_decayed_weights(-self.step_size * self.weight_decay)) if self.weight_decay else tx
        )
