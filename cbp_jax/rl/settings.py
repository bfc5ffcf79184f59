"""Settings of proximal policy optimization."""

import dataclasses
from typing import Literal

import chex

from cbp_jax.numerics.scalars import check_scalar


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of PPO; the defaults are those of Dohare et al. (Nature 2024), with 32 environments for its one.

    Numbers that are not counts may be traced, so that a grid of them is a `vmap`.

    Attributes:
      num_envs: environments of a rollout.
      rollout_length: steps of each environment in a rollout.
      epochs: how often a rollout is learned from.
      minibatches: updates of an epoch; they share all steps of the rollout equally.
      discount: of a step, in [0, 1].
      gae_lambda: of generalized advantage estimation, in [0, 1].
      clip: how far ratios of probabilities go from 1 before their gradient is cut.
      clip_values: whether a value that is farther than `clip` from that in the rollout has the larger of two errors,
        its own and that of the nearest value that is not: its gradient is cut where it runs ahead.
      value_coefficient: of the value's squared error in the loss.
      entropy_coefficient: of the policy's entropy in the loss.
      max_grad_norm: what a gradient's norm is brought down to where it is larger; nothing if None.
      normalize_advantages: whether advantages are brought to mean 0 and standard deviation 1.
      advantages_in: what these are taken of, "rollout", or "minibatch", where the deviation is the unbiased one.
      normalize_observations: whether observations are, by their mean and variance in all rollouts before, and clipped
        to [-10, 10].

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> Settings(minibatches=7)
      Traceback (most recent call last):
      ...
      ValueError: minibatches must divide the 32 x 64 = 2048 steps of a rollout, got 7
    """

    num_envs: int = 32
    rollout_length: int = 64
    epochs: int = 10
    minibatches: int = 16
    discount: chex.Numeric = 0.99
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
        for name in ("num_envs", "rollout_length", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps % self.minibatches:
            raise ValueError(
                f"minibatches must divide the {self.num_envs} x {self.rollout_length} = {self.steps} steps of a "
                f"rollout, got {self.minibatches}"
            )
        check_scalar("discount", self.discount, at_least=0, at_most=1)
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

    @property
    def steps(self) -> int:
        """Steps of the environments in a rollout."""
        return self.num_envs * self.rollout_length


DEFAULTS = Settings()
