"""PPO on environments with known solutions, and its guarantees about optimizers, seeds and settings."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import cbp_jax
from cbp_jax import nets
from cbp_jax.rl import ppo

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_any_transformation_trains_an_agent_without_being_traced_again": ("redo", "upgd"),
    "test_the_network_or_its_head_is_reset_with_each_period": ("none", "network"),
}

PROBES = ("constant_terminated", "constant_truncated", "two_steps", "observation", "action", "cut_elsewhere")
SETTINGS = ppo.Settings(num_envs=8, rollout_length=16, epochs=4, minibatches=4, discount=0.8)


@struct.dataclass
class State:
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    info: dict[str, Any]
    metrics: dict[str, jax.Array]


class Probe:
    """Six environments, chosen by a number that may be traced. The reward of a step is at most 1.

    0: one step with reward 1, then termination. 1: the same, with truncation. 2: two steps, the second with reward 1;
    the observation says which step it is. 3: one step; the reward is the observation, 1 or -1. 4: one step; the reward
    is the larger, the closer the action is to half the observation. 5: one step, from 1 to -1 with reward 1 or from -1
    to 1 with reward 0, then truncation.
    """

    observation_size = 1
    action_size = 1

    def __init__(self, probe):
        self.probe = probe

    def reset(self, key):
        key, obs = self._first(key)
        zero = jnp.zeros([])
        info = {"truncation": zero, "final_obs": obs, "episode_return": zero, "episode_length": zero}
        info |= {"key": jax.random.key_data(key)}
        return State(obs, zero, zero, info, {"speed": zero})

    def _first(self, key):
        key, sign = jax.random.split(key)
        either = jnp.where(jax.random.bernoulli(sign), 1.0, -1.0)
        return key, jnp.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])[self.probe] * either[None]

    def step(self, state, action):
        obs = state.obs[0]
        second = obs == 1
        one_of = jnp.where(second, 1.0, 0.0)
        rewards = [1.0, 1.0, one_of, obs, -jnp.square(action[0] - obs / 2), one_of]
        done = jnp.where((self.probe == 2) & ~second, 0.0, 1.0)
        key, fresh = self._first(jax.random.wrap_key_data(state.info["key"]))
        final = jnp.where(self.probe == 2, 1.0, jnp.where(self.probe == 5, -state.obs, state.obs))
        reward = jnp.stack([jnp.asarray(reward, jnp.float32) for reward in rewards])[self.probe]
        began = state.done > 0
        info = {
            "truncation": jnp.where((self.probe == 1) | (self.probe == 5), 1.0, 0.0),
            "final_obs": final,
            "episode_return": jnp.where(began, 0.0, state.info["episode_return"]) + reward,
            "episode_length": jnp.where(began, 0.0, state.info["episode_length"]) + 1,
            "key": jax.random.key_data(key),
        }
        return State(jnp.where(done > 0, fresh, final), reward, done, info, {"speed": action[0]})


NETWORK = nets.ActorCritic(action_size=1, hidden=(16, 16), activation="tanh", initial_log_std=-0.5)


@pytest.fixture(scope="module")
def probed():
    """Train an agent on each probe, in one program; return states, and metrics [updates]."""
    optimizer = lambda units: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    train = lambda probe, key: ppo.train(Probe(probe), NETWORK, optimizer, SETTINGS, updates=60)(key)
    keys = jax.random.split(jax.random.key(0), len(PROBES))
    states, metrics = jax.jit(jax.vmap(train))(jnp.arange(len(PROBES)), keys)
    row = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    return {name: (row(states, i), row(metrics, i)) for i, name in enumerate(PROBES)}


def outputs(state, obs):
    mean, _, value = NETWORK.apply(state.params, jnp.array([[obs]]))
    return float(mean[0, 0]), float(value[0])


@pytest.mark.slow
def test_the_value_of_a_constant_reward(probed):
    assert outputs(probed["constant_terminated"][0], 0.0)[1] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_values_bootstrap_at_a_truncation(probed):
    # V = 1 + 0.8 V
    assert outputs(probed["constant_truncated"][0], 0.0)[1] == pytest.approx(5, abs=0.3)


def test_values_bootstrap_from_the_final_observation_of_a_truncated_episode(probed):
    # V(1) = 1 + 0.8 V(-1) and V(-1) = 0.8 V(1). Bootstrapping from the next episode's start would give 3 and 2.
    state, _ = probed["cut_elsewhere"]
    assert outputs(state, 1.0)[1] == pytest.approx(1 / 0.36, abs=0.12)
    assert outputs(state, -1.0)[1] == pytest.approx(0.8 / 0.36, abs=0.12)


def test_a_later_reward_is_discounted(probed):
    state, _ = probed["two_steps"]
    assert outputs(state, 0.0)[1] == pytest.approx(0.8, abs=0.05)
    assert outputs(state, 1.0)[1] == pytest.approx(1, abs=0.05)


def test_the_value_depends_on_the_observation(probed):
    state, metrics = probed["observation"]
    assert outputs(state, 1.0)[1] == pytest.approx(1, abs=0.1)
    assert outputs(state, -1.0)[1] == pytest.approx(-1, abs=0.1)
    assert metrics["explained_variance"][-1] > 0.95 > metrics["explained_variance"][0]


def test_actions_follow_the_reward(probed):
    state, metrics = probed["action"]
    assert outputs(state, 1.0)[0] == pytest.approx(0.5, abs=0.15)
    assert outputs(state, -1.0)[0] == pytest.approx(-0.5, abs=0.15)
    assert metrics["entropy"][-1] < metrics["entropy"][0] - 0.5


def test_metrics_count_the_episodes(probed):
    steps = SETTINGS.steps
    _, two = probed["two_steps"]
    np.testing.assert_array_equal(two["episodes"], steps / 2)
    np.testing.assert_array_equal(two["length_sum"], steps)
    np.testing.assert_array_equal(two["return_sum"], steps / 2)
    _, one = probed["constant_terminated"]
    np.testing.assert_array_equal(one["return_sum"], steps)
    assert jnp.abs(one["speed"]).max() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_a_row_of_seeds_and_settings_equals_the_solo_run():
    def train(key, step_size, clip, discount):
        settings = ppo.Settings(4, 4, 1, 2, discount=discount, clip=clip)
        optimizer = lambda units: cbp_jax.continual_backprop(
            cbp_jax.adam(step_size), units, replacement_rate=0.05, maturity_threshold=1
        )
        return ppo.train(Probe(4), NETWORK, optimizer, settings, updates=2)(key)

    rows = (jax.random.split(jax.random.key(1), 3), *jnp.array([[0.01, 0.02, 0.01], [0.2, 0.1, 0.3], [0.9, 0.5, 0.8]]))
    together = jax.jit(jax.vmap(train))(*rows)
    alone = jax.jit(train)
    for i in range(3):
        solo = alone(*(row[i] for row in rows))
        for a, b in zip(jax.tree.leaves(solo), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=2e-4, atol=1e-5)
    assert (together[1]["replaced_units"].sum(1) > 0).all()
    kernels = together[0].params["params"]["actor_0"]["kernel"]
    assert jnp.abs(kernels[0] - kernels[1]).max() > 1e-3


OPTIMIZERS = {
    "continual_backprop": lambda units: cbp_jax.continual_backprop(
        cbp_jax.adam(1e-3), units, replacement_rate=0.05, maturity_threshold=2
    ),
    "redo": lambda units: cbp_jax.redo(cbp_jax.adam(1e-3), units, threshold=0.5, every=2),
    "shrink_and_perturb": lambda units: cbp_jax.shrink_and_perturb(optax.adam(1e-3), 1e-4, 1e-3, key=0),
    "upgd": lambda units: cbp_jax.upgd(1e-2),
    "adaptive_upgd": lambda units: cbp_jax.adaptive_upgd(1e-3),
}
REPLACING = ("continual_backprop", "redo")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("shrink_and_perturb", "adaptive_upgd") else [])
        for name in OPTIMIZERS
    ],
)
def test_any_transformation_trains_an_agent_without_being_traced_again(name):
    seen, traces = [], []

    def optimizer(units):
        assert [group.name for group in units] == [
            f"params/{part}_{layer}" for part in ("actor", "critic") for layer in (0, 1)
        ]
        tx = optax.with_extra_args_support(OPTIMIZERS[name](units))

        def update(grads, state, params, features):
            seen.append({group: values.shape for group, values in features.items()})
            return tx.update(grads, state, params, features=features)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    init, update = ppo.make(Probe(4), NETWORK, optimizer, ppo.Settings(4, 8, 2, 2))

    @jax.jit
    def go_on(state):
        traces.append(1)
        return jax.lax.scan(lambda state, _: update(state), state, length=2)

    state = jax.jit(init)(jax.random.key(0))
    first = state.params
    for _ in range(2):
        state, metrics = go_on(state)
    assert len(traces) == 1
    assert set(seen[0].values()) == {(16, 16)}, "minibatches have 16 examples, features 16 units"
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), first, state.params)
    assert all(jax.tree.leaves(changed)) and all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))
    replaced = float(metrics["replaced_units"].sum())
    assert replaced > 0 if name in REPLACING else replaced == 0


class Drawn(Probe):
    """Episodes of one step, each with another observation."""

    def _first(self, key):
        key, draw = jax.random.split(key)
        return key, jax.random.normal(draw, (1,))


@pytest.mark.slow
def test_an_epoch_learns_from_each_step_once_in_an_order_of_its_own():
    settings = ppo.Settings(num_envs=4, rollout_length=8, epochs=2, minibatches=4)

    def recorder(units):
        init = lambda params: (jnp.zeros([], jnp.int32), jnp.zeros((8, 8, 16)))

        def update(grads, state, params, features):
            number, seen = state
            seen = seen.at[number].set(features["params/actor_0"])
            return jax.tree.map(jnp.zeros_like, grads), (number + 1, seen)

        return optax.GradientTransformationExtraArgs(init, update)

    init, update = ppo.make(Drawn(0), NETWORK, recorder, settings)
    state, _ = jax.jit(lambda key: update(init(key)))(jax.random.key(0))
    layer = state.params["params"]["actor_0"]
    expected = jnp.tanh(state.obs.reshape(32, 1) @ layer["kernel"] + layer["bias"])
    distances = np.abs(state.opt_state[1].reshape(2, 32, 1, 16) - expected).max(-1)
    orders = distances.argmin(-1)  # [epochs, 32], the step of each example
    assert distances.min(-1).max() < 1e-5, "features are those of the minibatch"
    np.testing.assert_array_equal(np.sort(orders), [np.arange(32)] * 2)
    assert (orders[0] != orders[1]).any()
    for minibatch in orders.reshape(8, 8):
        assert len(set(minibatch // 4)) > 2 and len(set(minibatch % 4)) > 1, "a minibatch mixes times and environments"


def test_observations_are_normalized_by_all_earlier_ones():
    settings = ppo.Settings(4, 8, 1, 1, normalize_observations=True)
    init, update = ppo.make(Probe(3), NETWORK, lambda units: optax.sgd(0.0), settings)
    update, state, seen = jax.jit(update), jax.jit(init)(jax.random.key(0)), []
    for _ in range(3):
        state, _ = update(state)
        seen.append(np.asarray(state.obs).ravel())
    seen = np.concatenate(seen)
    assert state.statistics.count == 96
    np.testing.assert_allclose(state.statistics.mean, [seen.mean()], atol=1e-6)
    np.testing.assert_allclose(state.statistics.squares / 96, [seen.var()], rtol=1e-5)
    obs = jnp.array([[1.0]])
    expected = NETWORK.apply(state.params, (obs - seen.mean()) / seen.std())[0]
    np.testing.assert_allclose(ppo.act(NETWORK, state.params, obs, statistics=state.statistics), expected, rtol=1e-5)


def test_actions_are_the_mean_or_drawn(probed):
    state, _ = probed["action"]
    obs = jnp.ones((4000, 1))
    mean, log_std, _ = NETWORK.apply(state.params, obs)
    np.testing.assert_array_equal(ppo.act(NETWORK, state.params, obs), mean)
    drawn = ppo.act(NETWORK, state.params, obs, jax.random.key(0))
    np.testing.assert_allclose(drawn.std(), jnp.exp(log_std[0]), rtol=0.06)


def test_measures_describe_the_policy(probed):
    state, _ = probed["action"]
    found = ppo.measure(NETWORK, state)
    actor = {name: leaves for name, leaves in state.params["params"].items() if name.startswith("actor")}
    np.testing.assert_allclose(found["weight_magnitude"], cbp_jax.metrics.weight_magnitude(actor))
    obs = state.obs.reshape(-1, 1)
    first = jnp.tanh(obs @ actor["actor_0"]["kernel"] + actor["actor_0"]["bias"])
    last = jnp.tanh(first @ actor["actor_1"]["kernel"] + actor["actor_1"]["bias"])
    np.testing.assert_allclose(found["stable_rank"], cbp_jax.metrics.stable_rank(last) / 16)
    scores = [np.abs(h).mean(0) / np.abs(h).mean() for h in map(np.asarray, (first, last))]
    np.testing.assert_allclose(found["dormant_units"], (np.concatenate(scores) <= 0.01).mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"minibatches": 3}, "minibatches must divide the 32 x 64 = 2048 steps of a rollout, got 3"),
        ({"discount": 1.5}, r"discount must be in \[0, 1\], got 1.5"),
        ({"gae_lambda": -0.1}, r"gae_lambda must be in \[0, 1\], got -0.1"),
        ({"clip": -1.0}, r"clip must be in \[0, inf\), got -1.0"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm must be in \[0, inf\), got -1.0"),
        ({"advantages_in": "epoch"}, "advantages_in must be 'rollout' or 'minibatch', got 'epoch'"),
        ({"advantages_in": "minibatch", "minibatches": 2048}, "minibatches must be less than the rollout's 2048 steps"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ppo.Settings(**settings)


def test_networks_and_lengths_that_do_not_fit_are_refused():
    train = functools.partial(ppo.train, Probe(0), optimizer=lambda units: optax.sgd(0.1))
    with pytest.raises(ValueError, match="updates must be at least 1, got 0"):
        train(NETWORK, updates=0)
    with pytest.raises(ValueError, match=r"environment's 1 actions, got shape \(1, 3\)"):
        train(nets.ActorCritic(3), updates=1)
    outputs = lambda mean, log_std, value: types.SimpleNamespace(
        init=NETWORK.init, apply=lambda params, obs: (mean(obs), log_std(obs), value(obs))
    )
    one = lambda obs: obs[:, :1]
    with pytest.raises(ValueError, match=r"log_std for each of 1 actions, got shape \(2,\)"):
        train(outputs(one, lambda obs: jnp.zeros(2), lambda obs: obs[:, 0]), updates=1)
    with pytest.raises(ValueError, match=r"one value for each observation.*got shape \(1, 1\)"):
        train(outputs(one, one, one), updates=1)


def test_an_environment_without_automatic_resets_is_refused():
    class Bare(Probe):
        def reset(self, key):
            return super().reset(key).replace(info={"truncation": jnp.zeros([])})

    init, _ = ppo.make(Bare(0), NETWORK, lambda units: optax.sgd(0.1), SETTINGS)
    with pytest.raises(ValueError, match=r"env must have \['final_obs', 'episode_return', 'episode_length'\] in"):
        init(jax.random.key(0))


class Clocked(Probe):
    """A probe with periods of 20 steps, so that every fifth rollout of 4 steps ends a period."""

    def reset(self, key):
        state = super().reset(key)
        return state.replace(info=state.info | {"steps": jnp.int32(0), "period": jnp.int32(0)})

    def step(self, state, action):
        after, steps = super().step(state, action), state.info["steps"] + 1
        return after.replace(info=after.info | {"steps": steps, "period": steps // 20})


@pytest.mark.parametrize("reset", ["none", "head", "network"])
def test_the_network_or_its_head_is_reset_with_each_period(reset):
    reset = "" if reset == "none" else reset
    network = nets.ActorCritic(action_size=1, hidden=(4,))
    adam = lambda units: cbp_jax.adam(0.01)
    init, update = ppo.make(Clocked(4), network, adam, ppo.Settings(2, 4, 1, 2), reset=reset)
    states = jax.jit(lambda key: jax.lax.scan(lambda s, _: (update(s)[0], s), init(key), length=12)[1])(
        jax.random.key(0)
    )
    params, counts = states.params["params"], states.opt_state[0].count["params"]
    anew = {"": (), "head": ("actor_mean", "actor_log_std", "critic_value"), "network": tuple(params)}[reset]
    for name, leaves in params.items():
        for weights, count in zip(jax.tree.leaves(leaves), jax.tree.leaves(counts[name]), strict=True):
            # The sixth rollout is the first of a period. Each rollout has two updates; states are those before it.
            seen = np.asarray(count).reshape(12, -1)
            expected = (np.arange(-1, 11) % 5 + 1) * np.r_[0, [2] * 11] if name in anew else np.arange(12) * 2
            np.testing.assert_array_equal(seen, np.tile(expected[:, None], seen.shape[1]))
            if weights.ndim == 3:  # kernels; two steps change a weight by about 0.02 at most
                jumps = np.abs(np.diff(np.asarray(weights).reshape(12, -1), axis=0)).max(1)
                assert (jumps[[5, 10]] > 0.03).all() == (name in anew) and np.delete(jumps, [5, 10]).max() < 0.03
    if reset:
        assert (abs(states.params["params"]["actor_log_std"][jnp.array([6, 11])]) < 0.021).all()
        with pytest.raises(ValueError, match=r"env must have \['period'\] in its states' info"):
            ppo.make(Probe(0), network, adam, SETTINGS, reset=reset)[0](jax.random.key(0))


def test_unknown_resets_are_refused():
    with pytest.raises(ValueError, match="reset must be 'head', 'network' or '', got 'all'"):
        ppo.make(Probe(0), NETWORK, lambda units: optax.sgd(0.1), SETTINGS, reset="all")


def test_interrupted_episodes_are_not_counted_and_friction_is_that_of_the_step():
    class Cut(Probe):
        """Every second step interrupts an episode; the friction is the number of the step."""

        def reset(self, key):
            state = super().reset(key)
            return state.replace(info=state.info | {"friction": jnp.zeros([]), "interrupted": jnp.zeros([])})

        def step(self, state, action):
            number = state.info["friction"]
            further = {"friction": number + 1, "interrupted": number % 2}
            after = super().step(state, action)
            return after.replace(info=after.info | further)

    init, update = ppo.make(Cut(0), NETWORK, lambda units: optax.sgd(0.1), ppo.Settings(2, 8, 1, 1))
    _, found = jax.jit(lambda key: update(init(key)))(jax.random.key(0))
    assert (found["episodes"], found["length_sum"], found["return_sum"]) == (8, 8, 8)
    assert found["friction"] == 3.5  # 0 to 7


def norm_of_clipped_gradients(limit):
    def recorder(units):
        update = lambda grads, state, params, features: (jax.tree.map(jnp.zeros_like, grads), grads)
        return optax.GradientTransformationExtraArgs(lambda params: params, update)

    init, update = ppo.make(Probe(3), NETWORK, recorder, ppo.Settings(2, 4, 1, 1, max_grad_norm=limit))
    state, _ = jax.jit(lambda key: update(init(key)))(jax.random.key(0))
    return optax.tree.norm(state.opt_state if limit is None else state.opt_state[1]).item()


def test_gradients_are_clipped_to_a_norm():
    assert norm_of_clipped_gradients(0.01) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.slow
def test_gradients_below_the_limit_are_not_clipped():
    norm = norm_of_clipped_gradients(None)
    assert norm > 0.02 and norm_of_clipped_gradients(100.0) == pytest.approx(norm)


@pytest.mark.slow
def test_normalizing_advantages_in_minibatches_replaces_that_in_the_rollout():
    """With one minibatch, a step of SGD is the same, except for the unbiased standard deviation."""
    steps = []
    for place in ("rollout", "minibatch"):
        settings = ppo.Settings(2, 4, 1, 1, advantages_in=place, value_coefficient=0.0)
        init, update = ppo.make(Probe(4), NETWORK, lambda units: optax.sgd(0.1), settings)
        before, (after, _) = jax.jit(lambda key, u=update, i=init: (i(key), u(i(key))))(jax.random.key(0))
        steps.append(jax.tree.map(lambda a, b: a - b, after.params, before.params)["params"]["actor_mean"]["kernel"])
    np.testing.assert_allclose(steps[1], steps[0] * np.sqrt(7 / 8), rtol=1e-3, atol=1e-7)
    assert abs(steps[0]).max() > 1e-4
