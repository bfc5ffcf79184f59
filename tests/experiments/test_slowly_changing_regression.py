import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cbp_jax.experiments.slowly_changing_regression import check, preset, run

from cbp_jax import load_results
from cbp_jax.experiments import EXPERIMENTS, slowly_changing_regression
from cbp_jax.experiments.regression import ACTIVATIONS, PERTURBED

TINY = dataclasses.replace(preset("smoke"), seeds=1, tasks=2, examples_per_task=12, measured_examples=20)


def test_the_papers_preset_has_the_papers_numbers():
    paper = preset("paper")
    assert (paper.num_inputs, paper.flipping_bits, paper.examples_per_task) == (20, 15, 10_000)
    assert (paper.target_units, paper.beta, paper.hidden, paper.batch_size) == (100, 0.7, (5,), 1)
    assert (paper.tasks * paper.examples_per_task, paper.seeds) == (3_000_000, 100)
    assert not paper.redraw
    methods = check(paper)
    plain = [method for method in methods if method.learner == "bp" and method.hidden is None]
    found = {(method.options["activation"], method.hyperparameters["step_size"]) for method in plain}
    activations = ("sigmoid", "tanh", "elu", "leaky_relu", "relu", "swish")
    assert found == {(activation, step) for activation in activations for step in (0.01, 0.003, 0.001)}
    assert {method.learner for method in methods} == {"bp", "adam", "l2", "cbp", *PERTURBED}
    assert {method.learner for method in methods if method.hidden == ()} == {"bp", "adam"}  # the linear baselines
    assert activations == ACTIVATIONS
    relu = [
        (method.learner, method.hyperparameters, {"l2": 0.0} | method.options)
        for method in methods
        if method.hidden is None and method.activation == "relu"
    ]
    of = lambda learner: [{**numbers, "adam_l2": options["l2"]} for name, numbers, options in relu if name == learner]
    assert [found["l2"] for found in of("l2")] == [1e-5, 1e-4, 1e-3, 1e-2]
    assert [(found["step_size"], found["adam_l2"]) for found in of("adam")] == [
        *((step, 0.0) for step in (0.01, 0.003, 0.001)),
        *((0.01, l2) for l2 in (1e-5, 1e-4, 1e-3, 1e-2)),
    ]
    for name in PERTURBED:
        assert [found["noise"] for found in of(name)] == [1e-4, 1e-3, 1e-2]
    assert [found["replacement_rate"] for found in of("cbp")] == [1e-5, 1e-4, 1e-3, 1e-2]
    assert {found["maturity_threshold"] for found in of("cbp")} == {100}
    assert {options["utility"] for name, _, options in relu if name == "cbp"} == {"adaptable_contribution"}
    assert {found["step_size"] for name in ("l2", "cbp", *PERTURBED) for found in of(name)} == {0.01}


def test_the_programs_preset_redraws_the_bits():
    paper, redrawn = preset("paper"), preset("paper_redraw")
    assert redrawn.redraw and redrawn.tasks * redrawn.examples_per_task == 1_000_000
    assert dataclasses.replace(redrawn, redraw=False, tasks=paper.tasks) == paper
    problem = slowly_changing_regression.problem(redrawn)
    bits = jax.vmap(lambda index: problem.make_task((), jax.random.key(0), index).bits)(jnp.arange(40))
    assert (np.diff(bits, axis=0) != 0).sum(1).mean() > 5  # several of 15 bits, not only 1


def test_the_other_presets_compare_what_they_promise():
    for name in ("smoke", "laptop"):
        settings = preset(name)
        fields = ("num_inputs", "flipping_bits", "target_units", "beta", "hidden")
        assert all(getattr(settings, field) == getattr(preset("paper"), field) for field in fields)
    laptop = check(preset("laptop"))
    plain = [method for method in laptop if method.learner == "bp"]
    assert {method.activation for method in plain if method.hidden is None} == set(ACTIVATIONS)
    assert any(method.hidden == () for method in plain)
    assert {"cbp", "upgd"} <= {method.learner for method in laptop}
    smoke = preset("smoke")
    assert smoke.seeds * smoke.tasks * smoke.examples_per_task * len(smoke.methods) < 10_000  # takes seconds
    with pytest.raises(
        ValueError, match=r"preset must be one of \['smoke', 'laptop', 'paper', 'paper_redraw'\], got 'large'"
    ):
        preset("large")
    with pytest.raises(ValueError, match="slowly_changing_regression has none; got 'mnist'"):
        preset("smoke", "mnist")
    assert EXPERIMENTS["slowly_changing_regression"] is slowly_changing_regression


def test_networks_have_the_activation_and_the_gain_of_their_method(trained, tmp_path):
    methods = ("bp:activation=tanh", "cbp:activation=sigmoid", "bp")
    run(dataclasses.replace(TINY, methods=methods, hidden=(40,), num_inputs=24, flipping_bits=10), tmp_path)
    x = 3 * jax.random.normal(jax.random.key(1), (4, 25))
    gains = (5 / 3, 1.0, 2**0.5)
    functions = (jnp.tanh, jax.nn.sigmoid, jax.nn.relu)
    for group, gain, activation in zip(trained, gains, functions, strict=True):
        params = jax.jit(group.learner.init)(jax.random.key(0))
        hidden, output = params["params"].values()
        assert hidden["kernel"].shape == (25, 40) and output["kernel"].shape == (40, 1)
        # Kaiming uniform with the gain of the activation, and gain 1 for the output layer.
        for layer, of_layer in ((hidden, gain), (output, 1.0)):
            bound = of_layer * (3 / layer["kernel"].shape[0]) ** 0.5
            assert 0.9 * bound < np.abs(layer["kernel"]).max() <= bound and not layer["bias"].any()
        _, features = jax.jit(group.learner.predict)(params, x)
        np.testing.assert_allclose(features["params/Dense_0"], activation(x @ hidden["kernel"]), atol=1e-5)
    assert all(group.problem.loss == "squared_error" and group.measured_examples == 20 for group in trained)


def test_settings_reach_the_stream(trained, tmp_path):
    settings = dataclasses.replace(TINY, methods=("bp",), num_inputs=6, flipping_bits=4, target_units=9, beta=0.0)
    run(settings, tmp_path / "all")
    run(dataclasses.replace(settings, beta=1.0, batch_size=3), tmp_path / "none")
    tasks = []
    for group, steps in zip(trained, (12, 4), strict=True):
        problem = group.problem

        @jax.jit
        def show(key, problem=problem):
            task = problem.make_task((), key, 0)
            return task, problem.evaluation((), task, 50)[0], problem.batch((), task, 0)[0]

        task, x, batch = show(jax.random.key(0))
        tasks.append(task)
        assert task.bits.shape == (4,) and task.input_weights.shape == (7, 9)
        assert (x[:, :4] == task.bits).all() and len(np.unique(x[:, 4:6], axis=0)) == 4 and (x[:, 6] == 1).all()
        assert problem.steps_per_task == steps
        assert batch.shape[0] == 12 // steps
    # A threshold unit is on where more than the fraction beta of the inputs agree: with 0 always, with 1 never.
    most, least = tasks
    np.testing.assert_array_equal(least.thresholds - most.thresholds, 7.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inputs": 0}, "num_inputs must be an integer of at least 1; got 0"),
        ({"flipping_bits": 21}, "flipping_bits must be an integer from 1 to 20; got 21"),
        ({"target_units": 0}, "target_units must be an integer of at least 1; got 0"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\]; got 1.5"),
        ({"batch_size": 13}, "batch_size must be an integer from 1 to 12; got 13"),
        ({"measure_every": 13}, "measure_every must be at most the 12 updates of a task, got 13"),
        ({"methods": ("bp:activation=step",)}, "activation must be .*, got 'step'"),
        ({"methods": ("bp:activation=softplus",)}, "activation must be one of .*, got 'softplus'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_is_trained_or_written(trained, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not trained and not (tmp_path / "run").exists()


def test_a_run_from_end_to_end(tmp_path):
    settings = dataclasses.replace(TINY, methods=("cbp:replacement_rate=0.2,maturity_threshold=3",), measure_every=5)
    results = run(settings, tmp_path)
    assert results.identical(load_results(tmp_path)) and results.attrs["experiment"] == "slowly_changing_regression"
    assert "accuracy" not in results and {"loss", "plasticity", "gradient_l0", "weight_rank"} <= set(results.data_vars)
    for name, values in results.data_vars.items():
        assert np.isfinite(values).all() and values.shape == (1, 1, 2), name
    assert (results.loss > 0).all() and (results.replaced_units > 0).all()


def test_a_linear_network_learns_and_has_no_units_to_measure(tmp_path):
    methods = tuple(f"bp:hidden=none,step_size={step}" for step in (0, 0.01))
    results = run(dataclasses.replace(TINY, methods=methods, tasks=1, examples_per_task=200), tmp_path)
    still, learned = results.loss.values
    assert (learned < still).all() and np.isnan(results.dead_units).all()
