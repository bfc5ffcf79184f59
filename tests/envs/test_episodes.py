"""Episodes of an environment whose steps are known exactly, without Brax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from cbp_jax.envs import Episodes


@struct.dataclass
class State:
    pipeline_state: Any
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict[str, jax.Array]
    info: dict[str, Any] = struct.field(default_factory=dict)


class Walk:
    """Its position grows by the action; it falls beyond 10. It starts at random in [0, 1)."""

    observation_size = 1
    action_size = 1

    def reset(self, key):
        position = jax.random.uniform(key, (1,))
        zero = jnp.zeros([])
        return State(position, position, zero, zero, {"speed": zero})

    def step(self, state, action):
        position = state.pipeline_state + action
        state.metrics.update(speed=action[0])  # in place, as in Brax
        # Weakly typed, as some values in Brax are.
        return state.replace(
            pipeline_state=position,
            obs=position,
            reward=action[0] * 1.0,
            done=jnp.where(position[0] > 10, 1.0, 0.0),
        )


def go(env, actions, key=0):
    """Return the states [steps] after these actions."""

    def step(state, action):
        state = env.step(state, jnp.full(1, action))
        return state, state

    return jax.jit(lambda key: jax.lax.scan(step, env.reset(key), jnp.asarray(actions, jnp.float32))[1])(
        jax.random.key(key)
    )


def test_truncation_and_termination_are_distinguished_and_the_next_episode_begins():
    states = go(Episodes(Walk(), episode_length=3), [1, 1, 1, 8, 8, 1, 1, 1])
    # A truncation after three steps, then a fall in the second step, then another truncation.
    np.testing.assert_array_equal(states.done, [0, 0, 1, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(states.info["truncation"], [0, 0, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(states.info["episode_length"], [1, 2, 3, 1, 2, 1, 2, 3])
    np.testing.assert_array_equal(states.info["episode_return"], [1, 2, 3, 8, 16, 1, 2, 3])
    np.testing.assert_array_equal(states.reward, [1, 1, 1, 8, 8, 1, 1, 1])
    np.testing.assert_array_equal(states.metrics["speed"], [1, 1, 1, 8, 8, 1, 1, 1])
    ended = states.done > 0
    obs, final = states.obs[:, 0], states.info["final_obs"][:, 0]
    np.testing.assert_array_equal(obs[~ended], final[~ended])
    assert (obs[ended] < 1).all() and (final[ended] >= 3).all() and final[4] > 10
    assert len(set(obs[ended].tolist())) == 3, "every episode starts from another state"
    np.testing.assert_allclose(final[5], obs[4] + 1, rtol=1e-6)


def test_an_environment_without_termination_continues_after_a_truncation():
    class Endless(Walk):
        def step(self, state, action):
            return super().step(state, action).replace(done=state.done)

    states = go(Episodes(Endless(), episode_length=2), [1] * 5)
    assert states.done.tolist() == [0, 1, 0, 1, 0] and states.info["truncation"].tolist() == [0, 1, 0, 1, 0]
    assert states.info["episode_return"].tolist() == [1, 2, 1, 2, 1]


def test_a_fall_at_the_time_limit_is_a_termination():
    states = go(Episodes(Walk(), episode_length=2), [1, 10])
    assert states.done.tolist() == [0, 1] and states.info["truncation"].tolist() == [0, 0]


@pytest.mark.parametrize("step", [np.nan, np.inf])
def test_a_state_that_is_not_finite_ends_an_episode_and_is_never_observed(step):
    states = go(Episodes(Walk(), episode_length=5), [1, step, 1, 1])
    assert states.done.tolist() == [0, 1, 0, 0] and not states.info["truncation"].any()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(states))
    assert states.reward.tolist() == [1, 0, 1, 1] and states.info["episode_return"].tolist() == [1, 1, 1, 2]
    np.testing.assert_array_equal(states.info["final_obs"][1], states.obs[0])
    assert 0 <= states.obs[1] < 1


def test_a_terminal_time_limit_never_truncates():
    states = go(Episodes(Walk(), episode_length=2, time_limit_is_terminal=True), [1] * 4)
    assert states.done.tolist() == [0, 1, 0, 1] and not states.info["truncation"].any()


def test_without_random_resets_every_episode_starts_alike_and_environments_differ():
    env = Episodes(Walk(), episode_length=2, random_reset=False)
    first, second = (go(env, [1] * 6, key).obs[1::2, 0] for key in (0, 1))
    assert len(set(first.tolist())) == 1 and first[0] != second[0]


def test_states_after_steps_have_the_types_of_the_first_state():
    for random_reset in (True, False):
        env = Episodes(Walk(), episode_length=2, random_reset=random_reset)
        first = env.reset(jax.random.key(0))
        after = env.step(first, jnp.ones(1))
        kind = lambda x: (x.shape, x.dtype, x.weak_type)
        assert jax.tree.map(kind, first) == jax.tree.map(kind, after)
        assert (first.metrics["speed"], after.metrics["speed"]) == (0, 1), "a step modified its argument"


def test_rows_of_a_batch_equal_the_solo_runs():
    env = Episodes(Walk(), episode_length=2)
    keys = jax.random.split(jax.random.key(0), 3)
    step = lambda key: env.step(env.step(env.reset(key), jnp.ones(1)), jnp.ones(1)).obs
    np.testing.assert_array_equal(jax.vmap(step)(keys), jnp.stack([step(key) for key in keys]))


def test_a_key_of_another_generator_is_refused():
    with pytest.raises(ValueError, match="key must be of the default generator 'threefry2x32', got one of 'rbg'"):
        Episodes(Walk()).reset(jax.random.key(0, impl="rbg"))


def test_a_time_limit_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="episode_length must be at least 1, got 0"):
        Episodes(Walk(), episode_length=0)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_cut_ends_an_episode_like_the_time_limit_and_marks_it_as_interrupted(terminal):
    env = Episodes(Walk(), episode_length=3, time_limit_is_terminal=terminal)

    def step(state, numbers):
        action, cut = numbers
        return (env.step(state, action[None], cut=cut > 0),) * 2

    # A cut in the second step, a cut at the time limit, and a cut at a fall.
    numbers = jnp.array([[1.0, 1, 1, 1, 1, 11], [0, 1, 0, 0, 1, 1]]).T
    states = jax.jit(lambda key: jax.lax.scan(step, env.reset(key), numbers)[1])(jax.random.key(0))
    assert states.done.tolist() == [0, 1, 0, 0, 1, 1]
    assert states.info["interrupted"].tolist() == [0, 1, 0, 0, 0, 0]
    assert states.info["ended"].tolist() == [0, 0, 0, 0, 0, 1]
    assert states.info["truncation"].tolist() == ([0] * 6 if terminal else [0, 1, 0, 0, 1, 0])
    assert states.info["episode_length"].tolist() == [1, 2, 1, 2, 3, 1]
