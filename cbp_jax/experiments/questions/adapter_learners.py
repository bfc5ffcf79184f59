"""Learners of a stream on top of a trained network: an adapter, its rank-one components as units, or all weights."""

import dataclasses

import chex
import jax
import optax

from cbp_jax import lora
from cbp_jax.experiments.learners.continual_backprop import ContinualBackpropAdam
from cbp_jax.experiments.learners.method import Method, ranged
from cbp_jax.experiments.learners.plain import Moments
from cbp_jax.report import looks
from cbp_jax.report.looks import Look
from cbp_jax.transforms import proximal_l1_init
from cbp_jax.units import Units


def add_adapter_l1(strength: chex.Numeric) -> optax.GradientTransformation:
    """Add the gradient of `strength * lora.l1(adapter)`, L1 on the change of the kernels."""
    of_change = jax.grad(lambda adapter: strength * lora.l1(adapter))
    return optax.stateless(lambda updates, params: jax.tree.map(jax.numpy.add, updates, of_change(params)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(Moments):
    """A low-rank adapter on a frozen network, by Adam; with `reset=network` a fresh one for each task.

    Attributes:
      l1: weight of the L1 norm of the adapter's change in the loss.
    """

    name = "adapter"
    about = "a low-rank adapter on a frozen network, by Adam"
    look = Look("Adapter", looks.VIOLET)

    l1: float = ranged(0.0, traced=False, optional=True)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        tx = self.adam(optax.adam)
        return optax.chain(add_adapter_l1(self.l1), tx) if self.l1 else tx


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterContinualBackprop(ContinualBackpropAdam):
    """The same adapter, whose rank-one components are units that continual backpropagation replaces."""

    name = "adapter_cbp"
    about = "the same, with continual backpropagation on its rank-one components"
    look = Look("Adapter, continual backprop", looks.BLUE, strong=True)

    replacement_rate: float = ranged(1e-3, at_most=1)
    l1: float = ranged(0.0, traced=False, optional=True)

    def inner(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Replacing`."""
        tx = super().inner(key)
        return optax.chain(add_adapter_l1(self.l1), tx) if self.l1 else tx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Moments):
    """All weights of the network, by Adam; with `reset=network` each task starts from the trained network.

    Attributes:
      l1: strength of a proximal pull toward the trained network's weights.
    """

    name = "full"
    about = "all weights of the network, by Adam"
    look = Look("All weights", looks.BROWN)

    l1: float = ranged(0.0, traced=False, optional=True)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        tx = self.adam(optax.adam)
        return optax.chain(tx, proximal_l1_init(self.l1, self.step_size)) if self.l1 else tx


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullContinualBackprop(ContinualBackpropAdam):
    """All weights of the network, with continual backpropagation on its hidden units."""

    name = "full_cbp"
    about = "all weights of the network, with continual backpropagation on its hidden units"
    look = Look("All weights, continual backprop", looks.with_other(looks.BLUE))


LEARNERS: dict[str, type[Method]] = {
    learner.name: learner for learner in (Adapter, AdapterContinualBackprop, Full, FullContinualBackprop)
}


def trains_adapter(method: Method) -> bool:
    """Return whether a method trains an adapter instead of all weights."""
    return isinstance(method, Adapter | AdapterContinualBackprop)


def is_fresh(method: Method) -> bool:
    """Return whether a method has a fresh adapter for each task."""
    return isinstance(method, Adapter) and method.reset == "network"
