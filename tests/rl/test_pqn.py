"""PQN: an update against a reference that is spelled out, exploration, and what it learns on a cart-pole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import envs, nets
from cbp_jax.rl import pqn
from cbp_jax.rl.streaming import Exploration

GAMMA, LAMBDA, STEP = 0.9, 0.6, 0.1
NET = nets.MLP((5,), 2, "tanh")
SMALL = pqn.Settings(num_envs=3, rollout_length=12, epochs=1, minibatches=1, discount=GAMMA, trace_decay=LAMBDA)
GREEDY = Exploration(0.0, 0.0)


def cart_pole(**settings):
    return envs.ChangingCartPole(episode_length=7, force_range=(40.0, 40.0), **settings)


def agent(env, exploration=GREEDY, settings=SMALL, tx=lambda units: optax.sgd(STEP)):
    init, update = pqn.make(env, NET, tx, settings, exploration)
    return jax.jit(init), jax.jit(update)


def returns_of(env, params, state):
    """What greedy actions lead to, and their lambda-returns, by loops over environments and steps."""
    step = jax.jit(env.step)
    values = jax.jit(lambda obs: NET.apply(params, obs))
    examples, episodes = [], []
    for i in range(SMALL.num_envs):
        at, passed = jax.tree.map(lambda x, i=i: x[i], state), []
        for _ in range(SMALL.rollout_length):
            action = int(np.argmax(values(at.obs)))
            after = step(at, action)
            best = float(np.max(values(after.info["final_obs"])))
            done, cut = bool(after.done), bool(after.info["truncation"])
            passed.append((at.obs, action, float(after.reward), 0.0 if done and not cut else best, done))
            if done:
                episodes.append((float(after.info["episode_return"]), float(after.info["episode_length"])))
            at = after
        following = None
        for obs, action, reward, best, done in reversed(passed):
            last = following is None or done
            following = reward + GAMMA * (best if last else (1 - LAMBDA) * best + LAMBDA * following)
            examples.append((obs, action, following))
    return examples, episodes


@pytest.mark.parametrize("terminal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_update_fits_lambda_returns_of_greedy_actions(terminal):
    env = cart_pole(time_limit_is_terminal=terminal)
    init, update = agent(env)
    state = init(jax.random.key(1))
    for _ in range(2):
        examples, episodes = returns_of(env, state.params, state.env_state)
        obs, actions, targets = (np.stack(each) for each in zip(*examples, strict=True))

        def loss(params, obs=obs, actions=actions, targets=targets):
            chosen = NET.apply(params, obs)[np.arange(len(actions)), actions]
            return 0.5 * jnp.mean((chosen - targets) ** 2)

        error, grads = jax.jit(jax.value_and_grad(loss))(state.params)
        assert optax.tree.norm(grads) < SMALL.max_grad_norm
        expected = jax.tree.map(lambda w, g: w - STEP * g, state.params, grads)
        state, metrics = update(state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.params, expected)
        np.testing.assert_allclose(metrics["td_error"], 2 * error, rtol=1e-4)
        found = [float(metrics[name]) for name in ("episodes", "return_sum", "length_sum")]
        assert len(episodes) > 2
        np.testing.assert_allclose(found, [len(episodes), *np.sum(episodes, 0)], rtol=1e-5)


@pytest.mark.slow
def test_gradients_are_clipped():
    env, key = cart_pole(), jax.random.key(0)
    clipped = pqn.Settings(**{**vars(SMALL), "max_grad_norm": 0.01})
    init, update = agent(env, settings=clipped, tx=lambda units: optax.sgd(1.0))
    state = init(key)
    moved = jax.tree.map(jnp.subtract, update(state)[0].params, state.params)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.01, rtol=1e-4)


def test_actions_are_greedy_but_for_the_fraction_of_exploration():
    env = envs.ChangingCartPole(force_range=(1.0, 1.0))  # pushes so weak that no episode ends within the rollout
    settings = pqn.Settings(num_envs=100, rollout_length=12, epochs=1, minibatches=1)
    init, update = agent(env, Exploration(0.4, 0.4), settings)
    state = init(jax.random.key(0))
    state.params["params"]["Dense_1"]["bias"] = jnp.array([0.0, 100.0])  # to the right
    state, metrics = update(state)
    assert metrics["episodes"] == 0
    pushed_left = np.diff(state.obs[..., 1], axis=0) < 0
    assert abs(pushed_left.mean() - 0.4 / 2) < 4 * (0.2 * 0.8 / pushed_left.size) ** 0.5


@pytest.mark.slow
def test_exploration_decreases_and_seeds_do_not_depend_on_each_other():
    env = cart_pole(key=5)
    exploration = Exploration(1.0, 0.0, steps=2 * SMALL.steps)
    init, update = pqn.make(env, NET, lambda units: optax.sgd(STEP), SMALL, exploration)

    def run(key):
        return jax.lax.scan(lambda state, _: update(state), init(key), length=4)

    keys = jax.random.split(jax.random.key(0), 3)
    states, metrics = jax.jit(jax.vmap(run))(keys)
    np.testing.assert_allclose(metrics["exploration"], [[1, 0.5, 0, 0]] * 3)
    alone, found = jax.jit(run)(keys[1])
    np.testing.assert_allclose(found["td_error"], metrics["td_error"][1], rtol=1e-4)
    np.testing.assert_allclose(alone.obs, states.obs[1], rtol=1e-4, atol=1e-5)
    assert len(np.unique(metrics["td_error"][:, -1])) == 3


@pytest.mark.slow
def test_units_are_replaced():
    env, key = cart_pole(), jax.random.key(0)
    often = lambda units: cbp_jax.continual_backprop(optax.sgd(STEP), units, replacement_rate=0.5, maturity_threshold=1)
    settings = pqn.Settings(**{**vars(SMALL), "epochs": 2, "minibatches": 3})
    init, update = agent(env, settings=settings, tx=often)
    assert 4 <= update(init(key))[1]["replaced_units"] <= 12


@pytest.mark.slow
def test_it_learns_to_balance_a_pole():
    env = envs.Normalized(envs.ChangingCartPole(force_range=(10.0, 10.0)), unbiased=True)
    net = nets.MLP((64,), 2, normalization="layer")
    settings = pqn.Settings(num_envs=16, rollout_length=32, epochs=4, minibatches=4, trace_decay=0.9)
    tx = lambda units: cbp_jax.adam(1e-3)
    init, update = pqn.make(env, net, tx, settings, Exploration(1.0, 0.02, steps=20_000))
    run = lambda key: jax.lax.scan(lambda state, _: update(state), init(key), length=300)
    found = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 3))[1]
    mean = lambda when: found["return_sum"][:, when].sum(1) / found["episodes"][:, when].sum(1)
    assert (mean(slice(0, 10)) < 40).all() and (mean(slice(-50, None)) > 80).all(), mean(slice(-50, None))


def test_what_is_out_of_range_is_refused():
    for settings, match in (
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"minibatches": 7}, "minibatches must divide the 128 x 32 = 4096 steps of a rollout, got 7"),
        ({"trace_decay": 1.5}, "trace_decay"),
        ({"discount": -0.1}, "discount"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ):
        with pytest.raises(ValueError, match=match):
            pqn.Settings(**settings)
    with pytest.raises(ValueError, match=r"network must give a value for each of 2 actions, got .*3"):
        pqn.make(cart_pole(), nets.MLP((4,), 3), lambda units: optax.sgd(STEP))
    bare = pqn.make(envs.CartPole(), NET, lambda units: optax.sgd(STEP))[0]
    with pytest.raises(ValueError, match=r"env must have \['truncation'"):
        bare(jax.random.key(0))
