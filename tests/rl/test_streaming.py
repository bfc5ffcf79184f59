"""Streaming agents: each step against an explicit reference, and learning on a cart-pole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import cbp_jax
from cbp_jax import envs, nets
from cbp_jax.rl import streaming

GAMMA, LAMBDA = 0.9, 0.7


@struct.dataclass
class State:
    pipeline_state: jax.Array
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict[str, jax.Array]
    info: dict[str, Any] = struct.field(default_factory=dict)


class Line:
    """Action 1 moves a step to the right, 0 to the left, any other number by its value. Falls beyond 2.5.

    The reward is the new position.
    """

    observation_size = 1

    def __init__(self, action_size=2):
        self.action_size = action_size

    def reset(self, key):
        at, zero = jax.random.uniform(key, (1,)), jnp.zeros([])
        return State(at, at, zero, zero, {})

    def step(self, state, action):
        move = jnp.where(action == 1, 1.0, -1.0) if self.action_size == 2 else action[0]
        at = state.pipeline_state + move
        done = jnp.where(jnp.abs(at[0]) > 2.5, 1.0, 0.0)
        return state.replace(pipeline_state=at, obs=at, reward=at[0], done=done)


def follow(init, step, steps, seed=0):
    """Return the states before and after each step, [1 + steps], and metrics."""

    @jax.jit
    def run(key):
        def one(state, _):
            state, metrics = step(state)
            return state, (state, metrics)

        first = init(key)
        states, metrics = jax.lax.scan(one, first, length=steps)[1]
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, states), metrics

    return jax.tree.map(np.asarray, run(jax.random.key(seed)))


def leaves(params):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def at(tree, t):
    return jax.tree.map(lambda x: jnp.asarray(x[t]), tree)


@pytest.mark.parametrize("terminal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stream_q_is_td_lambda_of_the_best_action(terminal):
    env = envs.Episodes(Line(), episode_length=6, time_limit_is_terminal=terminal)
    net = nets.MLP((4,), 2, "tanh")
    tx = lambda units: optax.chain(cbp_jax.eligibility_traces(GAMMA, LAMBDA), optax.sgd(0.05))
    init, step = streaming.make_q(env, net, tx, streaming.Exploration(0.5, 0.5), discount=GAMMA)
    states, metrics = follow(init, step, 40)
    q = lambda params, obs, action: net.apply(params, obs[None])[0, action]
    value_and_grad, q = jax.jit(jax.value_and_grad(q)), jax.jit(q)
    traces, cuts, truncated = None, 0, 0
    for t in range(40):
        params, before, after = at(states.params, t), at(states.env_state, t), at(states.env_state, t + 1)
        np.testing.assert_array_equal(metrics["obs"][t], before.obs)
        action = int(after.info["final_obs"][0] > before.obs[0])
        value, grads = value_and_grad(params, before.obs, action)
        led_to = max(float(q(params, after.info["final_obs"], a)) for a in (0, 1))
        goes_on = 1 - float(after.info["ended"]) if not terminal else 1 - float(after.done)
        td_error = float(after.reward) + GAMMA * goes_on * led_to - float(value)
        assert metrics["td_error"][t] == pytest.approx(td_error, rel=1e-3, abs=1e-4)
        grads = leaves(grads)
        traces = {k: g + (GAMMA * LAMBDA * traces[k] if traces else 0) for k, g in grads.items()}
        new = leaves(at(states.params, t + 1))
        for name, w in leaves(params).items():
            np.testing.assert_allclose(new[name], w + 0.05 * td_error * traces[name], rtol=1e-3, atol=1e-4)
        random = q(params, before.obs, action) < q(params, before.obs, 1 - action)
        traces = None if random or after.done else traces
        cuts, truncated = cuts + int(random), truncated + int(after.info["episode_length"] == 6)
    info, done = states.env_state.info, states.env_state.done[1:]
    for name in ("return", "length"):
        np.testing.assert_array_equal(metrics[f"{name}_sum"], done * info[f"episode_{name}"][1:])
    assert metrics["episodes"].sum() == done.sum() > 3 and cuts > 3 and truncated and info["ended"].sum() > 1


@pytest.mark.parametrize("state_std", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_stream_ac_follows_value_policy_and_entropy(state_std):
    env = envs.Episodes(Line(1), episode_length=6)
    net = nets.ActorCritic(1, (4,), "tanh", state_std=state_std, normalization="bare_layer")
    tx = streaming.obgd_of_actor_and_critic(discount=GAMMA, trace_decay=LAMBDA)
    init, step = streaming.make_actor_critic(env, net, tx, discount=GAMMA, entropy_coefficient=0.3)
    states, metrics = follow(init, step, 25, seed=1)

    @jax.jit
    def parts(params, obs, action):
        def policy(params):
            mean, log_std, _ = net.apply(params, obs[None])
            std = jnp.exp(log_std).reshape(())
            log_prob = -0.5 * ((action - mean[0, 0]) / std) ** 2 - jnp.log(std * jnp.sqrt(2 * jnp.pi))
            return log_prob, 0.5 + 0.5 * jnp.log(2 * jnp.pi * std**2)

        value = jax.value_and_grad(lambda params: net.apply(params, obs[None])[2][0])(params)
        return value, jax.grad(lambda p: policy(p)[0])(params), jax.grad(lambda p: policy(p)[1])(params)

    traces, signs = None, set()
    for t in range(25):
        params, before, after = at(states.params, t), at(states.env_state, t), at(states.env_state, t + 1)
        action = after.info["final_obs"][0] - before.obs[0]
        (value, of_value), of_policy, of_entropy = parts(params, before.obs, action)
        led_to = parts(params, after.info["final_obs"], action)[0][0]
        td_error = float(after.reward + GAMMA * (1 - after.info["ended"]) * led_to - value)
        assert metrics["td_error"][t] == pytest.approx(td_error, rel=1e-3, abs=1e-4)
        signs.add(td_error > 0)
        weight = 0.3 * np.sign(td_error)
        weighted = jax.tree.map(lambda e, weight=weight: weight * e, of_entropy)
        total = jax.tree.map(lambda *parts: sum(parts), of_value, of_policy, weighted)
        traces = {k: g + (GAMMA * LAMBDA * traces[k] if traces else 0) for k, g in leaves(total).items()}
        norms = {key: sum(abs(z).sum() for k, z in traces.items() if key in k) for key in ("actor", "critic")}
        new = leaves(at(states.params, t + 1))
        for name, w in leaves(params).items():
            kappa, norm = (3, norms["actor"]) if "actor" in name else (2, norms["critic"])
            rate = 1 / max(1, kappa * norm * max(1, abs(td_error)))
            np.testing.assert_allclose(new[name], w + rate * td_error * traces[name], rtol=2e-3, atol=2e-4)
        traces = None if after.done else traces
    assert signs == {True, False} and metrics["episodes"].sum() > 1


def cart_pole(**settings):
    env = envs.ChangingCartPole(**{"change_every": 10**9, "key": 0, **settings})
    return envs.Normalized(env, bound=np.inf, unbiased=True)


NET = nets.MLP((32,), 2, "leaky_relu", kernel_init=nets.sparse(), normalization="bare_layer")


@pytest.mark.slow
def test_a_row_of_seeds_equals_the_solo_run_and_counts_episodes():
    cbp = lambda units: cbp_jax.continual_backprop(cbp_jax.obgd(), units, replacement_rate=0.01, maturity_threshold=10)
    init, step = streaming.make_q(cart_pole(), NET, cbp)
    run = lambda key: jax.lax.scan(lambda state, _: step(state), init(key), length=200)
    rows = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2))
    state, found = jax.jit(run)(jax.random.split(jax.random.key(0), 2)[1])
    for name in found:
        np.testing.assert_allclose(rows[1][name][1], found[name], rtol=1e-3, atol=1e-3, err_msg=name)
    assert state.steps == 200 and found["replaced_units"].sum() > 10
    ended = found["episodes"] > 0
    np.testing.assert_array_equal(found["return_sum"], found["length_sum"])  # every step of a cart-pole has reward 1
    assert ended.sum() > 3 and (found["length_sum"][~ended] == 0).all()
    lengths = np.diff(np.nonzero(ended)[0], prepend=-1)
    np.testing.assert_array_equal(found["length_sum"][ended], lengths)


@pytest.mark.slow
def test_stream_q_learns_to_balance():
    exploration = streaming.Exploration(1.0, 0.01, steps=5000)
    init, step = streaming.make_q(cart_pole(), NET, lambda units: cbp_jax.obgd(), exploration)
    run = lambda key: jax.lax.scan(lambda state, _: step(state), init(key), length=60_000)[1]
    found = jax.jit(run)(jax.random.key(0))
    mean = lambda part: found["return_sum"][part].sum() / found["episodes"][part].sum()
    assert mean(slice(0, 5000)) < 60 and mean(slice(-20_000, None)) > 150


class Pushed(envs.CartPole):
    """A cart-pole whose action is a force in ±1."""

    action_size = 1

    def step(self, state, action):
        physics = state.info["physics"]
        hard = physics._replace(force=10 * jnp.clip(action[0], -1, 1))
        state = super().step(state.replace(info=state.info | {"physics": hard}), jnp.int32(1))
        return state.replace(info=state.info | {"physics": physics})


@pytest.mark.slow
def test_stream_ac_learns_to_balance():
    env = envs.Normalized(envs.Episodes(Pushed(), 500), bound=np.inf, unbiased=True)
    net = nets.ActorCritic(1, (32,), "leaky_relu", nets.sparse(), normalization="bare_layer", state_std=True)
    init, step = streaming.make_actor_critic(env, net)
    run = lambda key: jax.lax.scan(lambda state, _: step(state), init(key), length=100_000)[1]
    found = jax.jit(run)(jax.random.key(0))
    mean = lambda part: found["return_sum"][part].sum() / found["episodes"][part].sum()
    assert mean(slice(0, 2000)) < 60 and mean(slice(-20_000, None)) > 150


@pytest.mark.slow
def test_stream_ac_on_a_walker():
    """Take a few steps in Brax, with continual backpropagation around the optimizer."""
    env = envs.Normalized(envs.Walker("ant", clip_actions=True, episode_length=20), bound=np.inf, unbiased=True)
    net = nets.ActorCritic(8, (16,), "leaky_relu", nets.sparse(), normalization="bare_layer", state_std=True)
    tx = lambda units: cbp_jax.continual_backprop(
        streaming.obgd_of_actor_and_critic()(units), units, replacement_rate=0.01, maturity_threshold=5
    )
    init, step = streaming.make_actor_critic(env, net, tx)
    found = jax.jit(lambda key: jax.lax.scan(lambda s, _: step(s), init(key), length=100)[1])(jax.random.key(0))
    assert all(np.isfinite(value).all() for value in found.values())
    assert found["episodes"].sum() >= 5 and found["replaced_units"].sum() > 0


def test_exploration_falls_and_stays():
    found = streaming.Exploration(0.9, 0.1, steps=4).at(jnp.arange(7))
    np.testing.assert_allclose(found, [0.9, 0.7, 0.5, 0.3, 0.1, 0.1, 0.1], rtol=1e-6)


def test_mismatched_arguments_are_refused():
    tx = lambda units: cbp_jax.obgd()
    with pytest.raises(ValueError, match=r"network must give a value for each of 2 actions"):
        streaming.make_q(cart_pole(), nets.MLP((3,), 5), tx)
    with pytest.raises(ValueError, match=r"network must give means and log_stds of 2 actions.*got \[\(1, 3\)"):
        streaming.make_actor_critic(cart_pole(), nets.ActorCritic(3, (4,)), tx)
    with pytest.raises(ValueError, match=r"discount must be in \[0, 1\], got 2"):
        streaming.make_q(cart_pole(), NET, tx, discount=2.0)
    with pytest.raises(ValueError, match="entropy_coefficient must be in"):
        streaming.make_actor_critic(cart_pole(), nets.ActorCritic(2, (4,)), tx, entropy_coefficient=-1.0)
    with pytest.raises(ValueError, match=r"env must have .*truncation.* as cbp_jax.envs.Episodes"):
        streaming.make_q(envs.CartPole(), NET, tx)[0](jax.random.key(0))
    for settings in ({"start": 1.5}, {"end": -1.0}, {"steps": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            streaming.Exploration(**settings)
