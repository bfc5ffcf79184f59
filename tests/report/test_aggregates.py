import itertools

import numpy as np
import pytest
from scipy import stats

from cbp_jax.report.aggregates import draws, interquartile_mean, mean_rank_intervals, ranks, stratified_bootstrap


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 10, 11])
def test_the_interquartile_mean_equals_the_trimmed_mean_of_scipy(n):
    values = np.random.default_rng(n).normal(size=(3, n))
    np.testing.assert_allclose(interquartile_mean(values), stats.trim_mean(values, 0.25, axis=1))
    np.testing.assert_allclose(interquartile_mean(values.T, axis=0), interquartile_mean(values))


def test_one_run_that_diverged_does_not_count():
    assert interquartile_mean(np.array([-np.inf, 1.0, 2.0, 9.0])) == 1.5
    assert interquartile_mean(np.array([-np.inf, -np.inf, 2.0, 9.0])) == -np.inf
    with pytest.raises(ValueError, match="values must have at least one"):
        interquartile_mean(np.zeros((2, 0)))


def exact_interval(problems):
    """Compute the interval from all possible bootstrap samples, which are equally likely."""
    samples = [itertools.product(values, repeat=len(values)) for values in problems]
    found = [stats.trim_mean(np.concatenate(sample), 0.25) for sample in itertools.product(*samples)]
    return np.percentile(found, [2.5, 97.5])


def test_the_stratified_bootstrap_draws_the_runs_of_each_problem_by_itself():
    problems = [np.array([0.0, 1.0, 2.0]), np.array([10.0, 11.0, 15.0])]
    found = stratified_bootstrap(problems, resamples=20_000)
    np.testing.assert_allclose(found, exact_interval(problems), atol=0.35)
    together = stratified_bootstrap([np.concatenate(problems)], resamples=20_000)
    assert together[1] - together[0] > 2 * (found[1] - found[0])  # mixing problems widens intervals
    assert np.isnan(stratified_bootstrap([np.array([1.0]), np.array([2.0])])).all()
    with pytest.raises(ValueError, match="sizes must be at least one, each at least 1, got"):
        stratified_bootstrap([np.array([1.0]), np.array([])])


def test_the_interval_is_that_of_a_loop_over_the_same_draws():
    rng = np.random.default_rng(1)
    problems = [rng.normal(size=n) for n in (5, 7)]
    rows = draws([5, 7], 50)
    found = []
    for i in range(50):
        drawn = [problem[chosen[i]] for problem, chosen in zip(problems, rows, strict=True)]
        found.append(stats.trim_mean(np.concatenate(drawn), 0.25))
    np.testing.assert_allclose(stratified_bootstrap(problems, resamples=50), np.percentile(found, [2.5, 97.5]))


def test_ranks_equal_those_of_scipy():
    values = np.random.default_rng(0).integers(0, 4, size=(6, 9)).astype(float)
    np.testing.assert_array_equal(ranks(values), stats.rankdata(-values, axis=0))
    np.testing.assert_array_equal(ranks(values, axis=1), stats.rankdata(-values, axis=1))


def test_intervals_of_mean_ranks_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    problems = [rng.normal(size=(3, 4)) + np.array([[2.0], [0.0], [0.0]]), rng.normal(size=(3, 5))]
    found = []
    for rows in zip(*draws([4, 5], 40), strict=True):
        means = [stats.trim_mean(each[:, row], 0.25, axis=1) for each, row in zip(problems, rows, strict=True)]
        found.append(np.mean([stats.rankdata(-mean) for mean in means], axis=0))
    expected = np.percentile(found, [2.5, 97.5], axis=0).T
    np.testing.assert_allclose(mean_rank_intervals(problems, resamples=40), expected)
