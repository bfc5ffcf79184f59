"""SGD with online consolidation of important weights."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import chex
import optax

import cbp_jax
from cbp_jax.experiments.learners.method import ranged
from cbp_jax.experiments.learners.plain import SGD
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consolidation(SGD):
    """Base class of learners with consolidation."""

    transform: ClassVar[Callable[..., optax.GradientTransformation]]

    space: ClassVar[Space] = {"strength": LogUniform(1e-3, 10.0)}

    strength: float = ranged(0.1)
    beta_weight: float = ranged(0.999, below=1)
    beta_importance: float = ranged(0.999, below=1)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.transform(
            self.step_size,
            strength=self.strength,
            beta_weight=self.beta_weight,
            beta_importance=self.beta_importance,
        )


class EWC(Consolidation):
    """Online elastic weight consolidation."""

    name = "ewc"
    about = "SGD with online elastic weight consolidation"
    look = Look("EWC")
    transform = staticmethod(cbp_jax.ewc)


class MAS(Consolidation):
    """Online memory aware synapses."""

    name = "mas"
    about = "SGD with online memory aware synapses"
    look = Look("MAS")
    transform = staticmethod(cbp_jax.mas)


class SynapticIntelligence(Consolidation):
    """Online synaptic intelligence."""

    name = "synaptic_intelligence"
    about = "SGD with online synaptic intelligence"
    look = Look("Synaptic intelligence")
    transform = staticmethod(cbp_jax.synaptic_intelligence)


class RWalk(Consolidation):
    """Online RWalk."""

    name = "rwalk"
    about = "SGD with online RWalk"
    look = Look("RWalk")
    transform = staticmethod(cbp_jax.rwalk)
