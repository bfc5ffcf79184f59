"""Questions 1 to 3: learners on Online Permuted images, compared after equal searches."""

import dataclasses
import json

import numpy as np
import pytest

from cbp_jax import cli, load_results
from cbp_jax.experiments import (
    EXPERIMENTS,
    learners,
    question_penalty,
    question_reinitialization,
    question_utility,
)
from cbp_jax.experiments.questions import penalties, reinitializations, utilities
from cbp_jax.replacement import UTILITIES

ALL = (question_utility, question_reinitialization, question_penalty)


@pytest.mark.parametrize("experiment", ALL, ids=lambda experiment: experiment.name)
def test_all_lanes_have_an_equal_search_and_seeds_of_their_own(experiment):
    laptop = experiment.preset("laptop")
    assert EXPERIMENTS[experiment.name] is experiment and laptop.seeds >= 10 and laptop.dataset == "digits"
    assert experiment.check(laptop) == list(laptop.methods)
    # An hour on one core, at 8 to 18 microseconds per update; most of it is continual backpropagation.
    slow = sum(name != "bp" for name in laptop.methods) if experiment is not question_penalty else 0
    runs = 12 * laptop.tuning_seeds + laptop.seeds
    updates = laptop.tasks * laptop.examples_per_task
    seconds = runs * updates * (18e-6 * slow + 8e-6 * (len(laptop.methods) - slow))
    assert experiment.total(laptop) == len(laptop.methods) * runs * laptop.tasks
    assert 300 < seconds < 3600 * max(1, len(laptop.methods) / 13)


def test_every_utility_and_reinitialization_of_the_library_is_compared():
    assert [lane.name for lane in utilities.lanes()] == ["bp", *UTILITIES]
    for lane in utilities.lanes()[1:]:
        assert learners.parse_method(lane.method).options["utility"] == lane.name
    assert [lane.name for lane in reinitializations.lanes()][:2] == ["bp", "resample"]
    assert {lane.name for lane in penalties.lanes()} == {"bp", "l1", "l2", "l1_init", "l2_init", "proximal_l1_init"}


def test_a_new_reinitialization_is_compared_automatically(monkeypatch):
    names = {"resample": None, "rewind": None}
    monkeypatch.setattr(reinitializations.replacement, "REINITIALIZATIONS", names)
    assert [(lane.name, lane.method) for lane in reinitializations.lanes()[1:]] == [
        ("resample", "cbp"),
        ("rewind", "cbp:reinitialization=rewind"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("bp", "cbp")}, r"methods must be some of \['bp', 'l2', .*\], got 'cbp'"),
        ({"methods": ()}, "lanes must be at least one"),
        ({"first_tuning_seed": 0}, "tuning seeds must not be reported, and 0 is both"),
        ({"tuning_seeds": 0}, "seeds must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        question_penalty.check(dataclasses.replace(question_penalty.preset("smoke"), **change))


@pytest.mark.slow
def test_a_question_is_answered_by_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_use_all_cores", lambda: None)
    words = ("run", "question_penalty", "--preset", "smoke", "--methods", "bp", "l2", "--tasks", "2")
    assert cli.main([*words, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "minus bp" in printed and "weight sparsity" in printed
    for name in ("differences", "tasks", "search"):
        assert (tmp_path / "run" / f"{name}.png").exists()
    results = load_results(tmp_path / "run")
    assert results.method.values.tolist() == ["bp", "l2"] and results.sizes["candidate"] == 12
    assert np.isfinite(results.tuning_performance).all() and np.isfinite(results.weight_sparsity).all()
    for method, text in zip(results.method.values, results.chosen.values, strict=True):
        best = results.tuning_performance.loc[{"method": method}].values.mean(1).argmax()
        settings = json.loads(results.configurations.loc[{"method": method}].item())[best]
        assert learners.parse_method(str(text)) == learners.parse_method(str(method)).with_settings(settings)
    reported = load_results(tmp_path / "run" / "reported")
    np.testing.assert_array_equal(reported.accuracy.values, results.accuracy.values)
    assert cli.main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    assert "minus bp" in capsys.readouterr().out
