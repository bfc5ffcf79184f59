"""Learners with eligibility traces, for agents that learn online from TD errors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import chex
import optax

import cbp_jax
from cbp_jax.experiments.learners import continual_backprop, plain
from cbp_jax.experiments.learners.method import Method, of_python, ranged
from cbp_jax.report import looks
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traces(Method):
    """Along eligibility traces.

    Attributes:
      trace_decay: lambda.
      discount: of a step; the agent's.
    """

    trace_decay: float = ranged(0.8, at_most=1)
    discount: float | None = of_python()

    def on(self, network: Mapping[str, Any], units: Units, methods: Sequence[Method]) -> Self:
        """See `Method`. Takes the agent's discount."""
        return dataclasses.replace(super().on(network, units, methods), discount=network["discount"])

    def behind_traces(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """Return an optimizer of TD(lambda)'s direction."""
        return optax.chain(cbp_jax.eligibility_traces(self.discount, self.trace_decay), tx)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounded(Traces):
    """Base class of learners with overshooting-bounded gradient descent.

    Attributes:
      step_size: the largest step.
      kappa: scale of the bound.
    """

    step_size: float = ranged(1.0)
    kappa: float = ranged(2.0)

    def obgd(self) -> optax.GradientTransformation:
        """Return the optimizer."""
        return cbp_jax.obgd(self.step_size, discount=self.discount, trace_decay=self.trace_decay, kappa=self.kappa)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObGD(Bounded):
    """Overshooting-bounded gradient descent."""

    name = "obgd"
    about = "overshooting-bounded gradient descent"
    look = Look("ObGD", looks.TEAL)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.obgd()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinualBackpropObGD(continual_backprop.Continual, Bounded):
    """Continual backpropagation around overshooting-bounded gradient descent."""

    name = "cbp_obgd"
    about = "continual backpropagation around overshooting-bounded gradient descent"
    look = Look("Continual backprop, ObGD", looks.with_other(looks.BLUE, 2), strong=True)

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`. Traces are inside, so that those of a replaced unit are reset."""
        return self.obgd()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backprop(Traces, plain.Backprop):
    """SGD after eligibility traces."""

    about = "SGD after eligibility traces"

    step_size: float = ranged(1e-3)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.behind_traces(super().build(units, key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Traces, plain.Adam):
    """Adam after eligibility traces."""

    about = "Adam after eligibility traces"

    step_size: float = ranged(1e-4)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.behind_traces(super().build(units, key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinualBackprop(Traces, continual_backprop.ContinualBackprop):
    """Continual backpropagation around SGD after eligibility traces."""

    about = "continual backpropagation around SGD after eligibility traces"

    step_size: float = ranged(1e-3)

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        return self.behind_traces(super().inner(key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinualBackpropAdam(Traces, continual_backprop.ContinualBackpropAdam):
    """Continual backpropagation around Adam after eligibility traces."""

    about = "continual backpropagation around Adam after eligibility traces"

    step_size: float = ranged(1e-4)

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        return self.behind_traces(super().inner(key))


LEARNERS: dict[str, type[Method]] = {
    learner.name: learner
    for learner in (ObGD, Backprop, Adam, ContinualBackpropObGD, ContinualBackprop, ContinualBackpropAdam)
}
