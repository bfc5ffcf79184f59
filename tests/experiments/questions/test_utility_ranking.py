"""Rankings of units by utilities: what is compared, and that comparing does not change training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import cbp_jax
from cbp_jax.experiments import online_permuted, question_utility_ranking
from cbp_jax.experiments.questions.utility_ranking import MOMENTS, compare, measure_name, onlooker
from cbp_jax.replacement import UTILITIES

PARAMS = {"w1": jnp.ones((4, 6)), "w2": jnp.arange(12.0).reshape(6, 2) - 4}
FEATURES = {"w1": jax.random.normal(jax.random.key(1), (3, 6))}
GRADS = jax.tree.map(lambda w: jax.random.normal(jax.random.key(2), w.shape), PARAMS)


def apply_fn(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


UNITS = cbp_jax.discover_units(apply_fn, PARAMS, jnp.ones((1, 4)))


@pytest.mark.slow
def test_utilities_are_averaged_as_continual_backprop_does():
    """Means equal those of continual backpropagation, and updates those of the inner optimizer."""
    replacing = {"replacement_rate": 0.0, "decay_rate": 0.9}
    cbp = cbp_jax.continual_backprop(optax.sgd(0.1), UNITS, utility="zero_contribution", **replacing)
    watching = onlooker(cbp, UNITS, 0.9, UTILITIES)

    @jax.jit
    def both(params):
        states = cbp.init(params), watching.init(params)
        for _ in range(3):
            extra = {"features": FEATURES, "hessian_diag": GRADS}
            plain, first = cbp.update(GRADS, states[0], params, **extra)
            watched, second = watching.update(GRADS, states[1], params, **extra)
            params, states = optax.apply_updates(params, plain), (first, second)
        return plain, watched, *states

    plain, watched, state, seen = both(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, plain, watched)
    found = seen.memory["utility"]["w1"]["zero_contribution"]
    np.testing.assert_allclose(found, state.utility["w1"], rtol=1e-5)
    np.testing.assert_allclose(seen.memory["weight"]["w1"], 1 - 0.9**3, rtol=1e-5)


def test_correlations_equal_those_of_scipy():
    rng = np.random.default_rng(0)
    values = {name: jnp.asarray(rng.normal(size=6), jnp.float32) for name in UTILITIES}
    true, weight = jnp.asarray(rng.normal(size=6), jnp.float32), jnp.asarray([0.5, 0.1, 0.9, 0.3, 1.0, 0.0])
    found = compare([true], {"weight": {"w1": weight}, "utility": {"w1": values}}, UNITS, tuple(UTILITIES))
    for number, name in enumerate(UTILITIES):
        mean = np.asarray(values[name]) / np.where(weight > 0, weight, 1)
        np.testing.assert_allclose(found["spearman"][number, 0], stats.spearmanr(mean, true)[0], atol=1e-5)
        np.testing.assert_allclose(found["pearson"][number, 0], stats.pearsonr(mean, true)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 51}, "window must be at most half of the 100 updates of a task, got 51"),
        ({"decay_rate": 1.0}, r"decay_rate must be in \[0, 1\), got 1.0"),
        ({"utilities": ()}, "utilities must be at least one, got none"),
        ({"utilities": ("worth",)}, "utility must be a callable, its path as in .* or one of .* got 'worth'"),
        ({"utilities": ("taylor", "fisher", "taylor")}, "utilities must have different names, got 'taylor' twice"),
        ({"hidden": ()}, "hidden must be at least one layer and the same for all methods"),
        ({"methods": ("cbp:hidden=3",)}, "hidden must be at least one layer and the same for all methods"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        question_utility_ranking.prepare(dataclasses.replace(question_utility_ranking.preset("smoke"), **setting))


def opposite(view):
    return -cbp_jax.replacement.get_utility("taylor")(view)


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path):
    """The network learns the same as without comparisons, and correlations belong to their layers."""
    settings = question_utility_ranking.preset("smoke")
    settings = dataclasses.replace(settings, utilities=(*settings.utilities, opposite))
    results = question_utility_ranking.run(settings, tmp_path / "watched")
    for utility in UTILITIES:
        values = results[measure_name(utility, "spearman", "late", 2)].values
        assert np.isfinite(values).all() and np.abs(values).max() <= 1
    np.testing.assert_allclose(results.opposite_spearman_late_1, -results.taylor_spearman_late_1, atol=1e-5)
    assert not np.allclose(results.taylor_spearman_early_1, results.taylor_spearman_late_1)
    common = {field.name for field in dataclasses.fields(online_permuted.Settings)}
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name in common}
    alone = online_permuted.run(online_permuted.Settings(**plain), tmp_path / "alone")
    np.testing.assert_allclose(results.loss, alone.loss, rtol=1e-4)
    np.testing.assert_array_equal(results.replaced_units, alone.replaced_units)
    table = question_utility_ranking.summary(results)
    assert all(f"{moment}, layer 2" in table for moment in MOMENTS) and "upgd_second_order" in table
    (picture,) = question_utility_ranking.plot(results, tmp_path)
    assert picture.stat().st_size > 10_000
