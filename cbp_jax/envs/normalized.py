"""Normalizes observations and rewards of an environment by running statistics."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from cbp_jax.envs.episodes import Around, strong
from cbp_jax.numerics.running import Statistics, counted, unseen
from cbp_jax.numerics.scalars import check_scalar

# How many numbers of mean 0 and variance 1 the statistics start with; also added to variances.
_PRIOR, _EPSILON = 1e-4, 1e-8


class Normalized(Around):
    r"""Normalizes observations and rewards by running statistics, and clips them, to [-10, 10] by default.

    An observation o becomes :math:`(o - \mu) / \sqrt{\sigma^2 + 10^{-8}}`, with mean and variance over all observations
    up to and including this one, across episodes. A reward r is divided by :math:`\sqrt{\sigma_G^2 + 10^{-8}}`, with
    the variance of all discounted sums of rewards so far, :math:`G \leftarrow \gamma (1 - \text{ended}) G + r`, which
    continue across time limits. Gymnasium's wrappers do this in the program of Elsayed & Mahmood (ICLR 2024); here it
    is in float32. Statistics are in the state, so each environment of a `vmap` has its own.

    With `unbiased=True, bound=inf` it is what the program of Elsayed et al. (2024) does for streaming agents: variances
    are unbiased, and 1 after a single number, instead of including 1e-4 prior numbers of mean 0 and variance 1; and
    nothing is clipped. (That program also restarts sums of rewards at time limits.)

    Args:
      env: an environment with states of `Episodes`. Information about episodes, such as returns, is not normalized.
      observations: whether to normalize observations, `obs` and `info["final_obs"]`.
      rewards: whether to normalize rewards.
      discount: discount for each step, in [0, 1].
      bound: normalized values are clipped to ± this, > 0.
      unbiased: whether to use unbiased variances.

    Raises:
      ValueError: `discount` or `bound` is out of range.

    Example:
      >>> from cbp_jax.envs.episodes import Episodes
      >>> from cbp_jax.envs.walker import make_brax_env
      >>> env = Normalized(Episodes(make_brax_env("fast", "spring"), episode_length=2))
      >>> state = jax.jit(env.reset)(jax.random.key(0))
      >>> bool(jnp.abs(state.obs).max() < 0.02)
      True
    """

    def __init__(
        self,
        env: Any,
        *,
        observations: bool = True,
        rewards: bool = True,
        discount: chex.Numeric = 0.99,
        bound: float = 10.0,
        unbiased: bool = False,
    ):
        check_scalar("discount", discount, at_least=0, at_most=1)
        if not bound > 0:
            raise ValueError(f"bound must be positive, got {bound}")
        self.env = env
        self.observations = observations
        self.rewards = rewards
        self.discount = discount
        self.bound = bound
        self.unbiased = unbiased

    def view(self, obs: chex.Array, statistics: Statistics) -> chex.Array:
        """Normalize observations [..., observations] by statistics as in `info["seen"]`."""
        if not self.observations:
            return obs
        return self._scaled(obs - statistics.mean, statistics)

    def _scaled(self, apart: chex.Array, statistics: Statistics) -> chex.Array:
        variance = statistics.unbiased_variance if self.unbiased else statistics.variance
        return jnp.clip(apart / jnp.sqrt(variance + _EPSILON), -self.bound, self.bound)

    def reset(self, key: chex.PRNGKey) -> Any:
        """Return the first state for a key."""
        state = self.env.reset(key)
        prior = 0.0 if self.unbiased else _PRIOR
        seen = counted(unseen(state.obs.shape, prior), state.obs[None])
        return self._shown(state, state.info["final_obs"], seen, unseen((), prior), jnp.zeros([]))

    def step(self, state: Any, action: chex.Array) -> Any:
        """Return the state after an action [actions]."""
        info = state.info
        after = self.env.step(state.replace(obs=info["raw_obs"]), action)
        led_to = counted(info["seen"], after.info["final_obs"][None])
        # At the end of an episode, its last observation and the first of the next one differ.
        seen = jax.tree.map(
            lambda both, one: jnp.where(after.done > 0, both, one), counted(led_to, after.obs[None]), led_to
        )
        sum_so_far = self.discount * (1 - after.info["ended"]) * info["discounted"] + after.reward
        sums = counted(info["sums"], sum_so_far[None])
        final = self.view(after.info["final_obs"], led_to)
        if self.rewards:
            after = after.replace(reward=self._scaled(after.reward, sums))
        return self._shown(after, final, seen, sums, sum_so_far)

    def _shown(self, state: Any, final: chex.Array, seen: Statistics, sums: Statistics, sum_so_far: chex.Array) -> Any:
        info = {"raw_obs": state.obs, "seen": seen, "sums": sums, "discounted": sum_so_far, "final_obs": final}
        return strong(state.replace(obs=self.view(state.obs, seen), info=state.info | info))
