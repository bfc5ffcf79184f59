"""MinAtar's games: shuffled observations and actions against the game as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax import envs

pytest.importorskip("gymnax", reason="games need gymnax")


@pytest.fixture(scope="module")
def played():
    """60 steps of a shuffled game with episodes of at most 9 steps, and of the same moves in the unshuffled game."""
    env = envs.ChangingGame("breakout", change_every=20, key=3, episode_length=9)
    plain = envs.Episodes(env.game, episode_length=9)

    def run(key):
        def step(states, action):
            shuffled, unshuffled = states
            order = shuffled.info["order"]
            shuffled = env.step(shuffled, action)
            unshuffled = plain.step(unshuffled, order["actions"][action])
            return (shuffled, unshuffled), (order, shuffled, unshuffled)

        actions = jax.random.randint(key, (60,), 0, 3)
        return jax.lax.scan(step, (env.reset(key), plain.reset(key)), actions)[1]

    return env, jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(1)))


def test_a_shuffled_game_is_the_game_with_other_names(played):
    env, (order, shuffled, plain) = played
    np.testing.assert_array_equal(shuffled.reward, plain.reward)
    np.testing.assert_array_equal(shuffled.done, plain.done)
    at = np.arange(60)[:, None]
    np.testing.assert_array_equal(shuffled.obs, plain.obs[at, shuffled.info["order"]["observations"]])
    np.testing.assert_array_equal(shuffled.info["final_obs"], plain.info["final_obs"][at, order["observations"]])
    assert set(np.unique(plain.obs)) == {0.0, 1.0}
    assert plain.obs.shape == (60, env.observation_size) == (60, 400)
    # A paddle in the bottom row, one ball, one trail, and 30 bricks at the start.
    start = plain.obs.reshape(60, 10, 10, 4)[np.nonzero(plain.done)[0]]
    np.testing.assert_array_equal(start.sum((1, 2)), [[1, 1, 1, 30]] * len(start))


def test_orders_change_where_an_episode_ends(played):
    env, (_, shuffled, _) = played
    info, period = shuffled.info, shuffled.info["period"]
    changed = np.diff(period) > 0
    assert period[-1] == 2 and (shuffled.done[1:][changed] == 1).all()
    starts = np.concatenate([[0], np.nonzero(changed)[0] + 2, [60]])
    assert (np.diff(starts)[:2] >= 20).all() and (np.diff(starts)[:2] < 30).all()
    np.testing.assert_array_equal(info["order"]["observations"][0], np.arange(400))
    np.testing.assert_array_equal(info["order"]["actions"][0], np.arange(3))
    for t, number in enumerate(period):
        expected = env.of_period(int(number)) if t in (0, 59) else None
        if expected is not None:
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, t=t: x[t], info["order"]), expected)


@pytest.mark.slow
def test_what_is_shuffled():
    def orders(**settings):
        return jax.vmap(envs.ChangingGame("breakout", **settings).of_period)(jnp.arange(40))

    found = orders()
    by_channel = found["observations"].reshape(40, 100, 4)
    np.testing.assert_array_equal(by_channel - by_channel[:, :1], np.arange(0, 400, 4)[None, :, None] + 0 * by_channel)
    assert len(np.unique(by_channel[:, 0], axis=0)) > 10 and len(np.unique(found["actions"], axis=0)) > 4
    pixels = orders(shuffle="pixels")["observations"]
    np.testing.assert_array_equal(np.sort(pixels), np.arange(400) + 0 * pixels)
    assert (pixels[1].reshape(100, 4) // 4 != np.arange(100)[:, None]).mean() > 0.9
    none = orders(shuffle="", shuffle_actions=False)
    np.testing.assert_array_equal(none["observations"], np.arange(400) + 0 * pixels)
    np.testing.assert_array_equal(none["actions"], [[0, 1, 2]] * 40)
    other = envs.ChangingGame("breakout", key=1, shuffle="pixels").of_period(1)["observations"]
    assert (other != pixels[1]).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("game", ["asterix", "freeway", "space_invaders"])
def test_other_games_run(game):
    env = envs.ChangingGame(game, change_every=30, episode_length=20)
    step = lambda state, action: (env.step(state, action), state.obs)
    actions = jax.random.randint(jax.random.key(2), (100,), 0, env.action_size)
    state, obs = jax.jit(lambda key: jax.lax.scan(step, env.reset(key), actions))(jax.random.key(0))
    assert state.info["period"] >= 2 and obs.shape == (100, env.observation_size) and np.isin(obs, (0, 1)).all()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"game must be one of .*'breakout'.*got 'pong'"):
        envs.Game("pong")
    with pytest.raises(ValueError, match="shuffle must be 'channels', 'pixels' or '', got 'rows'"):
        envs.ChangingGame(shuffle="rows")
    with pytest.raises(ValueError, match="change_every must be at least 1, got 0"):
        envs.ChangingGame(change_every=0)
