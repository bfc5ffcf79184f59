"""The experiment on policy collapse: settings, parts that follow the program, and a run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import cbp_jax
from cbp_jax import envs
from cbp_jax.experiments import EXPERIMENTS, agents, collapse, policy_collapse
from cbp_jax.rl import ppo

TINY = dataclasses.replace(
    collapse.SMOKE,
    methods=("cbp_adam:step_size=3e-4,eps=1e-5,replacement_rate=0.05,maturity_threshold=5",),
    seeds=2,
    steps=3 * 64,
    interval=64,
    episode_length=8,
    num_envs=2,
    rollout_length=16,
    hidden=(8,),
)


def test_presets_are_complete():
    assert EXPERIMENTS["policy_collapse"] is policy_collapse
    assert list(policy_collapse.PRESETS) == ["smoke", "laptop", "paper"]
    for name in policy_collapse.PRESETS:
        settings = policy_collapse.preset(name)
        methods = policy_collapse.check(settings)
        assert {method.learner for method in methods} >= {"adam", "cbp_adam"}
        assert policy_collapse.total(settings) == len(methods) * settings.seeds * settings.steps / settings.interval


@pytest.mark.usefixtures("quick")
def test_the_papers_settings():
    settings = policy_collapse.preset("paper")
    assert (settings.seeds, settings.steps, settings.anneal) == (30, 1_000_000 // 2048 * 2048, True)
    assert agents.ppo_settings(settings) == ppo.Settings(
        num_envs=1,
        rollout_length=2048,
        epochs=10,
        minibatches=32,
        discount=0.99,
        gae_lambda=0.95,
        clip=0.2,
        clip_values=True,
        value_coefficient=0.5 / 2,  # the program's loss is half the squared error
        entropy_coefficient=0.0,
        max_grad_norm=0.5,
        normalize_advantages=True,
        advantages_in="minibatch",
    )
    adam, upgd, cbp = policy_collapse.check(settings)
    assert adam.options["eps"] == upgd.options["eps"] == cbp.options["eps"] == 1e-5
    assert all(method.hyperparameters["step_size"] == 3e-4 for method in (adam, upgd, cbp))
    assert [upgd.hyperparameters[name] for name in ("weight_decay", "beta_utility", "sigma")] == [1e-3, 0.999, 1e-3]
    assert upgd.learner == "adaptive_upgd" and upgd.options["factor"] == 2
    env = collapse.make_env(settings)
    assert isinstance(env, envs.Normalized) and env.discount == 0.99
    assert env.env.clip_actions and env.env.episodes().episode_length == 1000
    assert env.env.episodes().time_limit_is_terminal
    assert not isinstance(collapse.make_env(dataclasses.replace(settings, normalize=False)), envs.Normalized)


def test_the_network_starts_orthogonal_with_the_programs_gains():
    network = collapse.make_network(policy_collapse.preset("paper"), 8)
    params = network.init(jax.random.key(0), jnp.zeros((1, 87)))["params"]
    gains = {"actor_0": 2.0, "actor_1": 2.0, "actor_mean": 1e-4, "critic_0": 2.0, "critic_1": 2.0, "critic_value": 1.0}
    assert set(params) == {*gains, "actor_log_std"} and not params["actor_log_std"].any()
    for name, gain in gains.items():  # squared
        kernel = params[name]["kernel"]
        np.testing.assert_allclose(kernel.T @ kernel, gain * np.eye(kernel.shape[1]), atol=1e-5 * gain)
        assert not params[name]["bias"].any()
    assert params["actor_1"]["kernel"].shape == (64, 64) and network.activation == "tanh"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": "swimmer"}, r"env must be one of \('ant', .*'humanoid'\), got 'swimmer'"),
        ({"interval": 100}, "interval must be a multiple of a rollout's 32 steps, got 100"),
        ({"interval": 32, "episode_length": 17}, r"interval must be at least num_envs \* episode_length = 34"),
        ({"methods": ("adam:reset=network",)}, "method 'adam:reset=network': there is no change to reset after"),
        ({"methods": (optax.identity,)}, "method .*identity.*: it has no step size to anneal; set anneal to false"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm must be in \[0, inf\), got -1.0"),
        ({"value_scale": -1.0}, "value_scale must not be negative"),
        ({"advantages_in": "epoch"}, "advantages_in must be 'rollout' or 'minibatch', got 'epoch'"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        policy_collapse.run(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@struct.dataclass
class State:
    pipeline_state: jax.Array
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict[str, jax.Array]
    info: dict[str, Any] = struct.field(default_factory=dict)


class Slider:
    """Moves by its action, which is also the reward, and falls beyond 3. It compiles faster than Brax's bodies."""

    observation_size = action_size = 1
    sys = None

    def reset(self, key):
        at, zero = jax.random.uniform(key, (1,)), jnp.zeros([])
        return State(at, at, zero, zero, {"x_velocity": zero})

    def step(self, state, action):
        at = state.pipeline_state + action
        done = jnp.where(jnp.abs(at[0]) > 3, 1.0, 0.0)
        return state.replace(pipeline_state=at, obs=at, reward=action[0], done=done, metrics={"x_velocity": action[0]})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(envs.walker, "make_brax_env", lambda *_: Slider())
    monkeypatch.setattr(agents, "save_episode", lambda *_: None)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_run_from_end_to_end(tmp_path):
    results = policy_collapse.run(TINY, tmp_path)
    assert np.isfinite(results.to_array()).all() and results.sizes == {"method": 1, "seed": 2, "task": 3}
    assert set(results.data_vars) == set(agents.MEASURES) and (results.replaced_units > 0).all()
    assert results.step.values.tolist() == [64, 128, 192] and results.episode_length.max() <= 8
    assert cbp_jax.load_results(tmp_path).identical(results)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("anneal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_step_size_falls_linearly_to_zero(tmp_path, anneal):
    def constant(learning_rate=0.1):
        """Move every weight by the step size, whatever its gradient."""
        update = lambda grads, state, params=None: (jax.tree.map(lambda g: -learning_rate + 0 * g, grads), state)
        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    once = {"epochs": 1, "minibatches": 1, "num_envs": 2, "rollout_length": 8, "interval": 16, "steps": 64}
    settings = dataclasses.replace(TINY, methods=(constant,), seeds=1, anneal=anneal, **once)
    results = policy_collapse.run(settings, tmp_path)
    # The entropy of a policy with one action is its log-std plus a constant, before the rollout's only update.
    steps = -np.diff(results.entropy.values[0, 0])
    np.testing.assert_allclose(steps, 0.1 * np.array([1, 3 / 4, 2 / 4] if anneal else [1, 1, 1]), rtol=1e-4)


@pytest.mark.slow  # the ant's physics take long to compile
def test_a_run_with_the_ant_saves_an_episode(tmp_path):
    results = policy_collapse.run(dataclasses.replace(TINY, seeds=1, steps=64), tmp_path)
    assert np.isfinite(results.to_array()).all() and results.sizes["task"] == 1
    assert len(list(tmp_path.glob("episode-*.html"))) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_killed_run_resumes_with_its_step_size(tmp_path, resumed):
    whole = policy_collapse.run(TINY, tmp_path / "whole")
    resumed(policy_collapse, TINY, whole, after=1)
