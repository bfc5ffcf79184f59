"""Episode after episode of any Brax environment."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp


class Around:
    """What an environment has in common with the one in it, `env`."""

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
    """Starts the next episode where one ends, and tells a cut by the time limit from an end.

    It is an environment itself, one; vmap `reset` and `step` for many. In states that `step` returns

    - `obs` is what to act on next: after the last step of an episode, the first observation of the next;
    - `reward` and `metrics` are the step's, `done` is 1 where the step ended an episode, for whatever reason;
    - `info["ended"]` is 1 where it ended of itself, as by a fall;
    - `info["truncation"]` is 1 where it was ended by the time limit, or a cut, alone;
    - `info["interrupted"]` is 1 where it was ended by a cut alone, before its time: its return is not a whole one's;
    - `info["final_obs"]` is what the step led to, before any reset;
    - `info["episode_return"]` and `info["episode_length"]` are sums over the episode up to and with this step.

    A step that leads to observations or a reward that are not finite ends the episode as a fall does, with reward 0,
    and its `final_obs` and `metrics` are those of the step before: the agent never sees them.

    Args:
      env: with Brax's `reset(key) -> state`, `step(state, action) -> state`, `observation_size` and `action_size`.
      episode_length: time limit in steps.
      time_limit_is_terminal: whether nothing is to be had after the time limit, or a cut: it ends episodes as a fall
        does, and `truncation` stays 0.
      random_reset: whether every episode starts from a random state of its own, which costs a reset at every step;
        otherwise all episodes of an environment start from its first state.

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
        """The first state of the first episode, of a key.

        Raises:
          ValueError: the key is not of JAX's default generator, whose raw data the state carries.
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
        """The state after an action [actions]; a cut, bool [], ends the episode with it as the time limit does."""
        begun = state.done > 0  # the step before was the last of an episode
        so_far = lambda name: jnp.where(begun, 0.0, state.info[name])
        # Environments that never end of themselves, such as halfcheetah, hand `done` on as they got it; and all
        # of Brax's write into the metrics of the state that they are given.
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
    """Without weak types, which would make a loop that starts from its own result trace again.

    Example:
      >>> strong(jnp.asarray(1.0)).weak_type
      False
    """
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)


def check_range(name: str, value: tuple[float, float]) -> None:
    """Raises a `ValueError` unless the value is two positive numbers, the second not less than the first."""
    low, high = value
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{name} must be two positive numbers in ascending order, got {value}")
