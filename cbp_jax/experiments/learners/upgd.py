"""Perturbed gradient descent, with and without utility gates."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import chex
import optax

import cbp_jax
from cbp_jax.experiments.learners.method import Method, choice, count, flag, ranged
from cbp_jax.experiments.learners.plain import SGD
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.report import looks
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGD(SGD):
    """SGD with noise on the gradients."""

    name = "pgd"
    about = "perturbed gradient descent: SGD with noise on the gradients"
    look = Look("PGD", looks.GRAY)

    space: ClassVar[Space] = {"sigma": LogUniform(1e-4, 1.0), "weight_decay": LogUniform(1e-5, 0.1)}

    sigma: float = ranged(0.01)
    weight_decay: float = ranged(0.0)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.perturbed_gradient_descent(self.step_size, self.sigma, weight_decay=self.weight_decay, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(Method):
    """Base class of learners around UPGD.

    Attributes:
      factor: factor of the step, but not of the decay. It is 1 in the paper's algorithm; the public code has 2, so that
        a weight of utility 0, whose gate is 1/2, moves at the step size.
    """

    space: ClassVar[Space] = {
        "step_size": LogUniform(1e-3, 1.0),
        "sigma": LogUniform(1e-4, 1.0),
        "weight_decay": LogUniform(1e-5, 0.1),
        "beta_utility": (0.99, 0.999, 0.9999),
    }

    step_size: float = ranged(0.01)
    weight_decay: float = ranged(0.0)
    beta_utility: float = ranged(0.999, below=1)
    sigma: float = ranged(0.01)
    factor: int = choice(1, 2, optional=True)

    def upgd(
        self,
        make: Callable[..., optax.GradientTransformation],
        key: chex.PRNGKey,
        **settings: object,
    ) -> optax.GradientTransformation:
        """Create UPGD by `make`."""
        decay = self.weight_decay / self.factor  # the transformation multiplies it by the step including the factor
        numbers = {"weight_decay": decay, "beta_utility": self.beta_utility, "sigma": self.sigma}
        return make(self.factor * self.step_size, **numbers, **settings, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UPGD(Gated):
    """Utility-gated perturbed gradient descent.

    Attributes:
      order: order of the utilities' Taylor expansion; 2 needs the diagonal of the Hessian.
      scope: "global" or "local": where utilities are normalized.
      protect: whether gradients are gated too, not only the noise.
      featurewise: whether to use utilities of units.
    """

    name = "upgd"
    about = "utility-gated perturbed gradient descent"
    look = Look("UPGD", looks.RUST)

    order: int = choice(1, 2)
    scope: str = choice("global", "local")
    protect: bool = flag(True)
    featurewise: bool = flag(False)

    @property
    def curvature(self) -> bool:
        """See `Method`."""
        return self.order == 2

    def options_of_upgd(self, units: Units) -> dict[str, object]:
        """Return the non-numeric arguments of the transformation."""
        return {
            "order": self.order,
            "scope": self.scope,
            "protect": self.protect,
            "units": units if self.featurewise else None,
        }

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.upgd(cbp_jax.upgd, key, **self.options_of_upgd(units))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveUPGD(UPGD):
    """UPGD around Adam's moments.

    Attributes:
      reset: "network": reinitialize it before each task but the first, together with utilities, moments and step count.
      reset_every: number of updates between these resets, instead of one before each task.
      eps: added to the root of the mean square.
    """

    name = "adaptive_upgd"
    about = "UPGD around Adam's moments"
    look = Look("Adaptive UPGD", looks.with_other(looks.RUST))

    space: ClassVar[Space] = {"step_size": LogUniform(3e-5, 1e-2)}

    step_size: float = ranged(1e-3)
    b1: float = ranged(0.9, below=1)
    b2: float = ranged(0.999, below=1)
    reset: str = choice("", "network", optional=True)
    reset_every: int | None = count(None, optional=True)
    eps: float = ranged(1e-8, traced=False, optional=True)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        moments = {"b1": self.b1, "b2": self.b2, "eps": self.eps}
        return self.upgd(cbp_jax.adaptive_upgd, key, **moments, **self.options_of_upgd(units))
