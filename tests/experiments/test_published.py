"""The published searches and best settings, against the numbers in the public programs, under their names there."""

import pytest

from cbp_jax.experiments.learners import read_methods
from cbp_jax.experiments.published import PROBLEMS, best_methods, paper_grid

# For each program: its values of lr, then its learners with their settings.
UPGD, CONSOLIDATION = ("beta_utility", "sigma", "weight_decay"), ("strength", "beta_weight", "beta_importance")
STATISTICS = {
    "input_permuted_mnist": {
        ("upgd", False): (0.001, 0.9, 0.1, 0.01),
        ("upgd", True): (0.01, 0.9999, 0.1, 0.01),
        "pgd": (0.001, 0.05),
        "l2": (0.001, 0.001),
        "shrink_and_perturb": (0.001, 0.05, 0.01),
        "adam": (0.0001, 0.0, 0.0, 0.99),
        "ewc": (0.001, 1.0, 0.9999, 0.999),
        "mas": (0.001, 0.1, 0.9999, 0.999),
        "synaptic_intelligence": (0.001, 10.0, 0.99, 0.99),
        "rwalk": (0.001, 0.1, 0.9999, 0.99),
    },
    "label_permuted_emnist": {
        ("upgd", False): (0.01, 0.9999, 0.01, 0.001),
        ("upgd", True): (0.01, 0.9, 0.001, 0.0),
        "pgd": (0.01, 0.005),
        "l2": (0.01, 0.0001),
        "shrink_and_perturb": (0.01, 0.005, 0.001),
        "adam": (0.0001, 0.1, 0.0, 0.9999),
        "ewc": (0.01, 1.0, 0.9999, 0.9999),
        "mas": (0.01, 1.0, 0.9999, 0.999),
        "synaptic_intelligence": (0.001, 1.0, 0.999, 0.9),
        "rwalk": (0.01, 0.1, 0.9999, 0.999),
    },
    "label_permuted_cifar10": {
        ("upgd", False): (0.01, 0.99, 0.01, 0.001),
        ("upgd", True): (0.01, 0.999, 0.001, 0.0),
        "pgd": (0.001, 0.005),
        "l2": (0.01, 0.001),
        "shrink_and_perturb": (0.01, 0.005, 0.001),
        "adam": (0.001, 0.01, 0.0, 0.9999),
        "ewc": (0.01, 10.0, 0.999, 0.9999),
        "mas": (0.01, 10.0, 0.999, 0.9999),
        "synaptic_intelligence": (0.001, 1.0, 0.999, 0.9),
        "rwalk": (0.01, 0.1, 0.9999, 0.999),
    },
    "label_permuted_mini_imagenet": {
        ("upgd", False): (0.01, 0.999, 0.01, 0.0001),
        ("upgd", True): (0.01, 0.9, 0.001, 0.0),
        "pgd": (0.01, 0.005),
        "l2": (0.01, 0.001),
        "shrink_and_perturb": (0.01, 0.005, 0.001),
        "adam": (0.0001, 0.1, 0.9, 0.9999),
        "ewc": (0.01, 1.0, 0.9999, 0.999),
        "mas": (0.01, 1.0, 0.9999, 0.999),
        "synaptic_intelligence": (0.01, 0.1, 0.999, 0.999),
        "rwalk": (0.01, 0.1, 0.9999, 0.999),
    },
}
NAMES = {
    ("upgd", False): UPGD,
    ("upgd", True): UPGD,
    "bp": (),
    "l2": ("l2",),
    "pgd": ("sigma",),
    "shrink_and_perturb": ("noise", "l2"),
    "adam": ("weight_decay", "b1", "b2"),
    **dict.fromkeys(("ewc", "mas", "synaptic_intelligence", "rwalk"), CONSOLIDATION),
}


def published(texts):
    """Return the methods of the programs: learner and numbers."""
    for method in read_methods(texts):
        learner = method.learner
        if learner == "upgd":
            assert (method.order, method.scope, method.featurewise) == (1, "global", False)
            learner = learner, method.protect
        step = method.step_size
        # Their noise is part of the gradient, ours is part of the update.
        values = [getattr(method, name) / (step if name == "noise" else 1) for name in NAMES[learner]]
        yield learner, tuple(round(value, 9) for value in (step, *values))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_best_settings_are_those_of_the_programs_and_are_in_the_search(problem):
    best = list(published(best_methods(problem)))
    assert len(best) == len(STATISTICS[problem]) == 10 and dict(best) == STATISTICS[problem]
    assert set(best) <= set(published(paper_grid(problem)))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("protect", [True, False])
def test_upgd_is_searched_as_the_programs_do_it(problem, protect):
    found = {numbers for learner, numbers in published(paper_grid(problem)) if learner == ("upgd", protect)}
    betas = (0.99, 0.999) if problem == "label_permuted_emnist" else (0.999, 0.9999)
    decays = (0.0, 0.1, 0.01, 0.001, 0.0001)
    decays = decays[:4] if "cifar10" in problem or "imagenet" in problem else decays
    program = {
        (step, beta, sigma, decay)
        for step in (1e-2, 1e-3, 1e-4, 1e-5)
        for beta in betas
        for sigma in (0.01, 0.1, 1.0)
        for decay in decays
    }
    assert found == program | {STATISTICS[problem]["upgd", protect]}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_noise_and_decay_are_searched_as_the_programs_do_it(problem):
    grid = list(published(paper_grid(problem)))
    steps = {1e-2, 1e-3, 1e-4, 1e-5}
    sigmas = {0.001, 0.01, 0.1} if problem.startswith("input") else {0.005, 0.05, 0.5}
    decays = {0.1, 0.01, 0.001} | ({0.0001} if "mnist" in problem else set())
    numbers = {name: {given for learner, given in grid if learner == name} for name in NAMES}
    assert numbers["bp"] == {(step,) for step in steps}
    expected = {(step, sigma) for step in steps for sigma in sigmas}
    assert numbers["pgd"] == expected | {STATISTICS[problem]["pgd"]}
    expected = {(step, sigma, decay) for step in steps for sigma in sigmas for decay in decays}
    assert numbers["shrink_and_perturb"] == expected | {STATISTICS[problem]["shrink_and_perturb"]}
    assert {given[0] for given in numbers["adam"]} == steps and {given[2] for given in numbers["adam"]} == {0, 0.9}
    for learner in ("ewc", "mas", "synaptic_intelligence", "rwalk"):
        assert {0.999, 0.9999} <= {given[2] for given in numbers[learner]}, learner


def test_there_are_no_other_problems():
    for function in (paper_grid, best_methods):
        with pytest.raises(ValueError, match=r"problem must be one of \['input_permuted_mnist', .*, got 'mnist'"):
            function("mnist")
