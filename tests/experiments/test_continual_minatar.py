"""The experiment on a shuffled game of MinAtar: settings, and runs that are resumed."""

import dataclasses

import numpy as np
import pytest

import cbp_jax
from cbp_jax.experiments import EXPERIMENTS, continual_minatar, games
from cbp_jax.rl import pqn

pytest.importorskip("gymnax", reason="games need gymnax")

TINY = dataclasses.replace(
    games.SMOKE,
    methods=("adam", "adam:step_size=1e-2", "cbp_adam:replacement_rate=0.05,maturity_threshold=5"),
    seeds=2,
    steps=1_536,
    interval=512,
    change_every=400,
    episode_length=40,
    hidden=(8,),
)


def test_presets_are_complete():
    assert EXPERIMENTS["continual_minatar"] is continual_minatar
    assert list(continual_minatar.PRESETS) == ["smoke", "laptop"]
    for name in continual_minatar.PRESETS:
        settings = continual_minatar.preset(name)
        methods = continual_minatar.check(settings)
        assert continual_minatar.total(settings) == len(methods) * settings.seeds * settings.steps / settings.interval


def test_the_agent_is_pqns():
    settings = continual_minatar.preset("laptop")
    rules, published = games.pqn_settings(settings), pqn.DEFAULTS
    assert dataclasses.replace(rules, num_envs=128, minibatches=32) == published
    env, net = games.make_env(settings, 3), games.make_network(settings, 3)
    assert env.change_every == 8_192 and env.env.episode_length == 1000 and env.shuffle == "channels"
    assert net.normalization == "layer" and net.num_outputs == 3 and net.hidden == (128, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interval": 500}, "interval must be a multiple of a rollout's 128 steps, got 500"),
        ({"interval": 256}, r"interval must be at least num_envs \* episode_length = 320.*got 256"),
        ({"change_every": 7}, "change_every must be at least num_envs = 8.*got 7"),
        ({"game": "pong"}, "game must be one of"),
        ({"shuffle": "rows"}, "shuffle must be"),
        ({"methods": ("adam:reset=network",)}, "the agent has no online normalization or resets"),
        ({"methods": ("bp:dropout_rate=0.5",)}, "the agent has no dropout_rate"),
        ({"methods": ("injection",)}, "heads are injected before tasks"),
        ({"minibatches": 3}, "minibatches must divide"),
        ({"exploration_end": -0.1}, "end must be in"),
        ({"trace_decay": 1.5}, "trace_decay must be in"),
        ({"lanes": "all"}, "lanes must be"),
        ({"dormant_threshold": -1.0}, "dormant_threshold must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        continual_minatar.run(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_exactly(tmp_path, resumed):
    whole = continual_minatar.run(TINY, tmp_path / "whole")
    assert np.isfinite(whole.to_array()).all() and whole.sizes == {"method": 3, "seed": 2, "task": 3}
    assert set(whole.data_vars) == set(games.MEASURES) and whole.step.values.tolist() == [512, 1024, 1536]
    assert (whole.replaced_units[2] > 0).all() and not whole.replaced_units[:2].any()
    assert (whole.td_error[0] != whole.td_error[1]).any()  # step sizes differ
    assert (whole.period[..., -1] >= 2).all() and (whole.episode_length <= 40).all()
    assert cbp_jax.load_results(tmp_path / "whole").identical(whole)
    assert "episode return" in continual_minatar.summary(whole)
    resumed(continual_minatar, TINY, whole)
