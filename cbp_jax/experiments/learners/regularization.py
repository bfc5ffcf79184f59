"""Learners that pull weights, bound them, or add noise to them."""

import dataclasses
from typing import ClassVar

import chex
import jax
import optax

import cbp_jax
from cbp_jax.experiments.learners.method import Method, ranged
from cbp_jax.experiments.learners.plain import SGD, Moments, MomentumSGD
from cbp_jax.experiments.learners.search import LogUniform, Space
from cbp_jax.report import looks
from cbp_jax.report.looks import Look
from cbp_jax.training import output_layers
from cbp_jax.transforms.kernel_penalties import Penalty
from cbp_jax.transforms.regularization import add_l1, add_l1_init, add_l2_init, proximal_l1_init
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2(MomentumSGD):
    """SGD with L2 toward zero."""

    name = "l2"
    about = "SGD with L2 toward zero"
    look = Look("L2", looks.GREEN)

    space: ClassVar[Space] = {"l2": LogUniform(1e-6, 0.1)}

    l2: float = ranged(1e-4)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return self.decayed_sgd(self.l2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class L1(SGD):
    """SGD with L1 toward zero."""

    name = "l1"
    about = "SGD with L1 toward zero"
    look = Look("L1", looks.SKY)

    space: ClassVar[Space] = {"l1": LogUniform(1e-7, 1e-2)}

    l1: float = ranged(1e-5)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return optax.chain(add_l1(self.l1), optax.sgd(self.step_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2Init(SGD):
    """SGD with L2 toward the initial weights."""

    name = "l2_init"
    about = "SGD with L2 toward the initial weights"
    look = Look("L2 init", looks.ORANGE)

    space: ClassVar[Space] = {"l2": LogUniform(1e-6, 0.1)}

    l2: float = ranged(1e-3)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return optax.chain(add_l2_init(self.l2), optax.sgd(self.step_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class L1Init(SGD):
    """SGD with L1 toward the initial weights."""

    name = "l1_init"
    about = "SGD with L1 toward the initial weights"
    look = Look("L1 init", looks.MUSTARD)

    space: ClassVar[Space] = {"l1": LogUniform(1e-7, 1e-2)}

    l1: float = ranged(1e-4)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return optax.chain(add_l1_init(self.l1), optax.sgd(self.step_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProximalL1Init(L1Init):
    """SGD followed by the proximal step of L1: weights that hardly move are exactly the initial ones."""

    name = "proximal_l1_init"
    about = "SGD with proximal steps of L1 toward the initial weights"
    look = Look("L1 init, proximal", looks.with_other(looks.MUSTARD, 1))

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return optax.chain(optax.sgd(self.step_size), proximal_l1_init(self.l1, self.step_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrinking(Method):
    """Base class of learners with weight decay and noise on the weights at every step."""

    space: ClassVar[Space] = {"l2": LogUniform(1e-6, 0.1), "noise": LogUniform(1e-6, 1e-2)}

    l2: float = ranged(1e-4)
    noise: float = ranged(1e-5)

    def __post_init__(self):
        super().__post_init__()
        fraction = self.shrink
        if not isinstance(fraction, jax.core.Tracer) and fraction > 1:
            raise ValueError(
                f"step_size times l2, the fraction lost at every step, must be at most 1, got {fraction:g}"
            )

    @property
    def shrink(self) -> chex.Numeric:
        """The fraction of the weights that is lost at every step."""
        return self.step_size * self.l2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkAndPerturb(Shrinking, MomentumSGD):
    """SGD with weight decay and noise on the weights at every step."""

    name = "shrink_and_perturb"
    about = "SGD with weight decay and noise on the weights at every step"
    look = Look("Shrink and perturb", looks.PURPLE)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        if self.momentum:
            # The decay passes through the momentum, as in the Nature paper, where it is part of SGD.
            return cbp_jax.shrink_and_perturb(self.decayed_sgd(self.l2), shrink=0.0, perturb=self.noise, key=key)
        return cbp_jax.shrink_and_perturb(optax.sgd(self.step_size), self.shrink, self.noise, key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkAndPerturbAdam(Shrinking, Moments):
    """Adam with weight decay and noise on the weights at every step."""

    name = "shrink_and_perturb_adam"
    about = "Adam with weight decay and noise on the weights at every step"
    look = Look("Shrink and perturb, Adam", looks.with_other(looks.PURPLE))

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        # The decay passes through the moments, as in the Nature paper's program, where it is part of Adam.
        decayed = optax.chain(optax.add_decayed_weights(self.l2), self.adam(optax.adam))
        return cbp_jax.shrink_and_perturb(decayed, shrink=0.0, perturb=self.noise, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightClipping(SGD):
    """SGD with weight clipping."""

    name = "clip"
    about = "SGD with weight clipping"
    look = Look("Weight clipping")

    space: ClassVar[Space] = {"bound": LogUniform(0.3, 10.0)}

    bound: float = ranged(2.0)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        return cbp_jax.clip_weights(optax.sgd(self.step_size), self.bound)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalized(SGD):
    """Base class of learners with SGD and a penalty on the kernels, including the output layer's.

    Attributes:
      of_output: whether the output layer's kernel is penalized too.
    """

    of_output: ClassVar[bool] = True

    space: ClassVar[Space] = {"strength": LogUniform(1e-6, 0.1)}

    strength: float = ranged(1e-3)

    @property
    def penalty(self) -> Penalty:
        """The penalty."""
        raise NotImplementedError

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        kernels = None
        if not self.of_output:
            outputs = output_layers(units)
            within = tuple(f"{name}/" for name in outputs)
            kernels = lambda path, w: w.ndim > 1 and path not in outputs and not path.startswith(within)
        penalty = cbp_jax.add_kernel_penalty(self.strength, self.penalty, kernels=kernels)
        return optax.chain(penalty, optax.sgd(self.step_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectral(Penalized):
    """SGD with spectral regularization."""

    name = "spectral"
    about = "SGD with the largest singular value of each kernel pulled to 1"
    look = Look("Spectral")

    power: float = ranged(2.0)

    @property
    def penalty(self) -> Penalty:
        """See `Penalized`."""
        return cbp_jax.spectral_penalty(self.power)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parseval(Penalized):
    """SGD with Parseval regularization of all kernels but the output layer's, as published."""

    name = "parseval"
    about = "SGD with the weights of each unit pulled to be orthogonal to those of other units, and of equal norm"
    look = Look("Parseval")

    of_output = False

    scale: float = ranged(2.0)

    @property
    def penalty(self) -> Penalty:
        """See `Penalized`."""
        return cbp_jax.parseval_penalty(self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orthogonal(Penalized):
    """SGD with soft orthogonality."""

    name = "orthogonal"
    about = "SGD with all singular values of each kernel pulled to 1"
    look = Look("Orthogonal")

    @property
    def penalty(self) -> Penalty:
        """See `Penalized`."""
        return cbp_jax.orthogonal_penalty()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wasserstein(Penalized):
    """SGD with the distribution of the weights pulled to the initial one."""

    name = "wasserstein"
    about = "SGD with the sorted weights of each kernel pulled to the sorted initial ones"
    look = Look("Wasserstein")

    @property
    def penalty(self) -> Penalty:
        """See `Penalized`."""
        return cbp_jax.wasserstein_penalty()
