"""Cart-pole against NumPy in float64, and the changes of its physics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.envs import CartPole, ChangingCartPole, Physics


def numpy_step(state, action, gravity, half_length, force):
    """Solve the two equations of motion as a linear system, instead of by the formula."""
    _, speed, angle, turning = state
    cart, pole = 1.0, 0.1
    push = force if action == 1 else -force
    # (M + m) x'' + m l cos(a) a'' = F + m l a'^2 sin(a);  m l cos(a) x'' + 4/3 m l^2 a'' = m g l sin(a)
    arm = pole * half_length
    masses = np.array([[cart + pole, arm * np.cos(angle)], [arm * np.cos(angle), 4 / 3 * arm * half_length]])
    forces = np.array([push + arm * turning**2 * np.sin(angle), arm * gravity * np.sin(angle)])
    moved, turned = np.linalg.solve(masses, forces)
    return np.array(state) + 0.02 * np.array([speed, moved, turning, turned])


@pytest.mark.parametrize("physics", [Physics(), Physics(20.0, 0.25, -5.0)])
def test_steps_agree_with_numpy(physics):
    env, rng = CartPole(physics), np.random.default_rng(0)
    step = jax.jit(env.step)
    state = jax.jit(env.reset)(jax.random.key(0))
    expected = np.float64(state.obs)
    assert (abs(expected) <= 0.05).all()
    for action in rng.integers(0, 2, 12):
        state = step(state, action)
        expected = numpy_step(expected, action, *physics)
        np.testing.assert_allclose(state.obs, expected, rtol=1e-4, atol=1e-5)
        assert state.reward == 1
        assert bool(state.done) == (abs(expected[0]) > 2.4 or abs(expected[2]) > 12 * math.pi / 180)


@pytest.mark.parametrize(("where", "lost"), [((2.39, 0.0), False), ((2.41, 0.0), True), ((0.0, -0.22), True)])
def test_an_episode_ends_beyond_the_track_or_with_a_leaning_pole(where, lost):
    env = CartPole()
    at = jnp.array([where[0], 0.0, where[1], 0.0])
    state = env.reset(jax.random.key(0)).replace(pipeline_state=at)
    assert bool(env.step(state, jnp.int32(0)).done) == lost


@pytest.fixture(scope="module")
def walked():
    """Take 40 steps in two environments. Both change physics at the first end of an episode after each 12 steps."""
    env = ChangingCartPole(change_every=12, swap_actions=True, key=3, episode_length=5)

    def run(key):
        def step(state, action):
            state = env.step(state, action)
            return state, (state.obs, state.done, state.info)

        actions = jnp.arange(40) % 2
        first = env.reset(key)
        return first, jax.lax.scan(step, first, actions)[1]

    return env, jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2)))


def test_physics_change_where_an_episode_ends(walked):
    env, (_, (_, done, info)) = walked
    period = info["period"]
    assert (period[:, -1] == 2).all() and (np.diff(period, axis=1)[done[:, 1:] == 0] == 0).all()
    assert (np.diff(period, axis=1).sum(1) == 2).all()
    np.testing.assert_array_equal(np.nonzero(np.diff(period[0]))[0] + 1, [14, 29])  # after 15 and after 30 steps
    for number in range(3):
        expected = env.physics_of(number)
        for found, value in zip(info["physics"], expected, strict=True):
            np.testing.assert_allclose(found[period == number], value, rtol=1e-6)
    force = info["physics"].force
    assert (force[period != 1] > 0).all() and (force[period == 1] < 0).all()


def test_steps_after_a_change_follow_the_new_physics(walked):
    _, (_, (obs, done, info)) = walked
    for t in range(1, 40):
        if not done[0, t - 1] and not done[0, t]:
            physics = (float(value[0, t - 1]) for value in info["physics"])
            expected = numpy_step(np.float64(obs[0, t - 1]), t % 2, *physics)
            np.testing.assert_allclose(obs[0, t], expected, rtol=1e-4, atol=1e-5)


def test_physics_are_log_uniform_and_depend_on_the_key():
    env = ChangingCartPole(key=0, gravity_range=(5.0, 20.0), force_range=(3.0, 3.0))
    draws = jax.jit(jax.vmap(env.physics_of))(jnp.arange(2000))
    assert 5 <= draws.gravity.min() < 5.1 and 19.5 < draws.gravity.max() <= 20
    np.testing.assert_allclose(jnp.mean(jnp.log(draws.gravity)), np.log(10), atol=0.03)
    np.testing.assert_allclose(draws.force, 3.0, rtol=1e-6)
    assert abs(np.corrcoef(draws.gravity, draws.half_length)[0, 1]) < 0.1
    assert ChangingCartPole(key=1).physics_of(0).gravity != env.physics_of(0).gravity


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"change_every": 0}, "change_every must be at least 1, got 0"),
        ({"gravity_range": (2.0, 1.0)}, r"gravity_range must be two positive numbers.*got \(2.0, 1.0\)"),
        ({"length_range": (0.0, 1.0)}, "length_range must be"),
        ({"force_range": (-1.0, 1.0)}, "force_range must be"),
        ({"episode_length": 0}, "episode_length must be at least 1"),
    ],
)
def test_what_is_out_of_range_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        ChangingCartPole(**settings)
