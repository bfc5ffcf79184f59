"""The experiment on a changing cart-pole: settings, learners, and resumed runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import envs
from cbp_jax.experiments import EXPERIMENTS, learners, streaming, streaming_control
from cbp_jax.experiments.streaming_learners import LEARNERS

TINY = dataclasses.replace(
    streaming.SMOKE,
    methods=("obgd", "obgd:kappa=4", "cbp_adam:replacement_rate=0.05,maturity_threshold=5"),
    seeds=2,
    steps=600,
    interval=200,
    episode_length=50,
    change_every=150,
    hidden=(8,),
    exploration_steps=100,
)


def test_presets_are_complete():
    assert EXPERIMENTS["streaming_control"] is streaming_control
    assert list(streaming_control.PRESETS) == ["smoke", "laptop"]
    for name in streaming_control.PRESETS:
        settings = streaming_control.preset(name)
        methods = streaming_control.check(settings)
        assert streaming_control.total(settings) == len(methods) * settings.seeds * settings.steps / settings.interval
    assert {method.learner for method in methods} == set(LEARNERS)


def test_the_agent_is_that_of_the_paper():
    settings = streaming_control.preset("laptop")
    env, net = streaming.make_env(settings, 3), streaming.make_network(settings)
    assert isinstance(env, envs.Normalized) and env.unbiased and env.bound == np.inf and env.discount == 0.99
    assert env.env.swap_actions and env.env.change_every == 20_000 and env.env.env.episode_length == 500
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    assert [int((layer["kernel"] != 0).sum(0).max()) for layer in params.values()] == [1, 3, 3]
    assert net.activation == "leaky_relu" and net.normalization == "bare_layer"
    assert streaming.make_network(settings).kernel_init is net.kernel_init
    assert not isinstance(streaming.make_env(dataclasses.replace(settings, normalize=False)), envs.Normalized)


def changed(text):
    """Return weights of 1 after two updates with gradients of 1."""
    (method,) = learners.read_methods([text], known=LEARNERS)
    params = {"w": jnp.ones(2)}
    method = method.on({"discount": 0.5}, (), [method])
    tx = optax.with_extra_args_support(method.build((), jax.random.key(0)))
    state = tx.init(params)
    for td_error in (0.5, 2.0):
        updates, state = tx.update({"w": jnp.ones(2)}, state, params, td_error=td_error)
        params = optax.apply_updates(params, updates)
    return params["w"]


def test_learners_follow_traces_with_the_agents_discount():
    # the traces are 1, then 1 + 0.5 * 0.6
    np.testing.assert_allclose(changed("bp:step_size=0.1,trace_decay=0.6"), 1 + 0.1 * (0.5 + 2 * 1.3), rtol=1e-5)
    bounded = 0.5 / (3 * 2) + 2 * 1.3 / (3 * 2 * 2 * 1.3)
    np.testing.assert_allclose(changed("obgd:kappa=3,trace_decay=0.6"), 1 + bounded, rtol=1e-5)
    np.testing.assert_allclose(changed("adam:step_size=0.1,b1=0,b2=0"), 1.2, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interval": 49}, "interval must be at least episode_length = 50.*got 49"),
        ({"methods": ("upgd",)}, "'upgd'"),
        ({"methods": (optax.identity,)}, r"must be of \['obgd', 'bp'"),
        ({"methods": ("bp:reset=network",)}, "the agent has no online normalization, dropout, curvature or resets"),
        ({"methods": ("obgd:dropout_rate=0.5",)}, "the agent has no online normalization, dropout"),
        ({"methods": ("obgd:trace_decay=2",)}, r"trace_decay must be in \[0, 1\], got 2"),
        ({"exploration_end": -0.1}, "end must be in"),
        ({"sparsity": 1.0}, r"fraction must be in \[0, 1\), got 1.0"),
        ({"change_every": 0}, "change_every must be at least 1, got 0"),
        ({"discount": 1.5}, "discount must be in"),
        ({"discount": 1.5, "normalize": False}, "discount must be in"),
        ({"lanes": "all"}, "lanes must be"),
        ({"dormant_threshold": -1.0}, "dormant_threshold must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        streaming_control.run(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tmp_path, resumed):
    whole = streaming_control.run(TINY, tmp_path / "whole")
    assert np.isfinite(whole.to_array()).all() and whole.sizes == {"method": 3, "seed": 2, "task": 3}
    assert set(whole.data_vars) == set(streaming.MEASURES) and whole.step.values.tolist() == [200, 400, 600]
    assert (whole.replaced_units[2] > 0).all() and not whole.replaced_units[:2].any()
    assert (whole.episode_return > 5).all() and (whole.episode_return <= 50).all() and whole.period.max() >= 3
    assert (whole.td_error[0] != whole.td_error[1]).all()  # kappa differs
    assert cbp_jax.load_results(tmp_path / "whole").identical(whole)
    assert "episode return" in streaming_control.summary(whole)
    assert "tasks.png" in [path.name for path in streaming_control.plot(whole, tmp_path)]
    resumed(streaming_control, TINY, whole)
