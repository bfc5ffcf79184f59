"""The loss of proximal policy optimization."""

import chex
import jax.numpy as jnp

from cbp_jax.rl.rollout import Steps, log_prob
from cbp_jax.rl.settings import Settings

# For a nearly deterministic policy the ratio can overflow, and one such step would ruin the run.
_LARGEST_LOG_RATIO = 20.0


def ppo_loss(
    settings: Settings, mean: chex.Array, log_std: chex.Array, value: chex.Array, batch: Steps
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Return the loss of a minibatch, as defined in :func:`cbp_jax.rl.ppo.make`, and its terms.

    Args:
      settings: the settings.
      mean: means of the policy, [steps, actions].
      log_std: log standard deviations of the policy, [actions] or [steps, actions].
      value: [steps].
      batch: the minibatch.

    Returns:
      the loss []; `policy_loss`, `value_loss`, `entropy`, `approx_kl` and `clip_fraction`, scalars by name.
    """
    advantages = batch.advantages
    if settings.normalize_advantages and settings.advantages_in == "minibatch":
        advantages = (advantages - jnp.mean(advantages)) / (jnp.std(advantages, ddof=1) + 1e-8)
    log_ratio = log_prob(mean, log_std, batch.actions) - batch.log_probs
    ratio = jnp.exp(jnp.minimum(log_ratio, _LARGEST_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip)
    policy_loss = -jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))
    errors = jnp.square(value - batch.targets)
    if settings.clip_values:
        near = batch.values + jnp.clip(value - batch.values, -settings.clip, settings.clip)
        errors = jnp.maximum(errors, jnp.square(near - batch.targets))
    value_loss = jnp.mean(errors)
    entropy = jnp.mean(jnp.sum(log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e), -1))
    loss = policy_loss + settings.value_coefficient * value_loss - settings.entropy_coefficient * entropy
    return loss, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        # A low-variance estimate of the divergence, from J. Schulman, "Approximating KL divergence".
        "approx_kl": jnp.mean(ratio - 1 - log_ratio),
        "clip_fraction": jnp.mean(jnp.abs(ratio - 1) > settings.clip, dtype=jnp.float32),
    }
