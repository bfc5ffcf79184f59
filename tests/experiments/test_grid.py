import dataclasses

import optax
import pytest

from cbp_jax.experiments import EXPERIMENTS
from cbp_jax.experiments.empty_results import empty_results
from cbp_jax.experiments.learners import expand, parse_method, read_grid, read_methods


def test_every_combination_of_the_settings_that_a_method_has():
    grid = read_grid(["replacement_rate=1e-4,1e-5", "step_size=0.01,0.003,0.001"])
    methods = read_methods(expand(["bp", "cbp:maturity_threshold=9", "adam:hidden=3"], grid))
    assert [method.learner for method in methods] == ["bp"] * 3 + ["cbp"] * 6 + ["adam"] * 3
    of_cbp = [method.hyperparameters for method in methods[3:9]]
    found = [(numbers["replacement_rate"], numbers["step_size"]) for numbers in of_cbp]
    assert found == [(rate, step) for rate in (1e-4, 1e-5) for step in (0.01, 0.003, 0.001)]
    assert {numbers["maturity_threshold"] for numbers in of_cbp} == {9} and methods[-1].hidden == (3,)


def test_settings_of_functions_and_values_that_are_not_numbers():
    grid = read_grid(["momentum=0.5,0.9", "nesterov=true,false", "hidden=4x3,none"])
    texts = expand(["optax:sgd(learning_rate=0.1)", "optax:lion(learning_rate=0.1)"], grid)
    assert texts[0] == "optax:sgd(learning_rate=0.1, momentum=0.5, nesterov=true, hidden=4x3)" and len(texts) == 10
    grid = read_grid(["learning_rate=0.1,0.2", "utility=weight,contribution"])
    texts = expand(["optax:sgd", "cbp"], {"utility": grid["utility"]})
    assert texts == ("optax:sgd", "cbp:utility=weight", "cbp:utility=contribution")
    assert parse_method(expand(["optax:adam(learning_rate=0.1)"], {"b1": ("0.5",)})[0]).hyperparameters["b1"] == 0.5
    assert optax.adam  # the paths above refer to this module


def test_results_hold_the_settings_that_are_not_numbers():
    texts = expand(["bp:hidden=4x3", "cbp"], read_grid(["utility=weight,random"]))
    settings = dataclasses.replace(EXPERIMENTS["online_permuted"].preset("smoke"), methods=texts)
    results = empty_results("mine", settings, read_methods(texts), 1, {"loss": "the loss"})
    assert results.utility.values.tolist() == ["", "weight", "random"]
    assert results.compensate_bias.values.tolist() == ["", "False", "False"]  # a default
    assert results.hidden.values.tolist() == ["4x3", "", ""] and "activation" not in results.coords
    functions = read_methods(["optax:sgd(learning_rate=0.1, momentum=0.9)", "bp:momentum=0.5"])
    assert {method.learner: method.texts for method in functions} == {"optax:sgd": {"nesterov": "False"}, "bp": {}}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["step_size"], "grid must be settings with their values, as in step_size=0.01,0.003, got 'step_size'"),
        (["step_size=0.1,"], "got 'step_size=0.1,'"),
        (["online_permuted"], "got 'online_permuted'"),
        (["step_size=0.1", "step_size=0.2"], "grid must have each setting once, got step_size twice"),
        (["step_size=0.1,0.1"], "each value of a setting once, got 'step_size=0.1,0.1'"),
    ],
)
def test_malformed_grids_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        read_grid(texts)


def test_settings_that_no_method_has_or_that_are_already_given_are_refused():
    with pytest.raises(ValueError, match=r"no method has replacement_rat; bp cbp have .*replacement_rate"):
        expand(["bp", "cbp"], {"replacement_rat": ("1",)})
    with pytest.raises(ValueError, match=r"grid must leave step_size out, or method 'bp:step_size=0\.1' must"):
        expand(["bp:step_size=0.1"], {"step_size": ("1",)})
