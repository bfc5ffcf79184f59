"""Optimizers for problems that change.

Of those that precondition kernels as matrices, by Kronecker factors or the like, optax has Muon alone. Its other
optimizers run by their path, as `optax.contrib:prodigy(learning_rate=1.0)`.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import chex
import jax
import optax

import cbp_jax
from cbp_jax.experiments.learners.method import Method, choice, count, ranged
from cbp_jax.experiments.learners.plain import Moments
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trac(Moments):
    """Adam in TRAC.

    Attributes:
      s_init: the scale that each discount starts from; see `cbp_jax.trac`.
    """

    name = "trac"
    about = "TRAC around Adam: scales how far it has come from the initial weights"
    look = Look("TRAC")

    s_init: float = ranged(1e-8)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.trac(self.adam(optax.adam), s_init=self.s_init)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamReset(Moments):
    """Adam with resets of its time, or of its moments too.

    Attributes:
      every: updates from one reset to the next.
      forget: "time" for the step count alone, which is Adam-Rel, "moments" for the moments with it.
    """

    name = "adam_reset"
    about = "Adam whose step count, or moments too, start anew every so many updates (Adam-Rel)"
    look = Look("Adam, reset")

    space: ClassVar[Space] = {"every": LogUniform(100, 10_000)}

    every: float = ranged(1000.0, at_least=1)
    forget: str = choice("time", "moments")

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.adam_reset(self.step_size, self.b1, self.b2, self.eps, every=self.every, forget=self.forget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Method):
    """Muon for kernels, and Adam for other parameters, both with Nesterov's momentum, as optax has it.

    Attributes:
      step_size: of kernels, and of Adam too unless `adam_step_size` is given.
      beta: decay of the mean of gradients.
      weight_decay: of kernels, scaled by the step size.
      adam_step_size: of biases, norms and what else has fewer than two axes.
    """

    name = "muon"
    about = "Muon: momentum whose singular values are made equal, for kernels; Adam for other parameters"
    look = Look("Muon")

    space: ClassVar[Space] = {"step_size": LogUniform(1e-4, 0.1)}

    step_size: float = ranged(1e-3)
    beta: float = ranged(0.95, below=1)
    weight_decay: float = ranged(0.0)
    adam_step_size: float = ranged(1e-3, traced=False, optional=True)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return optax.contrib.muon(
            self.step_size,
            beta=self.beta,
            weight_decay=self.weight_decay,
            adam_learning_rate=self.adam_step_size if "adam_step_size" in self.given else None,
            muon_weight_dimension_numbers=_as_matrices,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CChain(Moments):
    """Adam of a loss with C-CHAIN's term, on streams of tasks.

    Attributes:
      strength: of the term; see `cbp_jax.add_churn_reduction`.
      change: how outputs are compared, "kl" where they are logits, or "squared".
      reference: how many earlier batches of the task are a reference batch, drawn anew at each update.
    """

    name = "c_chain"
    about = "Adam with a loss on the change of outputs for earlier examples (C-CHAIN)"
    look = Look("C-CHAIN")

    space: ClassVar[Space] = {"strength": LogUniform(1e-3, 100.0)}

    strength: float = ranged(1.0)
    change: str = choice("kl", "squared")
    reference: int = count(16)

    def loss_term(self, predict: Callable[[optax.Params, chex.Array], chex.Array]) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.add_churn_reduction(predict, self.strength, change=self.change)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.adam(optax.adam)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlasticityInjection(Moments):
    """Adam with plasticity injection, on streams of tasks.

    Attributes:
      inject_at: the number of the task, from 0, before which a fresh head is injected, once.
      head_layers: how many layers are the head, that of the output among them.
    """

    name = "injection"
    about = "Adam with plasticity injection: a fresh head learns beside the frozen old one"
    look = Look("Plasticity injection")

    inject_at: int = count(1)
    head_layers: int = count(2)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.adam(cbp_jax.adam)  # with a count of steps for each weight, so that only the head's starts anew


def _as_matrices(params: optax.Params) -> optax.Params:
    """Of each kernel, whose last axis are the outputs, which axes are the rows and columns of its matrix."""
    axes = lambda w: optax.contrib.MuonDimensionNumbers(tuple(range(w.ndim - 1)), w.ndim - 1) if w.ndim > 1 else None
    return jax.tree.map(axes, params)
