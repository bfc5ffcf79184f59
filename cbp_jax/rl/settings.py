"""Settings of proximal policy optimization."""

import dataclasses
from typing import Literal

import chex

from cbp_jax.numerics.scalars import check_scalar


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Size of a rollout, and the updates that follow it: what the settings of all agents with rollouts have.

    Attributes:
      num_envs: number of environments in a rollout.
      rollout_length: number of steps of each environment in a rollout.
      epochs: number of epochs over a rollout.
      minibatches: number of minibatches, and so of updates, in an epoch. They divide the steps of the rollout equally.
      discount: discount for each step, in [0, 1].

    Raises:
      ValueError: a setting is out of range.
    """

    num_envs: int = 32
    rollout_length: int = 64
    epochs: int = 10
    minibatches: int = 16
    discount: chex.Numeric = 0.99

    def __post_init__(self):
        for name in ("num_envs", "rollout_length", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps % self.minibatches:
            raise ValueError(
                f"minibatches must divide the {self.num_envs} x {self.rollout_length} = {self.steps} steps of a "
                f"rollout, got {self.minibatches}"
            )
        check_scalar("discount", self.discount, at_least=0, at_most=1)

    @property
    def steps(self) -> int:
        """Steps of the environments in a rollout."""
        return self.num_envs * self.rollout_length


@dataclasses.dataclass(frozen=True)
class Settings(Rollout):
    """Settings of PPO. The defaults are those of Dohare et al. (Nature 2024), but with 32 environments instead of one.

    Numbers that are not counts may be traced, so that a grid of them is a `vmap`.

    Attributes:
      num_envs: number of environments in a rollout.
      rollout_length: number of steps of each environment in a rollout.
      epochs: number of epochs over a rollout.
      minibatches: number of minibatches, and so of updates, in an epoch. They divide the steps of the rollout equally.
      discount: discount for each step, in [0, 1].
      gae_lambda: lambda of generalized advantage estimation, in [0, 1].
      clip: distance of probability ratios from 1 beyond which they have no gradient.
      clip_values: whether to clip values: a value farther than `clip` from that in the rollout gets the larger of its
        own error and that of the clipped value.
      value_coefficient: coefficient of the value's squared error in the loss.
      entropy_coefficient: coefficient of the policy's entropy in the loss.
      max_grad_norm: maximum norm of gradients, by clipping; None for no clipping.
      normalize_advantages: whether to normalize advantages to mean 0 and standard deviation 1.
      advantages_in: whether these statistics are of the "rollout", or of the "minibatch", with the unbiased deviation.
      normalize_observations: whether to normalize observations by their mean and variance in all earlier rollouts, and
        clip them to [-10, 10].

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> Settings(minibatches=7)
      Traceback (most recent call last):
      ...
      ValueError: minibatches must divide the 32 x 64 = 2048 steps of a rollout, got 7
    """

    gae_lambda: chex.Numeric = 0.95
    clip: chex.Numeric = 0.2
    clip_values: bool = False
    value_coefficient: chex.Numeric = 1.0
    entropy_coefficient: chex.Numeric = 0.0
    max_grad_norm: chex.Numeric | None = None
    normalize_advantages: bool = True
    advantages_in: Literal["rollout", "minibatch"] = "rollout"
    normalize_observations: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_scalar("gae_lambda", self.gae_lambda, at_least=0, at_most=1)
        for name in ("clip", "value_coefficient", "entropy_coefficient"):
            check_scalar(name, getattr(self, name), at_least=0)
        if self.max_grad_norm is not None:
            check_scalar("max_grad_norm", self.max_grad_norm, at_least=0)
        if self.advantages_in not in ("rollout", "minibatch"):
            raise ValueError(f"advantages_in must be 'rollout' or 'minibatch', got {self.advantages_in!r}")
        if self.normalize_advantages and self.advantages_in == "minibatch" and self.steps == self.minibatches:
            raise ValueError(
                f"minibatches must be less than the rollout's {self.steps} steps, so that the advantages of one have a "
                f"deviation, got {self.minibatches}"
            )


DEFAULTS = Settings()
