"""Rollouts: steps in environments with a fixed policy, and their advantages."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cbp_jax.envs.episodes import strong
from cbp_jax.numerics.running import Statistics
from cbp_jax.rl.gae import gae
from cbp_jax.rl.settings import Settings

# What an environment reports about episodes, in the info of its states.
EPISODE = ("truncation", "final_obs", "episode_return", "episode_length")


class Environment(Protocol):
    """An environment that starts new episodes by itself, such as any environment wrapped in `cbp_jax.envs.Episodes`.

    States have `obs`, `reward`, `done` and `metrics` as Brax's, and in `info` at least `truncation`, `final_obs`,
    `episode_return` and `episode_length`.
    """

    observation_size: int
    action_size: int

    def reset(self, key: chex.PRNGKey) -> Any:
        """Return the initial state."""

    def step(self, state: Any, action: chex.Array) -> Any:
        """Return the state after an action [actions]; at the end of an episode, the first state of the next."""


class Steps(NamedTuple):
    """Steps of a rollout, [rollout_length, num_envs, ...], or of a minibatch, [steps, ...]."""

    obs: chex.Array
    actions: chex.Array
    log_probs: chex.Array
    values: chex.Array
    advantages: chex.Array
    targets: chex.Array


def rollout(
    env: Environment,
    network: nn.Module,
    settings: Settings,
    params: optax.Params,
    env_state: Any,
    seen: Callable[[chex.Array], chex.Array],
    key: chex.PRNGKey,
) -> tuple[Any, Steps, dict[str, chex.Array]]:
    """Run all environments. Also return metrics and the raw observations."""

    def step(env_state, key):
        obs = env_state.obs
        mean, log_std, _ = network.apply(params, seen(obs))
        actions = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        ground = {name: env_state.info[name] for name in ("friction",) if name in env_state.info}  # of this step
        env_state = strong(jax.vmap(env.step)(env_state, actions))
        kept = episode_info(env_state)
        further = env_state.metrics | ground
        ended = (env_state.reward, env_state.done)
        return env_state, (obs, actions, log_prob(mean, log_std, actions), ended, kept, further)

    keys = jax.random.split(key, settings.rollout_length)
    env_state, (obs, actions, log_probs, (rewards, dones), info, further) = jax.lax.scan(step, env_state, keys)
    values = network.apply(params, seen(obs))[2]
    gained = gae(
        rewards,
        values,
        network.apply(params, seen(info["final_obs"]))[2],
        dones * (1 - info["truncation"]),
        info["truncation"],
        discount=settings.discount,
        gae_lambda=settings.gae_lambda,
    )
    targets = gained + values
    found = {name: jnp.mean(values) for name, values in further.items()} | {
        "obs": obs,
        **episode_sums(dones, info),
        "explained_variance": 1 - jnp.var(gained) / jnp.maximum(jnp.var(targets), 1e-12),
    }
    if settings.normalize_advantages and settings.advantages_in == "rollout":
        gained = (gained - jnp.mean(gained)) / (jnp.std(gained) + 1e-8)
    return env_state, Steps(seen(obs), actions, log_probs, values, gained, targets), found


def episode_info(env_state: Any) -> dict[str, chex.Array]:
    """Return what states report about episodes, [...] each: `EPISODE`, and `interrupted`, 0 if it is not reported."""
    info = env_state.info
    return {name: info[name] for name in EPISODE} | {
        "interrupted": info.get("interrupted", jnp.zeros_like(env_state.done))
    }


def episode_sums(dones: chex.Array, info: dict[str, chex.Array]) -> dict[str, chex.Array]:
    """Return the number of episodes that ended in steps [...], and the sums of their returns and lengths.

    Interrupted episodes are left out.
    """
    whole = dones * (1 - info["interrupted"])
    return {
        "episodes": jnp.sum(whole),
        "return_sum": jnp.sum(whole * info["episode_return"]),
        "length_sum": jnp.sum(whole * info["episode_length"]),
    }


def log_prob(mean: chex.Array, log_std: chex.Array, actions: chex.Array) -> chex.Array:
    """Return the logarithm of a Gaussian's density at actions [..., actions]."""
    scaled = (actions - mean) / jnp.exp(log_std)
    return jnp.sum(-0.5 * jnp.square(scaled) - log_std - 0.5 * jnp.log(2 * jnp.pi), -1)


def normalized(obs: chex.Array, statistics: Statistics) -> chex.Array:
    """Normalize observations [..., observations], see `normalize_observations`; without statistics, only clip them."""
    std = jnp.where(statistics.count > 0, jnp.sqrt(statistics.variance), 1)
    return jnp.clip((obs - statistics.mean) / jnp.maximum(std, 1e-6), -10, 10)
