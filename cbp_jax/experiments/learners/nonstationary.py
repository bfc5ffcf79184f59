"""Optimizers for nonstationary problems.

Muon is the only optimizer in optax that preconditions kernels as matrices. Other optimizers of optax can be given by
their path, as `optax.contrib:prodigy(learning_rate=1.0)`.
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
    """TRAC around Adam.

    Attributes:
      s_init: the initial scale of each discount; see `cbp_jax.trac`.
    """

    name = "trac"
    about = "TRAC around Adam: scales the displacement from the initial weights"
    look = Look("TRAC")

    s_init: float = ranged(1e-8)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.trac(self.adam(optax.adam), s_init=self.s_init)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamReset(Moments):
    """Adam with periodic resets of its step count, or also of its moments.

    Attributes:
      every: number of updates between resets.
      forget: "time" resets only the step count (Adam-Rel), "moments" also the moments.
    """

    name = "adam_reset"
    about = "Adam with periodic resets of its step count, or also of its moments (Adam-Rel)"
    look = Look("Adam, reset")

    space: ClassVar[Space] = {"every": LogUniform(100, 10_000)}

    every: float = ranged(1000.0, at_least=1)
    forget: str = choice("time", "moments")

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.adam_reset(self.step_size, self.b1, self.b2, self.eps, every=self.every, forget=self.forget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Method):
    """Muon for kernels, and Adam for other parameters, both with Nesterov's momentum, as in optax.

    Attributes:
      step_size: step size for kernels, and also for Adam unless `adam_step_size` is given.
      beta: decay rate of the mean of gradients.
      weight_decay: weight decay of kernels, scaled by the step size.
      adam_step_size: step size for biases, norms and other arrays of fewer than two axes.
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
    """Adam with C-CHAIN's loss term, on streams of tasks.

    Attributes:
      strength: strength of the term; see `cbp_jax.add_churn_reduction`.
      change: how outputs are compared, "kl" for logits, or "squared".
      reference: number of earlier batches of the task in a reference batch, drawn again at each update.
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
      inject_at: the number of the task, from 0, before which a fresh head is injected, once. It is not searched,
        because each value is a program of its own.
      head_layers: number of layers in the head, including the output layer.
    """

    name = "injection"
    about = (
        "Adam with plasticity injection: a fresh head learns next to the frozen old one from task inject_at on, which "
        "is not searched"
    )
    look = Look("Plasticity injection")

    inject_at: int = count(1)
    head_layers: int = count(2)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.adam(cbp_jax.adam)  # with a step count for each weight, so that only the head's is reset


def _as_matrices(params: optax.Params) -> optax.Params:
    """For each kernel, whose last axis is the outputs, the axes that are rows and columns of its matrix."""
    axes = lambda w: optax.contrib.MuonDimensionNumbers(tuple(range(w.ndim - 1)), w.ndim - 1) if w.ndim > 1 else None
    return jax.tree.map(axes, params)
