"""Consecutive episodes of any Brax environment."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp


class Around:
    """Base class of wrappers around an environment, `env`."""

    env: Any

    @property
    def observation_size(self) -> int:
        """Number of observations."""
        return self.env.observation_size

    @property
    def action_size(self) -> int:
        """Number of actions."""
        return self.env.action_size


class Episodes(Around):
    """Starts the next episode when one ends, and distinguishes time limits from terminations.

    It is a single environment; vmap `reset` and `step` for many. In states that `step` returns

    - `obs` is the observation to act on next: after the last step of an episode, the first one of the next episode;
    - `reward` and `metrics` are those of the step, `done` is 1 if the step ended an episode, for any reason;
    - `info["ended"]` is 1 if it terminated by itself, for example by a fall;
    - `info["truncation"]` is 1 if it was ended only by the time limit or a cut;
    - `info["interrupted"]` is 1 if it was ended only by a cut, before the time limit, so that its return is incomplete;
    - `info["final_obs"]` is the observation after the step, before any reset;
    - `info["episode_return"]` and `info["episode_length"]` are sums over the episode up to and including this step.

    A step with non-finite observations or reward ends the episode like a fall, with reward 0, and with the `final_obs`
    and `metrics` of the step before. The agent never sees non-finite values.

    Args:
      env: an environment with Brax's `reset(key) -> state`, `step(state, action) -> state`, `observation_size` and
        `action_size`.
      episode_length: time limit in steps.
      time_limit_is_terminal: whether the time limit, or a cut, terminates episodes like a fall; then `truncation` stays
        0.
      random_reset: whether every episode starts from a new random state, which costs a reset at every step. Otherwise
        all episodes of an environment start from its first state.

    Raises:
      ValueError: `episode_length` is less than 1.

    Example:
      >>> from cbp_jax.envs.walker import make_brax_env
      >>> env = Episodes(make_brax_env("fast", "spring"), episode_length=2)
      >>> state = env.reset(jax.random.key(0))
      >>> for _ in range(3):
      ...   state = env.step(state, jnp.zeros(env.action_size))
      ...   print(state.done, state.info["truncation"], state.info["episode_length"])
      0.0 0.0 1.0
      1.0 1.0 2.0
      0.0 0.0 1.0
    """

    def __init__(
        self, env: Any, episode_length: int = 1000, *, time_limit_is_terminal: bool = False, random_reset: bool = True
    ):
        if episode_length < 1:
            raise ValueError(f"episode_length must be at least 1, got {episode_length}")
        self.env = env
        self.episode_length = episode_length
        self.time_limit_is_terminal = time_limit_is_terminal
        self.random_reset = random_reset

    def reset(self, key: chex.PRNGKey) -> Any:
        """Return the initial state of the first episode, drawn with a key.

        Raises:
          ValueError: the key is not of JAX's default generator, since the state holds raw key data.
        """
        generator, default = (str(jax.random.key_impl(key)) for key in (key, jax.random.key(0)))
        if generator != default:
            raise ValueError(f"key must be of the default generator {default!r}, got one of {generator!r}")
        key, first_key = jax.random.split(key)
        state = self.env.reset(first_key)
        zero = jnp.zeros([])
        info = {
            "ended": zero,
            "truncation": zero,
            "interrupted": zero,
            "final_obs": state.obs,
            "episode_return": zero,
            "episode_length": zero,
            "reset_key": jax.random.key_data(key),
        }
        if not self.random_reset:
            info["first"] = (state.pipeline_state, state.obs)
        return strong(state.replace(info=state.info | info))

    def step(self, state: Any, action: chex.Array, cut: chex.Numeric = False) -> Any:
        """Return the state after an action [actions]. If `cut`, bool [], is true, the episode ends with it, as at the
        time limit."""
        begun = state.done > 0  # the previous step was the last of an episode
        so_far = lambda name: jnp.where(begun, 0.0, state.info[name])
        # Environments that never terminate, such as halfcheetah, return `done` as they got it. And all of Brax's
        # environments write into the metrics of the state that they get.
        given = state.replace(done=jnp.zeros_like(state.done), metrics=dict(state.metrics))
        after = self.env.step(given, action)
        lost = ~(jnp.isfinite(after.obs).all() & jnp.isfinite(after.reward))
        after = after.replace(
            reward=jnp.where(lost, 0.0, after.reward),
            metrics=jax.tree.map(lambda old, new: jnp.where(lost, old, new), state.metrics, after.metrics),
        )
        length = so_far("episode_length") + 1
        at_limit = length >= self.episode_length
        ended = (after.done > 0) | lost
        stopped = (at_limit | cut) & ~ended
        info = after.info | {
            "ended": jnp.where(ended, 1.0, 0.0),
            "truncation": jnp.where(stopped & (not self.time_limit_is_terminal), 1.0, 0.0),
            "interrupted": jnp.where(stopped & ~at_limit, 1.0, 0.0),
            "final_obs": jnp.where(lost, state.obs, after.obs),
            "episode_return": so_far("episode_return") + after.reward,
            "episode_length": length,
        }
        done = ended | stopped
        if self.random_reset:
            key, first_key = jax.random.split(jax.random.wrap_key_data(info["reset_key"]))
            info["reset_key"] = jax.random.key_data(key)
            first = self.env.reset(first_key)
            pipeline_state, obs = first.pipeline_state, first.obs
        else:
            pipeline_state, obs = info["first"]
        pipeline_state, obs = jax.tree.map(
            lambda fresh, old: jnp.where(done, fresh, old), (pipeline_state, obs), (after.pipeline_state, after.obs)
        )
        return strong(after.replace(pipeline_state=pipeline_state, obs=obs, done=jnp.where(done, 1.0, 0.0), info=info))


def strong(tree: Any) -> Any:
    """Remove weak types, which would cause retracing when a loop starts from its own result.

    Example:
      >>> strong(jnp.asarray(1.0)).weak_type
      False
    """
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)


def check_range(name: str, value: tuple[float, float]) -> None:
    """Raise a `ValueError` unless the value is two positive numbers, the second not less than the first."""
    low, high = value
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{name} must be two positive numbers in ascending order, got {value}")
