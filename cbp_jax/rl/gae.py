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
    r"""Generalized advantage estimation over a rollout.

    With :math:`\delta_t = r_t + \gamma (1 - \text{termination}_t) V(s'_t) - V(s_t)`, where :math:`s'_t` is what step t
    led to,

    .. math::
      A_t = \delta_t + \gamma \lambda (1 - \text{done}_t) A_{t+1},

    where done is a termination or a truncation: nothing is gained after a termination, while after a truncation, which
    only stops looking, the value of the last state stands for what would have come; and no advantage reaches back over
    the end of an episode.

    Args:
      rewards: [steps, ...].
      values: of the states in which the steps were made, [steps, ...].
      next_values: of the states that they led to, before any reset, [steps, ...].
      terminations: 1 where the step ended the episode for good, [steps, ...].
      truncations: 1 where the episode was cut after the step, [steps, ...].
      discount: of a step, gamma.
      gae_lambda: 0 takes the temporal-difference errors themselves, 1 whole returns.

    Returns:
      advantages [steps, ...]; with `values` added they are what values are to learn.

    Raises:
      ValueError: the arrays are not all of one shape.

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
