"""Tests for errors of earlier implementations of continual backpropagation, and for bad input.

Most tests use activations and gradients made by hand, so that the unit to replace is known in advance.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_stale_gradient_cannot_revive_a_zeroed_weight": ("per-weight-adam", "momentum"),
    "test_compensation_keeps_the_output_of_a_dense_network": ("False",),
    "test_non_finite_utility_never_wins_and_more_than_the_rest_leaves_no_debt": ("nan",),
    "test_without_replacement_the_updates_are_bit_identical_to_the_inner_ones": (
        "per-weight-adam",
        "chain",
        "momentum",
    ),
    "test_moments_of_replaced_units_return_to_their_initial_values_and_no_others": (
        "chain",
        "adam",
        "adagrad",
        "momentum",
        "multisteps",
    ),
}

UTILITIES = ["contribution", "zero_contribution", "adaptation", "adaptable_contribution", "weight", "random"]


def mlp(params, x, activation=jnp.tanh):
    for i in range(1, len(params) + 1):
        layer = params[f"layer_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = activation(x) if i < len(params) else x
    return x


def make_params(sizes, seed=0):
    """Make weights and biases that are not 0, so that every later zero was set by a replacement."""
    rng = np.random.default_rng(seed)
    value = lambda *shape: jnp.asarray(rng.uniform(0.1, 0.9, shape) * rng.choice([-1, 1], shape), jnp.float32)
    return {
        f"layer_{i}": {"kernel": value(n, m), "bias": value(m)} for i, (n, m) in enumerate(itertools.pairwise(sizes), 1)
    }


def make(sizes, seed=0):
    params = make_params(sizes, seed)
    return params, cbp_jax.discover_units(mlp, params, jnp.ones((4, sizes[0])))


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)


def convolve(x, kernel, padding="VALID"):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=dims)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def random_like(tree, seed):
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


def hold(tx, params, features, steps, grads=None):
    """Apply `steps` updates with the same activations and gradients.

    Return (params, state) at the end, and the histories of params and state, as NumPy arrays.
    """
    grads = zeros(params) if grads is None else grads

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params, features=features)
        carry = optax.apply_updates(params, updates), state
        return carry, (carry[0], state._replace(inner_state=()))

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps))
    return jax.device_get(run(params))


def start(tx, params):
    return jax.jit(tx.init)(params)


def update(tx, grads, state, params, features):
    """Return the new params and the new state."""

    def step(grads, state, params, features):
        updates, state = tx.update(grads, state, params, features=features)
        return optax.apply_updates(params, updates), state

    return jax.device_get(jax.jit(step)(grads, state, params, features))


def trace(tx, params, **kwargs):
    """Trace init and update without compiling them, which is enough to raise an error."""
    jax.eval_shape(lambda params: tx.update(zeros(params), tx.init(params), params, **kwargs), params)


def counts(state, group="layer_1"):
    return state.replaced[group].sum(-1).tolist()


def still(units, **kwargs):
    """Make a transformation whose inner optimizer changes nothing, so that all changes are due to replacements."""
    return cbp_jax.continual_backprop(optax.sgd(0.0), units, **kwargs)


def lowest(sizes, **units):
    """Make activations with which `units[layer]` has its layer's lowest utility, for any weights of make_params."""
    features = {}
    for i, size in enumerate(sizes[1:-1], 1):
        h = np.full((4, size), 100.0, np.float32)
        h[:, units.get(f"layer_{i}", 0)] = 1e-3
        features[f"layer_{i}"] = jnp.asarray(h)
    return features


# ------------------------------------------------------------------------------------------------ selection


def test_budget_grows_only_with_eligible_units_without_a_burst_when_the_first_mature():
    params, units = make((3, 10, 2))
    features = {"layer_1": jnp.arange(1.0, 41.0).reshape(4, 10)}
    _, (_, state) = hold(still(units, replacement_rate=0.06, maturity_threshold=20), params, features, 26)
    # 10 eligible from step 21 on: .6, 1.2 -> 1; then 9: .74, 1.28 -> 1; then 8: .76, 1.24 -> 1.
    assert counts(state) == [0] * 21 + [1, 0, 1, 0, 1]


def test_rate_above_one_over_width_replaces_several_a_step_and_keeps_the_fraction():
    params, units = make((3, 10, 2))
    features = {"layer_1": jnp.arange(1.0, 41.0).reshape(4, 10)}
    _, (_, state) = hold(still(units, replacement_rate=0.25, maturity_threshold=0), params, features, 8)
    assert counts(state) == [2, 3] * 4
    assert np.all(state.budget["layer_1"] < 1)


def test_fractions_that_sum_to_a_whole_number_lose_no_unit_to_rounding():
    params, units = make((3, 10, 2))
    features = {"layer_1": jnp.arange(1.0, 41.0).reshape(4, 10)}
    _, (_, state) = hold(still(units, replacement_rate=0.001, maturity_threshold=0), params, features, 300)
    # In float32 a hundred times 0.01 is 0.99999934.
    assert counts(state) == ([0] * 99 + [1]) * 3


def test_rate_one_replaces_every_unit_every_step():
    params, units = make((3, 5, 2))
    features = {"layer_1": jnp.ones((4, 5))}
    _, (_, state) = hold(still(units, replacement_rate=1.0, maturity_threshold=0), params, features, 3)
    assert counts(state) == [5, 5, 5]


def test_age_must_exceed_the_maturity_threshold():
    params, units = make((3, 5, 2))
    features = {"layer_1": jnp.ones((4, 5))}
    _, (_, state) = hold(still(units, replacement_rate=1.0, maturity_threshold=3), params, features, 9)
    assert counts(state) == [0, 0, 0, 5, 0, 0, 0, 5, 0]
    assert state.age["layer_1"][:, 0].tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_immature_units_are_never_replaced():
    sizes = (3, 5, 2)
    params, units = make(sizes)
    tx = still(units, replacement_rate=0.5, maturity_threshold=10)
    state = start(tx, params)
    age = {"layer_1": jnp.asarray([50, 10, 9, 50, 3], state.age["layer_1"].dtype)}
    # The units of age 9 and 3 have the lowest utility. Those of age 50, 50 and 10 + 1 are eligible: the budget is 1.5.
    features = {"layer_1": jnp.asarray([[3.0, 4.0, 1e-3, 5.0, 1e-3]])}
    _, state = update(tx, zeros(params), state._replace(age=age), params, features)
    assert np.flatnonzero(state.replaced["layer_1"]).tolist() in ([0], [1], [3])
    assert state.replaced["layer_1"].sum() == 1
    assert state.age["layer_1"][2] == 10 and state.age["layer_1"][4] == 4


def test_ranking_corrects_each_utility_by_the_unit_s_own_age():
    params, units = make((3, 3, 2))
    params["layer_2"]["kernel"] = jnp.ones((3, 2))
    tx = still(units, replacement_rate=0.34, maturity_threshold=1, decay_rate=0.99)
    state = start(tx, params)
    age = np.asarray([1000, 4, 1000])
    level = np.asarray([1.0, 1.5, 2.0])  # mean activations, in the order of corrected utilities
    utility = 2 * level * (1 - 0.99**age)  # the young unit's running mean is still close to 0
    state = state._replace(
        age={"layer_1": jnp.asarray(age, state.age["layer_1"].dtype)},
        utility={"layer_1": jnp.asarray(utility, jnp.float32)},
    )
    features = {"layer_1": jnp.asarray(level, jnp.float32)[None]}
    _, state = update(tx, zeros(params), state, params, features)
    assert state.replaced["layer_1"].tolist() == [True, False, False]


@pytest.mark.parametrize("utility", ["contribution", "weight"])
def test_ties_replace_exactly_as_many_as_the_budget_says(utility):
    params, units = make((3, 10, 2))
    params["layer_2"]["kernel"] = jnp.ones((10, 2))
    tx = still(units, replacement_rate=0.3, maturity_threshold=0, utility=utility)
    _, (_, state) = hold(tx, params, {"layer_1": jnp.ones((4, 10))}, 1)
    assert counts(state) == [3]


def test_all_zero_utilities_are_a_tie_too():
    params, units = make((3, 10, 2))
    _, (_, state) = hold(
        still(units, replacement_rate=0.3, maturity_threshold=0), params, {"layer_1": jnp.zeros((4, 10))}, 1
    )
    assert counts(state) == [3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_utility_never_wins_and_more_than_the_rest_leaves_no_debt(bad):
    params, units = make((3, 5, 2))
    features = {"layer_1": jnp.asarray([[1.0, bad, 2.0, bad, bad]])}
    (params, state), (_, history) = hold(still(units, replacement_rate=1.0, maturity_threshold=0), params, features, 3)
    assert history.replaced["layer_1"].tolist() == [[True, False, True, False, False]] * 3
    slow = still(units, replacement_rate=1e-4, maturity_threshold=0)
    _, state = update(slow, zeros(params), state, params, features)
    assert not state.replaced["layer_1"].any(), "replacements that were not possible are not made up for later"


def test_non_finite_utility_does_not_take_the_place_of_the_least_finite_one():
    params, units = make((3, 5, 2))
    values = jnp.asarray([-jnp.inf, jnp.nan, 3.0, 1.0, jnp.inf])
    for rate, gone in ((0.2, [3]), (0.4, [2, 3])):
        tx = still(units, replacement_rate=rate, maturity_threshold=0, utility=lambda view: values)
        _, (_, state) = hold(tx, params, {"layer_1": jnp.ones((1, 5))}, 1)
        assert np.flatnonzero(state.replaced["layer_1"][0]).tolist() == gone


@pytest.mark.parametrize(("utility", "gone"), [("adaptable_contribution", 1), ("adaptation", 0)])
def test_units_without_incoming_weights_have_a_finite_utility(utility, gone):
    """They are constant, so the adaptable contribution is 0, while adaptation is very large. The mean is rounded."""
    params, units = make((3, 5, 2))
    params["layer_1"]["kernel"] = jnp.full((3, 5), 2.0).at[:, 0].set(3.0).at[:, 1].set(0.0)
    features = {"layer_1": jnp.asarray([[1.0, 0.7, 2.0, 3.0, 4.0], [2.0, 0.7, 3.0, 4.0, 5.0]])}
    _, (_, state) = hold(still(units, replacement_rate=0.2, maturity_threshold=0, utility=utility), params, features, 1)
    assert np.flatnonzero(state.replaced["layer_1"][0]).tolist() == [gone]
    assert np.isfinite(state.utility["layer_1"]).all()


@pytest.mark.parametrize("sizes", [(3, 5, 2), (4, 4, 4)])
def test_the_absolute_value_is_taken_of_each_element_before_the_mean(sizes):
    params, units = make(sizes)
    params["layer_2"]["kernel"] = jnp.ones(sizes[1:])
    h = np.full((4, sizes[1]), 2.0, np.float32)
    h[:, 1] = [9, -9, 9, -9]  # mean 0, mean magnitude 9
    h[:, 2] = 1.0  # the unit to replace
    tx = still(units, replacement_rate=1 / sizes[1], maturity_threshold=0, decay_rate=0.5)
    _, (_, state) = hold(tx, params, {"layer_1": jnp.asarray(h)}, 1)
    assert np.flatnonzero(state.replaced["layer_1"][0]).tolist() == [2]


@pytest.mark.parametrize(
    ("sizes", "utility"),
    [((3, 5, 2), utility) for utility in UTILITIES[:-1]] + [((4, 4, 4), "contribution"), ((4, 4, 4), "weight")],
)
def test_utilities_are_the_equations(sizes, utility):
    params, units = make(sizes)
    h = np.random.default_rng(3).normal(size=(6, sizes[1])).astype(np.float32)
    tx = still(units, replacement_rate=0.0, decay_rate=0.9, utility=utility)
    _, (_, state) = hold(tx, params, {"layer_1": jnp.asarray(h)}, 2)
    v = np.abs(params["layer_1"]["kernel"]).sum(0)
    w = np.abs(params["layer_2"]["kernel"]).sum(1)
    centered = np.abs(h - h.mean(0)).mean(0) * w  # the same batch twice: the corrected mean is its mean
    y = {
        "contribution": np.abs(h).mean(0) * w,
        "zero_contribution": centered,
        "adaptation": 1 / v,
        "adaptable_contribution": centered / v,
        "weight": w,
    }[utility]
    np.testing.assert_allclose(state.utility["layer_1"], np.stack([0.1 * y, 0.19 * y]), rtol=1e-5)


def test_outgoing_weights_are_taken_after_the_inner_update():
    params, units = make((3, 4, 2))
    grads = random_like(params, 1)
    tx = cbp_jax.continual_backprop(optax.sgd(0.5), units, replacement_rate=0.0, decay_rate=0.0, utility="weight")
    _, (after, state) = hold(tx, params, {"layer_1": jnp.ones((1, 4))}, 1, grads)
    want = np.abs(params["layer_2"]["kernel"] - 0.5 * grads["layer_2"]["kernel"]).sum(1)
    np.testing.assert_allclose(state.utility["layer_1"][0], want, rtol=1e-5)
    np.testing.assert_allclose(np.abs(after["layer_2"]["kernel"][0]).sum(1), want, rtol=1e-5)


def test_random_utility_picks_different_units():
    params, units = make((3, 20, 2))
    tx = still(units, replacement_rate=0.05, maturity_threshold=0, utility="random", decay_rate=0.0)
    _, (_, state) = hold(tx, params, {"layer_1": jnp.ones((4, 20))}, 40)
    picked = state.replaced["layer_1"].argmax(-1)
    assert counts(state) == [1] * 40
    assert len(set(picked.tolist())) > 8


def test_max_replacements_bounds_the_step():
    params, units = make((3, 10, 2))
    features = {"layer_1": jnp.arange(1.0, 41.0).reshape(4, 10)}
    tx = still(units, replacement_rate=0.5, maturity_threshold=0, max_replacements=2)
    _, (_, state) = hold(tx, params, features, 4)
    assert counts(state) == [2] * 4


# -------------------------------------------------------------------------------------------------- surgery


def test_reset_unit_gets_new_incoming_weights_zero_bias_zero_outgoing_weights_and_a_new_state():
    sizes = (3, 5, 2)
    params, units = make(sizes)
    tx = still(units, replacement_rate=0.2, maturity_threshold=0)
    (new, state), _ = hold(tx, params, lowest(sizes, layer_1=2), 1)
    kept = np.asarray([0, 1, 3, 4])
    assert np.flatnonzero(state.replaced["layer_1"]).tolist() == [2]
    assert np.all(new["layer_1"]["kernel"][:, 2] != params["layer_1"]["kernel"][:, 2])
    assert new["layer_1"]["bias"][2] == 0 and np.all(new["layer_2"]["kernel"][2] == 0)
    for field in ("utility", "age", "mean_activation"):
        for values in jax.tree.leaves(getattr(state, field)["layer_1"]):
            assert np.all(values[..., 2] == 0) and np.all(values[..., kept] != 0), field
    np.testing.assert_array_equal(new["layer_1"]["kernel"][:, kept], params["layer_1"]["kernel"][:, kept])
    np.testing.assert_array_equal(new["layer_1"]["bias"][kept], params["layer_1"]["bias"][kept])
    np.testing.assert_array_equal(new["layer_2"]["kernel"][kept], params["layer_2"]["kernel"][kept])
    np.testing.assert_array_equal(new["layer_2"]["bias"], params["layer_2"]["bias"])


@pytest.mark.parametrize("order", ["nhwc", "nchw"])
def test_flatten_order_of_conv_to_dense(order):
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": draw(rng, 2, 2, 2, 3), "bias": draw(rng, 3)},
        "dense": {"kernel": draw(rng, 18, 4), "bias": draw(rng, 4)},
    }
    x = draw(rng, 2, 5, 8, 2)

    def apply_fn(params, x):
        h = jnp.tanh(convolve(x, params["conv"]["kernel"]) + params["conv"]["bias"])
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")  # [2, 2, 3, 3]
        if order == "nchw":
            h = h.transpose(0, 3, 1, 2)
        return h.reshape(len(x), -1) @ params["dense"]["kernel"] + params["dense"]["bias"]

    units = cbp_jax.discover_units(apply_fn, params, x)
    assert [(g.name, g.size) for g in units] == [("conv", 3)]
    tx = still(units, replacement_rate=0.34, maturity_threshold=0)
    _, features = jax.jit(cbp_jax.with_features(apply_fn, units))(params, x)
    assert features["conv"].shape == (2, 6, 3)
    (new, state), _ = hold(tx, params, {"conv": features["conv"] * jnp.asarray([1.0, 1e-4, 1.0])}, 1)
    assert state.replaced["conv"].tolist() == [False, True, False]
    rows = np.arange(6) * 3 + 1 if order == "nhwc" else 6 + np.arange(6)
    zeroed = np.all(new["dense"]["kernel"] == 0, axis=1)
    assert np.flatnonzero(zeroed).tolist() == rows.tolist()
    kept = np.setdiff1d(np.arange(18), rows)
    np.testing.assert_array_equal(new["dense"]["kernel"][kept], params["dense"]["kernel"][kept])


def test_positions_with_outgoing_weights_of_their_own_are_weighted_separately():
    """Channel 0 is active only at positions that nothing reads: large mean activation and weights, no contribution."""
    kernel = np.zeros((2, 2, 3), np.float32)  # [positions, channels, outputs]
    kernel[0, 0], kernel[1, 0], kernel[:, 1] = 10.0, 0.0, 1.0
    params = {
        "conv": {"kernel": jnp.ones((1, 1, 1, 2)), "bias": jnp.ones(2)},
        "dense": {"kernel": jnp.asarray(kernel.reshape(4, 3))},
    }

    def apply_fn(params, x):
        h = convolve(x, params["conv"]["kernel"])
        return jax.nn.relu(h + params["conv"]["bias"]).reshape(len(x), -1) @ params["dense"]["kernel"]

    units = cbp_jax.discover_units(apply_fn, params, jnp.ones((1, 1, 2, 1)))
    tx = still(units, replacement_rate=0.5, maturity_threshold=0)
    features = {"conv": jnp.asarray([[[0.0, 1.0], [10.0, 1.0]]])}
    _, (_, state) = hold(tx, params, features, 1)
    assert state.replaced["conv"].tolist() == [[True, False]]


def test_several_heads_are_all_zeroed():
    rng = np.random.default_rng(0)
    layer = lambda n, m: {"w": draw(rng, n, m), "b": jnp.ones(m)}
    params = {"torso": layer(3, 5), "policy": layer(5, 4), "value": layer(5, 1)}

    def apply_fn(params, x):
        h = jnp.tanh(x @ params["torso"]["w"] + params["torso"]["b"])
        head = lambda p: h @ p["w"] + p["b"]
        return head(params["policy"]), head(params["value"])

    units = cbp_jax.discover_units(apply_fn, params, jnp.ones((4, 3)))
    assert [g.name for g in units] == ["torso"] and len(units[0].outgoing) == 2
    tx = still(units, replacement_rate=0.2, maturity_threshold=0)
    features = {"torso": jnp.asarray([[5.0, 4.0, 3.0, 1e-4, 2.0]])}
    (new, _), _ = hold(tx, params, features, 1)
    for head in ("policy", "value"):
        assert np.flatnonzero(np.all(new[head]["w"] == 0, axis=1)).tolist() == [3]
    np.testing.assert_array_equal(new["policy"]["b"], params["policy"]["b"])


def test_adjacent_groups_replaced_together_leave_the_weight_between_the_new_units_resampled():
    sizes = (3, 4, 6, 2)
    params, units = make(sizes)
    tx = still(units, replacement_rate=0.5, maturity_threshold=0)
    features = {
        "layer_1": jnp.asarray([[9.0, 9.0, 0.1, 0.1]]),
        "layer_2": jnp.asarray([[0.1, 9.0, 0.1, 9.0, 0.1, 9.0]]),
    }
    (new, state), _ = hold(tx, params, features, 1)
    first, second = state.replaced["layer_1"], state.replaced["layer_2"]
    assert first.tolist() == [False, False, True, True] and second.tolist() == [True, False] * 3
    between = new["layer_2"]["kernel"]
    assert np.all(between[np.ix_(first, second)] != 0), "from new unit to new unit: resampled"
    assert np.all(between[np.ix_(~first, second)] != params["layer_2"]["kernel"][np.ix_(~first, second)])
    assert np.all(between[np.ix_(first, ~second)] == 0), "from new unit to old unit: exactly 0"
    np.testing.assert_array_equal(
        between[np.ix_(~first, ~second)], params["layer_2"]["kernel"][np.ix_(~first, ~second)]
    )
    assert np.all(new["layer_3"]["kernel"][second] == 0)


@pytest.mark.parametrize(
    ("inner", "reset", "revived"),
    [
        ("momentum", True, False),
        ("adam", True, False),
        ("per-weight-adam", True, False),
        ("momentum", False, True),
    ],
    ids=["momentum", "adam", "per-weight-adam", "momentum-without-reset"],
)
def test_stale_gradient_cannot_revive_a_zeroed_weight(inner, reset, revived):
    sizes = (3, 5, 2)
    params, units = make(sizes)
    tx = cbp_jax.continual_backprop(
        INNER_STATES[inner](), units, replacement_rate=0.2, maturity_threshold=4, reset_inner_state=reset
    )
    features = lowest(sizes, layer_1=1)
    (params, state), (_, history) = hold(tx, params, features, 5, grads=random_like(params, 1))
    assert counts(history) == [0, 0, 0, 0, 1] and state.replaced["layer_1"][1]
    assert np.all(params["layer_2"]["kernel"][1] == 0) and params["layer_1"]["bias"][1] == 0
    after, state = update(tx, zeros(params), state, params, features)
    assert not state.replaced["layer_1"].any()
    moved = [after["layer_2"]["kernel"][1] != 0, after["layer_1"]["bias"][1] != 0]
    moved.append(after["layer_1"]["kernel"][:, 1] != params["layer_1"]["kernel"][:, 1])
    assert all(np.all(m) for m in moved) if revived else not any(np.any(m) for m in moved)


@pytest.mark.parametrize("mode", ["fan_avg", "fan_out"])
def test_resampled_variance_is_that_of_the_full_kernel(mode):
    """One column is drawn at a time; its own fans would give too large a variance for fan_avg and fan_out."""
    sizes = (20, 40, 2)
    params, units = make(sizes)
    initializer = jax.nn.initializers.variance_scaling(1.0, mode, "uniform")
    tx = still(units, replacement_rate=0.0251, maturity_threshold=0, initializer=initializer)
    _, (history, state) = hold(tx, params, lowest(sizes, layer_1=7), 80)
    step, unit = np.nonzero(state.replaced["layer_1"])
    drawn = history["layer_1"]["kernel"][step, :, unit]
    assert len(drawn) >= 78
    bound = np.sqrt(3 / {"fan_avg": 30, "fan_out": 40}[mode])
    assert 0.97 * bound < np.abs(drawn).max() <= bound * 1.0001
    np.testing.assert_allclose(drawn.std(), bound / np.sqrt(3), rtol=0.05)
    assert len(np.unique(drawn)) > 0.99 * drawn.size, "every step draws new weights"


@pytest.mark.slow
def test_resampled_variance_of_a_convolution():
    rng = np.random.default_rng(0)
    params = {"conv": draw(rng, 3, 3, 2, 12), "dense": draw(rng, 12, 2)}

    def apply_fn(params, x):
        return jnp.tanh(convolve(x, params["conv"], "SAME")).mean((1, 2)) @ params["dense"]

    units = cbp_jax.discover_units(apply_fn, params, jnp.ones((1, 4, 4, 2)))
    tx = still(
        units,
        replacement_rate=0.084,
        maturity_threshold=0,
        initializer=jax.nn.initializers.glorot_uniform(),
    )
    features = {"conv": jnp.arange(1.0, 13.0)[None, None]}
    _, (history, state) = hold(tx, params, features, 100)
    step, unit = np.nonzero(state.replaced["conv"])
    drawn = history["conv"][step, :, :, :, unit]
    assert len(drawn) >= 100
    bound = np.sqrt(6 / (9 * 2 + 9 * 12))
    assert 0.97 * bound < np.abs(drawn).max() <= bound * 1.0001


def test_default_initializer_is_he_uniform_and_columns_of_one_step_differ():
    params, units = make((20, 10, 2))
    tx = still(units, replacement_rate=0.5, maturity_threshold=0)
    (new, state), _ = hold(tx, params, {"layer_1": jnp.arange(1.0, 11.0)[None]}, 1)
    drawn = new["layer_1"]["kernel"][:, state.replaced["layer_1"]]
    bound = np.sqrt(6 / 20)
    assert drawn.shape == (20, 5) and 0.9 * bound < np.abs(drawn).max() <= bound * 1.0001
    assert len(np.unique(drawn)) > 95


def test_custom_initializer_reaches_the_incoming_weights():
    params, units = make((3, 5, 2))
    tx = still(units, replacement_rate=0.2, maturity_threshold=0, initializer=jax.nn.initializers.constant(0.25))
    (new, _), _ = hold(tx, params, lowest((3, 5, 2), layer_1=4), 1)
    np.testing.assert_allclose(new["layer_1"]["kernel"][:, 4], 0.25, rtol=1e-6)


@pytest.mark.slow
def test_more_than_ten_layers_whose_names_sort_differently_are_connected_in_forward_order():
    sizes = (4,) * 14
    params, units = make(sizes)
    assert list(params) != sorted(params)
    assert [g.name for g in units] == [f"layer_{i}" for i in range(1, 13)]
    going = {f"layer_{i}": i % 4 for i in range(1, 13)}
    tx = still(units, replacement_rate=0.25, maturity_threshold=0)
    (new, state), _ = hold(tx, params, lowest(sizes, **going), 1)
    for i in range(1, 13):
        unit = going[f"layer_{i}"]
        assert np.flatnonzero(state.replaced[f"layer_{i}"]).tolist() == [unit]
        assert np.all(new[f"layer_{i}"]["kernel"][:, unit] != params[f"layer_{i}"]["kernel"][:, unit])
        following = new[f"layer_{i + 1}"]["kernel"] == 0
        expected = np.zeros((4, 4), bool)
        expected[unit] = True
        if i < 12:
            expected[:, going[f"layer_{i + 1}"]] = False
        np.testing.assert_array_equal(following, expected)


# --------------------------------------------------------------------------------------------- compensation


def compensation(apply_fn, params, x, compensate=True):
    """Return the change of the output in three steps on one input; the last step replaces units."""
    units = cbp_jax.discover_units(apply_fn, params, x)
    before, features = jax.jit(cbp_jax.with_features(apply_fn, units))(params, x)
    tx = still(units, replacement_rate=0.5, maturity_threshold=2, compensate_bias=compensate)
    (new, _), (_, history) = hold(tx, params, features, 3)
    for g in units:
        assert counts(history, g.name) == [0, 0, g.size // 2]
    return np.abs(jax.jit(apply_fn)(new, x) - before).max()


@pytest.mark.parametrize("compensate", [True, False])
def test_compensation_keeps_the_output_of_a_dense_network(compensate):
    params = make_params((3, 6, 8, 2))
    x = jnp.broadcast_to(jnp.asarray([0.3, -1.2, 0.7]), (4, 3))
    assert (compensation(mlp, params, x, compensate) < 1e-5) == compensate


def test_compensation_keeps_the_output_of_convolutions_on_a_uniform_image():
    rng = np.random.default_rng(0)
    params = {"a": [draw(rng, 2, 2, 1, 4), draw(rng, 4)], "b": [draw(rng, 2, 2, 4, 6), draw(rng, 6)]}
    params["c"] = [draw(rng, 2 * 3 * 6, 3), draw(rng, 3)]

    def apply_fn(params, x):
        for name in "ab":
            x = jnp.tanh(convolve(x, params[name][0]) + params[name][1])
        return x.reshape(len(x), -1) @ params["c"][0] + params["c"][1]

    assert compensation(apply_fn, params, jnp.full((3, 4, 5, 1), 0.8)) < 1e-5


def test_compensation_takes_the_mean_of_each_position_that_has_weights_of_its_own():
    rng = np.random.default_rng(0)
    params = {"a": [draw(rng, 2, 2, 1, 4), draw(rng, 4)], "c": [draw(rng, 2 * 3 * 4, 3), draw(rng, 3)]}

    def apply_fn(params, x):
        x = jnp.tanh(convolve(x, params["a"][0]) + params["a"][1])
        return x.reshape(len(x), -1) @ params["c"][0] + params["c"][1]

    uneven = jnp.broadcast_to(draw(rng, 1, 3, 4, 1), (3, 3, 4, 1))
    assert compensation(apply_fn, params, uneven) < 1e-5


# ---------------------------------------------------------------------------------------------- inner state

INNER_STATES = {
    "adam": lambda: optax.adam(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda: optax.adagrad(0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, initial_scale=0.5),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.chain(optax.scale_by_adam(), optax.scale(-0.1))),
    "masked": lambda: optax.masked(
        optax.adam(0.1),
        lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: "kernel" in str(p[-1]), tree),
    ),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "multisteps": lambda: optax.MultiSteps(optax.adam(0.1), every_k_schedule=2),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        {"layer_1": "a", "layer_2": "b"},
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "adamw-schedule": lambda: optax.adamw(optax.linear_schedule(0.1, 0.01, 10)),
    "per-weight-adam": lambda: cbp_jax.adam(0.1),
}


# Wrappers differ in the same places; two of them are enough in CI.
LIKE_OTHERS = ("rmsprop", "inject", "multi_transform", "apply_if_finite", "adamw-schedule")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else []) for name in INNER_STATES]
)
def test_moments_of_replaced_units_return_to_their_initial_values_and_no_others(name, exact):
    sizes = (3, 5, 2)
    params, units = make(sizes)
    inner = INNER_STATES[name]()
    tx = cbp_jax.continual_backprop(inner, units, replacement_rate=0.2, maturity_threshold=2)
    features = lowest(sizes, layer_1=3)

    @jax.jit
    def plain(grads, state):
        return inner.update(grads, state, params)

    @jax.jit
    def replacing(grads, state):
        return tx.update(grads, state, params, features=features)

    want, state = jax.jit(inner.init)(params), start(tx, params)
    for seed in range(3):
        grads = random_like(params, seed)
        want_updates, want = plain(grads, want)
        updates, state = replacing(grads, state)
    assert np.flatnonzero(state.replaced["layer_1"]).tolist() == [3]

    touched = jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), params)
    touched["layer_1"]["kernel"][:, 3] = True
    touched["layer_1"]["bias"][3] = touched["layer_2"]["kernel"][3] = True
    keep = lambda mask, a, b: np.testing.assert_array_equal(np.asarray(a)[~mask], np.asarray(b)[~mask])
    jax.tree.map(keep, touched, updates, want_updates)

    assert jax.tree.structure(state.inner_state) == jax.tree.structure(want)
    compared = 0
    initial = jax.tree.leaves(inner.init(params))
    wanted = jax.tree_util.tree_leaves_with_path(want)
    for (path, w), got, first in zip(wanted, jax.tree.leaves(state.inner_state), initial, strict=True):
        keys = [getattr(k, "key", None) for k in path]
        layer = next((k for k in keys if k in touched), None)
        if layer is None:
            np.testing.assert_array_equal(got, w)
            continue
        leaf = next(k for k in keys if k in ("kernel", "bias"))
        np.testing.assert_array_equal(got, np.where(touched[layer][leaf], first, w), err_msg=str(path))
        compared += 1
    assert compared >= 2


def test_without_reset_the_inner_state_is_unchanged():
    sizes = (3, 5, 2)
    params, units = make(sizes)
    grads = random_like(params, 0)
    tx = cbp_jax.continual_backprop(
        optax.adam(0.1), units, replacement_rate=0.2, maturity_threshold=0, reset_inner_state=False
    )
    _, state = update(tx, grads, start(tx, params), params, lowest(sizes))
    _, want = jax.jit(lambda g, p: optax.adam(0.1).update(g, optax.adam(0.1).init(p), p))(grads, params)
    assert state.replaced["layer_1"].any()
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, want)


def test_unknown_inner_state_raises_unless_it_is_not_to_be_reset():
    params, units = make((3, 5, 2))
    odd = optax.GradientTransformation(lambda _: {"buffer": jnp.zeros((7, 3))}, lambda g, s, p=None: (g, s))

    def run(**kwargs):
        tx = cbp_jax.continual_backprop(odd, units, **kwargs)
        trace(tx, params, features={"layer_1": jnp.ones((1, 5))})

    with pytest.raises((ValueError, TypeError), match=r"buffer|inner"):
        run()
    run(reset_inner_state=False)


def test_factored_moments_raise_too():
    """Adafactor keeps row and column statistics, in which the parts of single units cannot be separated."""
    params, units = make((128, 130, 2))
    tx = cbp_jax.continual_backprop(optax.adafactor(0.1), units)
    with pytest.raises((ValueError, TypeError), match=r"v_row|v_col"):
        trace(tx, params, features={"layer_1": jnp.ones((1, 130))})


@pytest.mark.slow
def test_first_step_after_a_reset_is_of_ordinary_size_with_a_count_per_weight():
    sizes = (3, 5, 2)
    params, units = make(sizes)
    grads = jax.tree.map(jnp.ones_like, params)
    features = lowest(sizes, layer_1=1)

    def first_step(inner):
        tx = cbp_jax.continual_backprop(inner, units, replacement_rate=0.2, maturity_threshold=5999)
        (now, state), _ = hold(tx, params, features, 6000, grads)
        assert state.replaced["layer_1"].sum() == 1
        after, _ = update(tx, grads, state, now, features)
        return np.abs(after["layer_2"]["kernel"])[np.argmax(state.replaced["layer_1"])]

    np.testing.assert_allclose(first_step(cbp_jax.adam(1e-4)), 1e-4, rtol=1e-4)
    # With Adam's shared count, new moments are not bias-corrected: the step is (1 - b1) / sqrt(1 - b2) times too large.
    np.testing.assert_allclose(first_step(optax.adam(1e-4)), 3.16e-4, rtol=0.01)


# ------------------------------------------------------------------------------------------------------ JAX


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("inner", ["adam", "momentum", "chain", "per-weight-adam"])
def test_without_replacement_the_updates_are_bit_identical_to_the_inner_ones(inner):
    params, units = make((3, 6, 5, 2))
    inner = INNER_STATES[inner]()
    tx = cbp_jax.continual_backprop(inner, units, replacement_rate=0.0, maturity_threshold=0)
    features = lowest((3, 6, 5, 2))
    wrapped = jax.jit(lambda g, s, p: tx.update(g, s, p, features=features))
    plain = jax.jit(inner.update)
    a, b, state, inner_state = params, params, start(tx, params), inner.init(params)
    for seed in range(4):
        grads = random_like(params, seed)
        u, state = wrapped(grads, state, a)
        v, inner_state = plain(grads, inner_state, b)
        jax.tree.map(np.testing.assert_array_equal, u, v)
        a, b = optax.apply_updates(a, u), optax.apply_updates(b, v)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, inner_state)


def test_a_traced_rate_of_zero_is_bit_identical_too():
    params, units = make((3, 6, 2))
    grads, features = random_like(params, 0), lowest((3, 6, 2))

    @jax.jit
    def updates(rate):
        tx = cbp_jax.continual_backprop(optax.sgd(0.1), units, replacement_rate=rate, maturity_threshold=0)
        return tx.update(grads, tx.init(params), params, features=features)[0]

    want, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates(0.0), want)


@pytest.mark.slow
def test_captured_key_gives_every_vmapped_seed_its_own_noise_and_the_solo_run_s_result():
    _, units = make((3, 5, 2))
    seeds = [make_params((3, 5, 2), seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    tx = still(units, replacement_rate=1.0, maturity_threshold=1, key=3)
    features = {"layer_1": jnp.ones((1, 5))}

    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(zeros(params), state, params, features=features)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=4)[0]

    params, state = jax.jit(jax.vmap(run))(stacked)
    solo = jax.jit(run)
    for i, seed in enumerate(seeds):
        jax.tree.map(lambda all_, one, i=i: np.testing.assert_array_equal(all_[i], one), (params, state), solo(seed))
    fresh = np.asarray(params["layer_1"]["kernel"])
    assert np.all(state.replaced["layer_1"])
    assert np.all(fresh[0] != fresh[1]) and np.all(fresh[1] != fresh[2]) and np.all(fresh[0] != fresh[2])


@pytest.mark.slow
def test_key_may_be_an_int_a_key_or_traced_and_decides_the_draw():
    params, units = make((3, 5, 2))
    features = {"layer_1": jnp.ones((1, 5))}

    def draw(key):
        tx = still(units, replacement_rate=1.0, maturity_threshold=0, key=key)
        updates, _ = tx.update(zeros(params), tx.init(params), params, features=features)
        return optax.apply_updates(params, updates)["layer_1"]["kernel"]

    captured = lambda key: jax.jit(lambda: draw(key))()
    np.testing.assert_array_equal(captured(5), captured(5))
    assert np.all(captured(5) != captured(6))
    typed, raw = jax.random.key(1), jax.random.PRNGKey(1)
    np.testing.assert_array_equal(captured(typed), jax.jit(draw)(typed))
    np.testing.assert_array_equal(captured(raw), jax.jit(draw)(raw))
    rows = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 3))
    assert np.all(rows[0] != rows[1]) and np.all(rows[1] != rows[2])


@pytest.mark.slow
def test_grid_of_hyperparameters_is_a_vmap():
    params, units = make((3, 10, 2))
    grads = jax.tree.map(lambda leaf: 0.01 * leaf, random_like(params, 0))
    features = {"layer_1": jnp.asarray(np.random.default_rng(1).normal(size=(4, 10)), jnp.float32)}

    def run(rate, decay, maturity, step_size, key):
        tx = cbp_jax.continual_backprop(
            optax.sgd(step_size),
            units,
            replacement_rate=rate,
            decay_rate=decay,
            maturity_threshold=maturity,
            key=key,
        )

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params, features=features)
            return (optax.apply_updates(params, updates), state), state.replaced["layer_1"]

        (final, _), replaced = jax.lax.scan(step, (params, tx.init(params)), length=12)
        return final, replaced

    grid = [(0.013, 0.9, 2, 0.1, 0), (0.25, 0.99, 0, 0.3, 1), (0.0, 0.5, 5, 0.0, 2), (1.0, 0.0, 3, 0.2, 3)]
    columns = [jnp.asarray(c) for c in zip(*grid, strict=True)]
    finals, replaced = jax.jit(jax.vmap(run))(*columns)
    assert [int(r.sum()) for r in replaced][:3] == [1, 30, 0] and replaced[3].sum() == 30
    solo = jax.jit(run)
    for i, point in enumerate(grid):
        final, mask = solo(*point)
        np.testing.assert_array_equal(replaced[i], mask)
        jax.tree.map(lambda g, s, i=i: np.testing.assert_allclose(g[i], s, rtol=0, atol=1e-6), finals, final)
    # Constant settings choose the same units (their new weights may be other draws).
    np.testing.assert_array_equal(replaced[1], jax.jit(lambda: run(*grid[1])[1])())


def test_second_call_does_not_trace_again():
    params, units = make((3, 5, 2))
    tx = cbp_jax.continual_backprop(optax.adam(0.1), units, replacement_rate=0.4, maturity_threshold=0)
    features, grads = lowest((3, 5, 2), layer_1=2), random_like(params, 0)
    traces = []

    @jax.jit
    def step(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params, features=features)

    state = start(tx, params)
    for _ in range(3):
        _, state = step(grads, state, params)
    assert len(traces) == 1


def test_bfloat16_parameters_keep_their_type_and_are_zeroed_exactly():
    sizes = (3, 5, 2)
    params, units = make(sizes)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tx = cbp_jax.continual_backprop(optax.sgd(0.1), units, replacement_rate=0.2, maturity_threshold=0)
    features = jax.tree.map(lambda h: h.astype(jnp.bfloat16), lowest(sizes, layer_1=2))
    grads = random_like(params, 0)
    (new, state), _ = hold(tx, params, features, 1, grads)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(new))
    assert np.flatnonzero(state.replaced["layer_1"]).tolist() == [2]
    assert np.all(new["layer_2"]["kernel"][2] == 0) and new["layer_1"]["bias"][2] == 0
    utility = state.utility["layer_1"]
    assert utility.dtype == np.float32, "a running mean with weight 0.01 for the new value is lost in bfloat16"


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("replacement_rate", -0.125),
        ("replacement_rate", 1.5),
        ("replacement_rate", float("nan")),
        ("decay_rate", -0.25),
        ("decay_rate", 1.0),
        ("decay_rate", 1.5),
        ("maturity_threshold", -1),
        ("utility", "magic"),
        ("max_replacements", -2),
    ],
)
def test_bad_settings_are_refused_at_once(argument, value):
    _, units = make((3, 5, 2))
    with pytest.raises(ValueError, match=rf"(?s){argument}.*{value}"):
        cbp_jax.continual_backprop(optax.sgd(0.1), units, **{argument: value})


def test_unknown_utility_names_those_that_exist():
    _, units = make((3, 5, 2))
    with pytest.raises(ValueError, match=r"adaptable_contribution"):
        cbp_jax.continual_backprop(optax.sgd(0.1), units, utility="adaptive")


def test_missing_features_are_refused():
    params, units = make((3, 5, 4, 2))
    tx = still(units)
    with pytest.raises((ValueError, TypeError), match="features"):
        trace(tx, params)
    with pytest.raises((ValueError, TypeError), match="features"):
        trace(tx, params, features=None)
    with pytest.raises((ValueError, KeyError), match=r"(?s)features.*layer_2|layer_2.*features"):
        trace(tx, params, features={"layer_1": jnp.ones((1, 5))})


@pytest.mark.parametrize("shape", [(4, 6), (5, 4), (), (4, 1)])
def test_features_of_the_wrong_shape_are_refused(shape):
    params, units = make((3, 5, 2))
    tx = still(units)
    with pytest.raises(ValueError, match=r"(?s)layer_1"):
        trace(tx, params, features={"layer_1": jnp.ones(shape)})


def test_missing_params_are_refused():
    params, units = make((3, 5, 2))
    tx = still(units)
    features = {"layer_1": jnp.ones((1, 5))}
    with pytest.raises(ValueError, match="params"):
        jax.eval_shape(lambda p: tx.update(zeros(p), tx.init(p), features=features), params)


@pytest.mark.parametrize("sizes", [(3, 6, 2), (3, 4, 2)])
def test_units_with_another_width_are_refused(sizes):
    _, units = make((3, 5, 2))
    with pytest.raises(ValueError, match=r"layer_1|layer_2"):
        jax.eval_shape(still(units).init, make_params(sizes))


def test_units_with_other_names_are_refused():
    params, units = make((3, 5, 2))
    renamed = {"other_1": params["layer_1"], "layer_2": params["layer_2"]}
    with pytest.raises((ValueError, KeyError), match="layer_1"):
        jax.eval_shape(still(units).init, renamed)
    with pytest.raises((ValueError, KeyError), match="layer_2"):
        jax.eval_shape(still(units).init, {"layer_1": params["layer_1"]})


def test_no_units_at_all_are_refused():
    with pytest.raises(ValueError, match="units"):
        still(()).init(make_params((3, 5, 2)))


def test_kernels_given_in_place_of_units_are_refused():
    params = make_params((3, 5, 2))
    with pytest.raises((ValueError, TypeError), match="units"):
        still(params).init(params)
