"""The ant: its physics, and the times at which its friction changes."""

import base64
import json
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from cbp_jax import envs

OPTIMIZED = True  # small programs that run for a long time
SETTINGS = {"change_every": 3, "episode_length": 2, "random_reset": False}


def slides(env, frictions):
    """Return how far an ant that was pushed sideways slides in a second, in meters, at each of the frictions."""

    @jax.jit
    @jax.vmap
    def second_later(friction, q, qd):
        slippery = envs.with_friction(env, friction)
        step = lambda state, _: (slippery.pipeline_step(state, jnp.zeros(env.action_size)), None)
        state = jax.lax.scan(step, slippery.pipeline_init(q, qd), length=20)[0]
        return state.q, state.qd

    frictions = jnp.array(frictions)
    start = jnp.tile(env.sys.init_q, (len(frictions), 1)), jnp.zeros((len(frictions), env.sys.qd_size()))
    landed, speed = second_later(frictions, *start)
    after, _ = second_later(frictions, landed, speed.at[:, 1].add(3.0))  # m/s
    return after[:, 1] - landed[:, 1]


def built_with(friction, monkeypatch):
    """Make Brax's own ant from a model file with this friction, without code of this package."""
    pytest.importorskip("brax")
    from brax import envs as brax_envs
    from brax.io import mjcf

    def load(path):
        text = path.read_text()
        assert text.count('friction="1 0.5 0.5"') == 1, "the default of all its bodies"
        return mjcf.loads(text.replace('friction="1 0.5 0.5"', f'friction="{friction} 0.5 0.5"'))

    monkeypatch.setattr(mjcf, "load", load)
    return brax_envs.get_environment("ant", backend="spring")


@pytest.fixture(scope="module")
def ant():
    return envs.SlipperyAnt(**SETTINGS)


@pytest.fixture(scope="module")
def traces():
    return []


@pytest.fixture(scope="module")
def runs(ant, traces):
    """Take eight steps with two seeds, in two calls of one function, and return all states [seeds, steps]."""

    def go_on(state, schedule):
        traces.append(1)
        env = envs.SlipperyAnt(key=jax.random.wrap_key_data(schedule), **SETTINGS)

        def step(state, _):
            state = env.step(state, jnp.full(8, 0.5))
            return state, state

        return jax.lax.scan(step, state, length=4)

    start = lambda schedule: envs.SlipperyAnt(key=jax.random.wrap_key_data(schedule), **SETTINGS).reset(
        jax.random.key(5)
    )
    schedules = jax.random.key_data(jax.random.split(jax.random.key(7), 2))
    first = jax.jit(jax.vmap(start))(schedules)
    go_on = jax.jit(jax.vmap(go_on))
    state, early = go_on(first, schedules)
    _, late = go_on(state, schedules)
    frictions = jax.vmap(
        lambda s: jax.vmap(envs.SlipperyAnt(key=jax.random.wrap_key_data(s)).friction_of)(jnp.arange(3))
    )
    return first, jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), early, late), frictions(schedules)


@pytest.mark.slow
def test_a_pushed_ant_slides_as_far_as_friction_lets_it(ant):
    slid = slides(ant.env, [0.02, 0.3, 1.0])
    assert slid[0] > 2.5 and slid[2] < 1, slid
    # Coulomb: v t - mu g t^2 / 2, and v^2 / (2 mu g) where it comes to rest.
    np.testing.assert_allclose(slid, [2.90, 1.53, 0.46], atol=0.1)


@pytest.mark.slow
def test_friction_changes_with_the_first_episode_that_ends_late_enough(runs):
    first, states, frictions = runs
    # Episodes have two steps, so the first end of an episode after three steps is that of the second one.
    np.testing.assert_array_equal(states.done[0], [0, 1, 0, 1, 0, 1, 0, 1])
    for seed in range(2):
        np.testing.assert_allclose(first.info["friction"][seed], frictions[seed, 0], rtol=1e-6)
        expected = frictions[seed, jnp.array([0, 0, 0, 1, 1, 1, 1, 2])]
        np.testing.assert_allclose(states.info["friction"][seed], expected, rtol=1e-6)
    assert len(set(np.asarray(frictions).ravel().tolist())) == 6, "every seed and period has another friction"


@pytest.mark.slow
def test_changes_are_not_traced_again(runs, traces):
    assert len(traces) == 1


@pytest.mark.slow
def test_after_a_change_the_ant_moves_like_one_built_with_that_friction(runs, monkeypatch):
    _, states, frictions = runs
    # Step 4 is the first with the second friction, and the first of an episode. The seeds differ only in friction.
    before = jax.tree.map(lambda x: x[:, 3], states.pipeline_state)
    after = jax.tree.map(lambda x: x[:, 4], states.pipeline_state)
    np.testing.assert_array_equal(before.q[0], before.q[1])
    assert jnp.abs(after.qd[0] - after.qd[1]).max() > 1e-3, "friction matters to that step"
    ant = built_with(float(frictions[0, 1]), monkeypatch)
    built = jax.jit(ant.pipeline_step)(jax.tree.map(lambda x: x[0], before), jnp.full(8, 0.5))
    np.testing.assert_allclose(built.q, after.q[0], atol=1e-4)
    np.testing.assert_allclose(built.qd, after.qd[0], atol=1e-4)


def test_friction_can_be_set_by_hand(ant):
    shapes = jax.eval_shape(jax.vmap(ant.reset), jax.random.split(jax.random.key(0), 2))
    at = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # compiling the reset takes long
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    for friction, expected in ((0.5, [0.5, 0.5]), (jnp.array([0.1, 2.0]), [0.1, 2.0])):
        changed = envs.set_friction(at, friction)
        np.testing.assert_allclose(changed.info["friction"], expected, rtol=1e-6)
        assert jax.tree.map(kind, changed) == jax.tree.map(kind, at), "the compiled program is used again"
    for wrong in (-1, jnp.nan, jnp.array([1.0, jnp.inf])):
        with pytest.raises(ValueError, match=r"friction must be in \[0, inf\), got"):
            envs.set_friction(at, wrong)
    with pytest.raises(ValueError, match=r"friction must be a number or of shape \(2,\), got shape \(3,\)"):
        envs.set_friction(at, jnp.ones(3))


def test_frictions_are_log_uniform_and_depend_only_on_the_key():
    friction_of = jax.jit(jax.vmap(envs.SlipperyAnt(key=3).friction_of))
    frictions = np.log(friction_of(jnp.arange(4000)))
    low, high = np.log([0.02, 2.0])
    assert low <= frictions.min() and frictions.max() <= high
    counts, _ = np.histogram(frictions, bins=8, range=(low, high))
    assert (abs(counts - 500) < 5 * np.sqrt(500)).all(), counts
    np.testing.assert_array_equal(frictions, np.log(jax.vmap(envs.SlipperyAnt(key=3).friction_of)(jnp.arange(4000))))
    assert envs.SlipperyAnt(key=4).friction_of(0) != envs.SlipperyAnt(key=3).friction_of(0)
    assert envs.SlipperyAnt(friction=0.7, key=4).friction_of(5) == jnp.float32(0.7)


def test_given_frictions_are_used_in_turn_and_repeated():
    env = envs.SlipperyAnt(frictions=(0.1, 2.0, 0.5))
    found = jax.vmap(env.friction_of)(jnp.arange(7))
    np.testing.assert_array_equal(found, np.float32([0.1, 2.0, 0.5, 0.1, 2.0, 0.5, 0.1]))
    assert env.friction_of(4) == jnp.float32(2.0)


@struct.dataclass
class State:
    pipeline_state: jax.Array
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict[str, jax.Array]
    info: dict[str, Any] = struct.field(default_factory=dict)


@struct.dataclass
class Bodies:
    """The part of Brax's systems that friction needs."""

    geom_friction: jax.Array

    def tree_replace(self, changed):
        return self.replace(**changed)


class Slider:
    """Falls after as many steps as its first observation says, 4 to 6. The reward is the current friction."""

    observation_size = action_size = 1

    def __init__(self):
        self.sys = Bodies(jnp.ones((2, 3)))

    def reset(self, key):
        left, zero = jax.random.randint(key, (1,), 4, 7).astype(jnp.float32), jnp.zeros([])
        return State(left, left, zero, zero, {})

    def step(self, state, action):
        left = state.pipeline_state - 1
        done = jnp.where(left[0] <= 0, 1.0, 0.0)
        return state.replace(pipeline_state=left, obs=left, reward=self.sys.geom_friction[0, 0], done=done)


@pytest.mark.parametrize("terminal", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("common_clock", [True, False])
def test_a_common_clock_changes_friction_in_all_environments_after_the_same_step(monkeypatch, common_clock, terminal):
    monkeypatch.setattr(envs.walker, "make_brax_env", lambda *_: Slider())
    frictions, every, steps = (0.25, 2.0, 0.5), 8, 30
    env = envs.Slippery(
        frictions=frictions, common_clock=common_clock, change_every=every, time_limit_is_terminal=terminal
    )

    def go(key):
        step = lambda state, _: (env.step(state, jnp.zeros(1)),) * 2
        return jax.lax.scan(step, env.reset(key), length=steps)[1]

    states = jax.jit(jax.vmap(go))(jax.random.split(jax.random.key(1), 6))  # [6, 30]
    rewards, dones, info = jax.tree.map(np.asarray, (states.reward, states.done, states.info))
    period, interrupted, truncation = (info[name] for name in ("period", "interrupted", "truncation"))
    assert len({tuple(row) for row in dones}) > 1, "they fall at different times"
    np.testing.assert_array_equal(rewards[:, 1:], np.float32(frictions)[period[:, :-1] % 3])
    changes = np.diff(np.pad(period, ((0, 0), (1, 0)))) > 0
    assert (dones[changes] == 1).all()
    if not common_clock:
        assert (changes != changes[:1]).any() and not interrupted.any() and not truncation.any()
        return
    due = np.arange(1, steps + 1) % every == 0
    np.testing.assert_array_equal(changes, np.tile(due, (6, 1)))
    expected = np.float32(frictions)[np.arange(steps) // every % 3]
    np.testing.assert_array_equal(rewards, np.tile(expected, (6, 1)))
    # Environments that fell in this very step were not interrupted; the others are truncated, as by a time limit.
    fell = info["final_obs"][..., 0] == 0
    np.testing.assert_array_equal(interrupted, due & ~fell)
    np.testing.assert_array_equal(truncation, interrupted * (not terminal))
    np.testing.assert_array_equal(dones, due | fell)
    assert fell[:, due].any() and interrupted.any()


def test_actions_are_clipped_on_request():
    action = jnp.array([-3.0, 0.5, 2.0])
    assert envs.SlipperyAnt(clip_actions=True).clipped(action).tolist() == [-1.0, 0.5, 1.0]
    assert envs.SlipperyAnt().clipped(action).tolist() == action.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": "antelope"}, r"env must be one of .*'ant'.*, got 'antelope'"),
        ({"env": "fast"}, r"env must be an environment with bodies on a ground, got 'fast'"),
        ({"env": "swimmer"}, r"env must be one that Brax has with backend 'spring', got 'swimmer'"),
        ({"backend": "positional"}, r"backend must be one of \('spring', 'mjx'\), got 'positional': its gaits"),
        ({"backend": "generalized"}, r"got 'generalized': with its few solver iterations"),
        ({"backend": "bullet"}, r"got 'bullet'$"),
        ({"friction": -1.0}, r"friction must be in \[0, inf\), got -1.0"),
        ({"friction_range": (2.0, 0.02)}, r"friction_range must be two positive numbers in ascending order, got \(2.0"),
        ({"friction": 1.0, "frictions": (0.1, 0.2)}, r"frictions must be empty, got \(0.1, 0.2\)"),
        ({"frictions": (0.1, -0.2)}, r"frictions must be in \[0, inf\), got -0.2"),
        ({"change_every": 0}, r"change_every must be at least 1, got 0"),
        ({"episode_length": 0}, r"episode_length must be at least 1, got 0"),
        ({"key": 0.5}, r"key must be an int seed or a jax key"),
    ],
)
def test_unsupported_settings_are_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        envs.Slippery(**settings)


def test_without_brax_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "brax.envs", None)
    with pytest.raises(ImportError, match=r'pip install "cbp-jax\[rl\]"'):
        envs.SlipperyAnt()


@pytest.mark.slow
def test_the_ant_slides_as_far_with_mjx():
    env = envs.SlipperyAnt(backend="mjx").env
    slid = slides(env, [0.02, 0.3, 1.0])
    np.testing.assert_allclose(slid, [2.90, 1.53, 0.46], atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halfcheetah", "hopper", "walker2d", "humanoid"])
def test_other_walkers_walk_on_slippery_ground(name):
    env = envs.Slippery(name, change_every=1, episode_length=2)

    def step(state, _):
        state = env.step(state, jnp.zeros(env.action_size))
        return state, (state.info["friction"], state.obs)

    frictions, obs = jax.jit(lambda key: jax.lax.scan(step, env.reset(key), length=4)[1])(jax.random.key(0))
    assert obs.shape == (4, env.observation_size) and jnp.isfinite(obs).all()
    assert frictions[0] != frictions[1] == frictions[2] != frictions[3]


@pytest.mark.slow
def test_an_episode_is_rendered_as_a_page(tmp_path):
    env = envs.SlipperyAnt(friction=1.0, episode_length=5)
    poses, total = envs.episode(env, lambda obs: jnp.zeros(8), jax.random.key(0))
    assert poses.q.shape == (5, env.env.sys.q_size()) and 4 < total < 7  # the healthy reward is 1 per step
    page = envs.save_html(env, poses, tmp_path / "ant.html").read_text()
    (packed,) = re.findall(r'var system = "(.+)";', page)
    shown = json.loads(zlib.decompress(base64.b64decode(packed)))
    np.testing.assert_allclose([state["pos"] for state in shown["states"]["x"]], poses.x.pos, atol=1e-3)
    assert shown["opt"]["timestep"] == pytest.approx(0.05), "the page plays in real time"
