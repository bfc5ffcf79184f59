"""Normalized observations and rewards, against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from cbp_jax.envs import Episodes, Normalized


@struct.dataclass
class State:
    pipeline_state: Any
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict[str, jax.Array]
    info: dict[str, Any] = struct.field(default_factory=dict)


class Drift:
    """Moves by the action and observes its position. It falls beyond 6. The reward is three times the action."""

    observation_size = 2
    action_size = 1

    def reset(self, key):
        at, zero = jax.random.uniform(key, (1,)), jnp.zeros([])
        return State(at, self._seen(at), zero, zero, {})

    def _seen(self, at):
        return jnp.concatenate([at, 100 * at**2])

    def step(self, state, action):
        at = state.pipeline_state + action
        # Computed from the observation in the state, which must be the environment's own, not the normalized one.
        moved = jnp.array([state.obs[0] + action[0], 100 * at[0] ** 2])
        return state.replace(pipeline_state=at, obs=moved, reward=3 * action[0], done=jnp.where(at[0] > 6, 1.0, 0.0))


def go(env, keys, actions):
    """Return the first states and those after each step, [environments, 1 + steps]."""

    def run(key):
        first = env.reset(key)
        _, states = jax.lax.scan(lambda state, action: (env.step(state, action[None]),) * 2, first, actions)
        return jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), first, states)

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(keys))


class Running:
    def __init__(self):
        self.seen = None

    def add(self, x):
        """Return mean and variance of all numbers so far, with a prior of mean 0 and variance 1 and weight 1e-4."""
        self.seen = [x] if self.seen is None else [*self.seen, x]
        x, count = np.array(self.seen, np.float64), len(self.seen) + 1e-4
        mean = x.sum(0) / count
        return mean, (1e-4 * (1 + mean**2) + ((x - mean) ** 2).sum(0)) / count


ACTIONS = jnp.array([1.0, 2.0, -0.5, 2.5, 3.0, 0.1, 0.2, 0.1, 0.3, -0.2, 4.0, 1.0, 1.0, 1.0, -40.0, 0.5])


@pytest.mark.parametrize("terminal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_observations_and_rewards_are_normalized_by_all_so_far(terminal):
    episodes = Episodes(Drift(), episode_length=5, time_limit_is_terminal=terminal)
    keys = jax.random.split(jax.random.key(0), 2)
    plain, states = go(episodes, keys, ACTIONS), go(Normalized(episodes, discount=0.9), keys, ACTIONS)
    for name in ("episode_return", "episode_length", "truncation", "ended"):
        np.testing.assert_array_equal(states.info[name], plain.info[name], err_msg=name)
    ended = plain.info["ended"]
    assert ended.sum() > 0 and (plain.done > ended).any(), "both terminations and truncations occur"
    for row in range(2):
        observations, sums, so_far = Running(), Running(), 0.0
        show = lambda x, mean, variance: np.clip((x - mean) / np.sqrt(variance + 1e-8), -10, 10)
        first = plain.obs[row, 0]
        np.testing.assert_allclose(states.obs[row, 0], show(first, *observations.add(first)), rtol=1e-3, atol=1e-5)
        for t in range(1, len(ACTIONS) + 1):
            final = plain.info["final_obs"][row, t]
            found = show(final, *observations.add(final))
            np.testing.assert_allclose(states.info["final_obs"][row, t], found, rtol=1e-3, atol=1e-5)
            if plain.done[row, t]:
                found = show(plain.obs[row, t], *observations.add(plain.obs[row, t]))
            np.testing.assert_allclose(states.obs[row, t], found, rtol=1e-3, atol=1e-5)
            reward = plain.reward[row, t]
            so_far = 0.9 * (1 - ended[row, t]) * so_far + reward
            scaled = np.clip(reward / np.sqrt(sums.add(so_far)[1] + 1e-8), -10, 10)
            np.testing.assert_allclose(states.reward[row, t], scaled, rtol=1e-3)
    assert abs(states.reward).max() == 10, "the first reward is large compared with the variance so far"


def test_normalization_of_streaming_agents():
    """Variances are Welford's unbiased ones, 1 at first, and nothing is clipped."""
    episodes = Episodes(Drift(), episode_length=5, time_limit_is_terminal=True)
    keys = jax.random.split(jax.random.key(1), 1)
    streaming = Normalized(episodes, discount=0.9, bound=np.inf, unbiased=True)
    plain, states = (jax.tree.map(lambda x: x[0], go(env, keys, ACTIONS)) for env in (episodes, streaming))
    shown, sums, so_far = [plain.obs[0]], [], 0.0
    spread = lambda seen: np.std(seen, axis=0, ddof=1) if len(seen) > 1 else 1.0
    np.testing.assert_array_equal(states.obs[0], 0.0)
    for t in range(1, len(ACTIONS) + 1):
        shown.append(plain.info["final_obs"][t])
        found = (shown[-1] - np.mean(shown, 0)) / spread(shown)
        np.testing.assert_allclose(states.info["final_obs"][t], found, rtol=1e-3, atol=1e-5)
        if plain.done[t]:
            shown.append(plain.obs[t])
        found = (shown[-1] - np.mean(shown, 0)) / spread(shown)
        np.testing.assert_allclose(states.obs[t], found, rtol=1e-3, atol=1e-5)
        so_far = 0.9 * (1 - plain.info["ended"][t]) * so_far + plain.reward[t]
        sums.append(so_far)
        np.testing.assert_allclose(states.reward[t], plain.reward[t] / spread(sums), rtol=1e-3)
    assert states.reward[1] == plain.reward[1] and plain.done.sum() > 2


def test_observations_or_rewards_can_be_left_unnormalized():
    episodes = Episodes(Drift(), episode_length=5)
    keys = jax.random.split(jax.random.key(0), 1)
    plain = go(episodes, keys, ACTIONS)
    rewards = go(Normalized(episodes, observations=False), keys, ACTIONS)
    observations = go(Normalized(episodes, rewards=False), keys, ACTIONS)
    np.testing.assert_array_equal(rewards.obs, plain.obs)
    np.testing.assert_array_equal(observations.reward, plain.reward)
    assert (rewards.reward != plain.reward).any() and (observations.obs != plain.obs).any()


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"discount must be in \[0, 1\], got 1.5"):
        Normalized(Episodes(Drift()), discount=1.5)
    with pytest.raises(ValueError, match="bound must be positive, got 0"):
        Normalized(Episodes(Drift()), bound=0)
