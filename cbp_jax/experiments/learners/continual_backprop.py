"""Continual backpropagation around several optimizers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import chex
import flax.linen as nn
import jax
import optax

import cbp_jax
from cbp_jax.experiments.learners.method import Method, count, flag, named, of_python, ranged
from cbp_jax.experiments.learners.plain import Moments, MomentumSGD
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.experiments.learners.upgd import Gated
from cbp_jax.replacement import get_reinitialization, get_utility, needs_curvature
from cbp_jax.report import looks
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replacing(Method):
    """Base class of learners that replace units.

    Attributes:
      kernel_init: initializer of replaced units; None for that of the network.
    """

    needs_units = True

    kernel_init: nn.initializers.Initializer | None = of_python()  # noqa: RUF009

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """Return the inner optimizer."""
        raise NotImplementedError

    def transformation(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`. Statistics are updated inside, so that those of a replaced unit are reset."""
        return self.build(units, key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continual(Replacing):
    """Base class of learners with continual backpropagation.

    Attributes:
      utility: the utility that ranks units. Those of second order need the diagonal of the Hessian.
      reinitialization: what replaced units start from.
      max_replacements: the most replacements in one step and group; by default as many as the rate can require.
    """

    space: ClassVar[Space] = {"replacement_rate": LogUniform(1e-6, 1e-2)}

    replacement_rate: float = ranged(1e-4, at_most=1)
    decay_rate: float = ranged(0.99, below=1)
    maturity_threshold: float = ranged(100.0)
    utility: str = named("contribution", get_utility)
    reinitialization: str = named("resample", get_reinitialization, optional=True)
    compensate_bias: bool = flag(False)
    max_replacements: int | None = count(None)

    @property
    def curvature(self) -> bool:
        """See `Method`."""
        return needs_curvature(self.utility)

    def on(self, network: Mapping[str, Any], units: Units, methods: Sequence[Method]) -> Self:
        """See `Method`."""
        method = super().on(network, units, methods)
        if method.max_replacements is None:
            # The rate is traced. Its largest value limits how many units one step can replace.
            largest = max(other.hyperparameters["replacement_rate"] for other in methods)
            most = int(largest * max(group.size for group in units) + 1e-5) + 1
            method = dataclasses.replace(method, max_replacements=most)
        return method

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.continual_backprop(
            self._keeping_statistics(self.inner(jax.random.fold_in(key, 1))),
            units,
            replacement_rate=self.replacement_rate,
            decay_rate=self.decay_rate,
            maturity_threshold=self.maturity_threshold,
            utility=self.utility,
            initializer=self.kernel_init,
            reinitialization=self.reinitialization,
            compensate_bias=self.compensate_bias,
            max_replacements=self.max_replacements,
            key=key,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinualBackprop(Continual, MomentumSGD):
    """Continual backpropagation around SGD."""

    name = "cbp"
    about = "continual backpropagation around SGD"
    look = Look("Continual backprop", looks.BLUE, strong=True)

    l2: float = ranged(0.0, traced=False, optional=True)

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        return self.decayed_sgd(self.l2) if self.l2 else self.sgd()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinualBackpropAdam(Continual, Moments):
    """Continual backpropagation around Adam."""

    name = "cbp_adam"
    about = "continual backpropagation around Adam with a step count per weight"
    look = Look("Continual backprop, Adam", looks.with_other(looks.BLUE), strong=True)

    l2: float = ranged(0.0, traced=False, optional=True)

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        return self.adam(cbp_jax.adam, self.l2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinualBackpropUPGD(Continual, Gated):
    """Continual backpropagation around UPGD."""

    name = "cbp_upgd"
    about = "continual backpropagation around UPGD"
    look = Look("Continual backprop, UPGD", looks.with_other(looks.BLUE, 1), strong=True)

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        return self.upgd(cbp_jax.upgd, key)
