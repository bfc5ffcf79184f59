"""Generalized advantage estimation."""

import chex
import jax
import jax.numpy as jnp


def gae(
    rewards: chex.Array,
    values: chex.Array,
    next_values: chex.Array,
    terminations: chex.Array,
    truncations: chex.Array,
    *,
    discount: chex.Numeric,
    gae_lambda: chex.Numeric,
) -> chex.Array:
    r"""Compute the generalized advantage estimate over a rollout.

    With :math:`\delta_t = r_t + \gamma (1 - \text{termination}_t) V(s'_t) - V(s_t)`, where :math:`s'_t` is the state
    after step t,

    .. math::
      A_t = \delta_t + \gamma \lambda (1 - \text{done}_t) A_{t+1},

    where done is a termination or a truncation. After a termination there is no further return. After a truncation, the
    value of the last state replaces the remaining return. Advantages do not extend across the end of an episode.

    Args:
      rewards: [steps, ...].
      values: values of the states before the steps, [steps, ...].
      next_values: values of the states after the steps, before any reset, [steps, ...].
      terminations: 1 where the step terminated the episode, [steps, ...].
      truncations: 1 where the episode was truncated after the step, [steps, ...].
      discount: gamma, the discount for each step.
      gae_lambda: lambda; 0 gives temporal-difference errors, 1 full returns.

    Returns:
      advantages [steps, ...]. With `values` added they are the targets of the value function.

    Raises:
      ValueError: the arrays do not all have the same shape.

    Example:
      >>> zero, one = jnp.zeros(2), jnp.ones(2)
      >>> gae(one, zero, zero, zero, zero, discount=0.5, gae_lambda=1.0).tolist()
      [1.5, 1.0]

    References:
      Schulman et al., `High-Dimensional Continuous Control Using Generalized Advantage Estimation
      <https://arxiv.org/abs/1506.02438>`_, ICLR 2016
    """
    shapes = [jnp.shape(array) for array in (rewards, values, next_values, terminations, truncations)]
    if len(set(shapes)) > 1:
        raise ValueError(f"rewards, values, next_values, terminations, truncations must be of one shape, got {shapes}")
    errors = rewards + discount * (1 - terminations) * next_values - values
    decays = discount * gae_lambda * (1 - jnp.maximum(terminations, truncations))

    def back(later, step):
        error, decay = step
        advantage = error + decay * later
        return advantage, advantage

    _, found = jax.lax.scan(back, jnp.zeros_like(errors[0]), (errors, decays), reverse=True)
    return found
