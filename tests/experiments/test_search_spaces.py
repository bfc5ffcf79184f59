import math

import optax
import pytest

from cbp_jax import cli
from cbp_jax.experiments.learners import LEARNERS, LogUniform, Method, configurations, custom, parse_method
from cbp_jax.experiments.learners.redo import ReGraMa


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_has_a_search_space(name):
    learner = LEARNERS[name]
    assert isinstance(learner.space["step_size"], LogUniform)
    default = learner().hyperparameters["step_size"]
    assert learner.space["step_size"].low <= default <= learner.space["step_size"].high
    for drawn in configurations(learner.space, 20):
        method = learner().with_settings(drawn)
        assert parse_method(method.text) == method
        assert all(math.isclose(getattr(method, key), value) for key, value in drawn.items())


def test_a_subclass_adds_to_the_spaces_of_its_bases():
    assert list(ReGraMa.space) == ["step_size", "threshold", "every"]
    assert ReGraMa.space["threshold"] != LEARNERS["redo"].space["threshold"]
    assert Method.space == {} and list(LEARNERS["bp"].space) == ["step_size"]


def test_given_settings_are_not_searched():
    assert list(parse_method("cbp").searched) == ["step_size", "replacement_rate"]
    assert list(parse_method("cbp:step_size=0.1,utility=weight").searched) == ["replacement_rate"]


def scaled(learning_rate=0.1, factor=1.0):
    return optax.sgd(learning_rate * factor)


def with_space(learning_rate=0.1, factor=1.0):
    return optax.sgd(learning_rate * factor)


with_space.space = {"learning_rate": LogUniform(1e-3, 1.0), "factor": (1.0, 2.0)}


def wrong_space(learning_rate=0.1):
    return optax.sgd(learning_rate)


wrong_space.space = {"learning_rate": 0.1}


def test_a_users_function_may_have_a_search_space():
    assert custom(scaled).searched == {}
    assert custom(with_space).searched == with_space.space
    assert list(parse_method(f"{__name__}:with_space(factor=2.0)").searched) == ["learning_rate"]
    with pytest.raises(ValueError, match=r"wrong_space: space must have a LogUniform or a tuple .*, got \{'learning_"):
        _ = custom(wrong_space).searched


def test_list_publishes_the_spaces(capsys):
    assert cli.main(["list"]) == 0
    assert "searched by `bench`: step_size 0.001 to 1, replacement_rate 1e-06 to 0.01\n" in capsys.readouterr().out
