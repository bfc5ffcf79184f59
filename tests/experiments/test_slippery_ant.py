"""The experiments with the ant: settings, presets, runs, and resumption. In CI the notebook's test runs one."""

import dataclasses
import json
import math

import numpy as np
import pytest

import cbp_jax
from cbp_jax.experiments import EXPERIMENTS, agents, ants, slippery_ant, stationary_ant

TINY = dataclasses.replace(
    ants.SMOKE,
    methods=("cbp_adam:step_size=3e-4,replacement_rate=1e-2,maturity_threshold=5",),
    seeds=2,
    steps=3 * 64 - 1,
    interval=64,
    change_every=32,
    episode_length=8,
    num_envs=4,
    rollout_length=8,
)


@pytest.mark.parametrize("experiment", [slippery_ant, stationary_ant])
def test_presets_are_complete(experiment):
    changing = experiment is slippery_ant
    names = ["smoke", "laptop", *(["alternating"] if changing else []), "paper"]
    assert EXPERIMENTS[experiment.NAME] is experiment and list(experiment.PRESETS) == names
    for name in experiment.PRESETS:
        settings = experiment.preset(name)
        assert experiment.check(settings)
        assert settings.friction == (None if changing else 1.0)
        intervals = math.ceil(settings.steps / settings.interval)
        assert experiment.total(settings) == len(settings.methods) * settings.seeds * intervals
    with pytest.raises(ValueError, match=r"preset must be one of .*'laptop'.*, got 'desktop'"):
        experiment.preset("desktop")
    with pytest.raises(ValueError, match=f"dataset must be left out: {experiment.NAME} has none; got 'mnist'"):
        experiment.preset("smoke", "mnist")


def test_the_papers_settings():
    settings = slippery_ant.preset("paper")
    rules = agents.ppo_settings(settings)
    assert (settings.steps, settings.change_every, settings.friction_range) == (20_000_000, 2_000_000, (0.02, 2.0))
    assert (rules.num_envs, rules.rollout_length, rules.epochs, rules.minibatches) == (1, 2048, 10, 16)
    assert settings.seeds == 100 and not settings.common_clock and not settings.frictions
    assert (rules.discount, rules.gae_lambda, rules.clip) == (0.99, 0.95, 0.2)
    assert (rules.value_coefficient, rules.entropy_coefficient, rules.normalize_advantages) == (1, 0, True)
    assert settings.time_limit_is_terminal and not settings.normalize_observations and not settings.clip_actions
    assert (settings.hidden, settings.activation) == ((256, 256), "relu")
    standard, tuned, l2, cbp, redo, *_ = slippery_ant.check(settings)
    for method in (standard, tuned, l2, cbp, redo):
        assert method.hyperparameters["step_size"] == 1e-4
    betas = lambda method: (method.hyperparameters["b1"], method.hyperparameters["b2"])
    assert betas(standard) == (0.9, 0.999) and betas(tuned) == (0.99, 0.99)
    assert betas(l2) == betas(cbp) == betas(redo) == (0.99, 0.99)
    assert [method.options["l2"] for method in (l2, cbp, redo)] == [1e-3, 1e-4, 1e-4]
    replacing = [cbp.hyperparameters[name] for name in ("replacement_rate", "maturity_threshold")]
    assert replacing == [1e-4, 10_000] and cbp.options["utility"] == "contribution"
    assert [redo.hyperparameters[name] for name in ("threshold", "every")] == [0.1, 100]
    stationary = stationary_ant.preset("paper")
    assert (stationary.steps, stationary.seeds, stationary.num_envs) == (50_000_000, 30, 1)


def test_environments_share_the_steps_between_two_frictions():
    env = ants.make_env(dataclasses.replace(slippery_ant.preset("paper"), num_envs=32, frictions=(0.1, 0.2)))
    assert env.change_every == 2_000_000 // 32 and env.frictions == (0.1, 0.2) and not env.common_clock


@pytest.mark.parametrize("name", ["laptop", "alternating"])
def test_no_interval_of_these_presets_mixes_frictions(name):
    settings = slippery_ant.preset(name)
    assert settings.common_clock and ants.make_env(settings).common_clock
    assert settings.change_every % settings.interval == 0 == settings.interval % agents.ppo_settings(settings).steps
    assert settings.steps >= 5 * settings.change_every and settings.steps % settings.change_every == 0


def test_two_learners_of_the_alternating_preset_differ_only_in_continual_backpropagation():
    *_, l2, cbp = slippery_ant.check(slippery_ant.preset("alternating"))
    own = ("replacement_rate", "decay_rate", "maturity_threshold")
    assert {name: value for name, value in cbp.hyperparameters.items() if name not in own} == l2.hyperparameters
    assert l2.options["l2"] == cbp.options["l2"] == 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"interval": 60}, "interval must be a multiple of a rollout's 32 steps, got 60"),
        ({"interval": 32, "episode_length": 9}, r"interval must be at least num_envs \* episode_length = 36"),
        ({"minibatches": 5}, "minibatches must divide the 4 x 8 = 32 steps of a rollout, got 5"),
        ({"discount": 2.0}, r"discount must be in \[0, 1\], got 2.0"),
        ({"methods": ()}, "methods must name at least one"),
        ({"methods": ("adam", "adam")}, "methods must differ"),
        ({"methods": ("layer_norm",)}, "method 'layer_norm': the agent has no normalization"),
        (
            {"methods": ("adam:reset=network",)},
            "method 'adam:reset=network': the 4 environments' frictions must change together, .* set common_clock",
        ),
        (
            {"methods": ("adam:reset=head",), "common_clock": True, "friction": 0.5, "frictions": ()},
            "method 'adam:reset=head': there is no change to reset after where friction is 0.5",
        ),
        ({"common_clock": True, "change_every": 31}, r"change_every must be at least num_envs \* episode_length = 32"),
        ({"common_clock": True, "change_every": 33, "interval": 32}, r"at least 2 \* num_envs \* episode_length = 64"),
        ({"friction": 0.5, "frictions": (0.5,)}, r"friction stays as it is .* frictions must be empty, got \(0.5,\)"),
        ({"frictions": (0.5, -1.0)}, r"frictions must be in \[0, inf\), got -1.0"),
        (
            {"methods": ("adam:reset=head,reset_every=9",)},
            "an agent is reset where friction changes; periodic resets",
        ),
        ({"methods": ("injection",)}, "method 'injection': heads are injected before tasks of a stream"),
        ({"methods": ("c_chain",)}, "method 'c_chain': the agent keeps no earlier examples"),
        ({"methods": ("upgd:order=2",)}, "method 'upgd:order=2': the agent has no curvature"),
        ({"activation": "rely"}, "activation must be .*, got 'rely'"),
        ({"hidden": ()}, r"hidden must be sizes of at least one hidden layer, got \(\)"),
        ({"policy_scale": -1.0}, "policy_scale must not be negative, got -1.0"),
        ({"initial_log_std": np.nan}, "initial_log_std must be finite, got nan"),
        ({"friction": np.inf}, r"friction must be in \[0, inf\), got inf"),
        ({"lanes": "rows"}, "lanes must be 'auto', 'vmap' or 'map', got 'rows'"),
        ({"dormant_threshold": -1.0}, "dormant_threshold must not be negative, got -1.0"),
        ({"backend": "generalized"}, "backend must be one of .*, got 'generalized'"),
        ({"env": "antelope"}, "env must be one of .*, got 'antelope'"),
        ({"friction_range": (0.0, 1.0)}, "friction_range must be two positive numbers"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        slippery_ant.run(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # like those below: PPO and the ant's physics in one program take long to compile
def test_a_run_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(agents, "save_episode", lambda *_: None)  # doubles the compilation time; tested below
    seen = []
    results = slippery_ant.run(TINY, tmp_path, lambda methods, lanes, measures: seen.append((lanes, set(measures))))
    assert seen == [(2, set(ants.MEASURES))] * 3 and slippery_ant.total(TINY) == 6
    assert np.isfinite(results.to_array()).all() and results.sizes == {"method": 1, "seed": 2, "task": 3}
    assert results.step.values.tolist() == [64, 128, 192] and (results.replaced_units > 0).all()
    assert results.episode_length.max() <= 8 and len(np.unique(results.friction)) > 2
    assert cbp_jax.load_results(tmp_path).identical(results) and not list(tmp_path.glob("*.msgpack"))
    assert "episode return" in slippery_ant.summary(results) and "dormant units" in slippery_ant.summary(results)
    assert [path.name for path in slippery_ant.plot(results, tmp_path)] == ["tasks.png"]


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, resumed):
    whole = slippery_ant.run(TINY, tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("episode-*.html"))) == 1
    again = resumed(slippery_ant, TINY, whole)
    assert json.loads(again.attrs["settings"])["steps"] == 191


@pytest.mark.slow
def test_lanes_run_together_equal_lanes_run_in_turn(tmp_path):
    runs = [
        slippery_ant.run(dataclasses.replace(TINY, lanes=lanes, steps=64), tmp_path / lanes)
        for lanes in ("map", "vmap")
    ]
    for name in ("friction", "episode_length", "weight_magnitude"):
        np.testing.assert_allclose(runs[0][name], runs[1][name], rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_with_a_common_clock_an_interval_has_one_friction_and_methods_are_reset(tmp_path, monkeypatch):
    monkeypatch.setattr(agents, "save_episode", lambda *_: None)
    settings = dataclasses.replace(
        TINY,
        methods=("adam:step_size=0,reset=network",),
        frictions=(0.1, 1.0),
        common_clock=True,
        change_every=64,
        seeds=1,
    )
    results = slippery_ant.run(settings, tmp_path)
    np.testing.assert_allclose(results.friction, [[[0.1, 1.0, 0.1]]], rtol=1e-6)
    assert len(np.unique(results.weight_magnitude)) == 3, "every change of friction resets the network"
    assert (results.episode_length > 0).all()
