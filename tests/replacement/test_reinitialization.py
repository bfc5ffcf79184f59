"""Initial weights of replaced units: each reinitialization, on units of a convolution and of a dense layer at once."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax.replacement import REINITIALIZATIONS, Fresh, get_reinitialization
from cbp_jax.replacement.reinitialization import split

CHOSEN = {"params/Conv_0": [3, 0], "params/Dense_0": [1, 2, 5]}  # adjacent groups
UTILITY = {"params/Conv_0": [0.0, 2.0, jnp.nan, 0.0], "params/Dense_0": [3.0, 0.0, 0.0, 5.0, 4.0, 0.0, 1.0]}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (2, 2))(x)).reshape(len(x), -1)
        x = nn.relu(nn.Dense(7)(x))
        return nn.Dense(3)(x)


NET, X = Net(), jax.random.normal(jax.random.key(0), (5, 3, 2, 2))
INITIAL = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(NET.init)(jax.random.key(1), X))
UNITS = cbp_jax.discover_units(NET.apply, INITIAL, X)
draw = lambda seed: lambda leaf: jnp.asarray(np.random.default_rng(seed).normal(size=leaf.shape), jnp.float32)
PARAMS, GRADS = jax.tree.map(draw(2), INITIAL), jax.tree.map(draw(3), INITIAL)
GRADS["params"]["Dense_0"]["kernel"] = GRADS["params"]["Dense_0"]["kernel"].at[:, 1].set(0.0)  # a dead unit


@functools.cache
def replaced(reinitialization, chosen=None):
    """Return parameters and momentum after an update that replaces units."""
    numbers = chosen or (lambda group: CHOSEN[group.name])

    def choose(view, memory):
        name = view.group.name
        return cbp_jax.Choice(jnp.array(numbers(view.group)), {}, None, jnp.array(UTILITY[name]))

    tx = cbp_jax.replace_units(optax.sgd(0.0, 0.9), UNITS, cbp_jax.Policy(choose), reinitialization=reinitialization)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(initial, params, grads):
        state = tx.init(initial)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates)["params"], state.inner_state[0].trace["params"]

    return jax.tree.map(np.asarray, run(INITIAL, PARAMS, GRADS))


def removed():
    """Return the parameters with outgoing weights of the chosen units set to 0."""
    params = jax.tree.map(np.array, PARAMS)["params"]
    params["Dense_0"]["kernel"].reshape(-1, 4, 7)[:, CHOSEN["params/Conv_0"]] = 0
    params["Dense_1"]["kernel"][CHOSEN["params/Dense_0"]] = 0
    return params


def columns(kernel, units):
    return np.asarray(kernel).reshape(-1, kernel.shape[-1])[:, units]


@pytest.mark.slow
@pytest.mark.parametrize("name", REINITIALIZATIONS)
def test_others_are_left_alone(name):
    """Other units keep their incoming weights; only `split` and `resample_both` change outgoing weights."""
    params, trace = replaced(name)
    before = PARAMS["params"]
    for layer, chosen in (("Conv_0", [3, 0]), ("Dense_0", [1, 2, 5])):
        living = np.setdiff1d(np.arange(before[layer]["bias"].size), chosen)
        np.testing.assert_array_equal(params[layer]["bias"][living], before[layer]["bias"][living])
        assert np.abs(columns(trace[layer]["kernel"], chosen)).max() == 0
        assert np.abs(trace[layer]["bias"][chosen]).max() == 0
        np.testing.assert_array_equal(
            columns(trace["Conv_0"]["kernel"], [1, 2]), columns(GRADS["params"]["Conv_0"]["kernel"], [1, 2])
        )
    if name not in ("split", "resample_both"):
        kept = removed()
        np.testing.assert_array_equal(
            columns(params["Dense_0"]["kernel"], [0, 3, 4, 6]), columns(kept["Dense_0"]["kernel"], [0, 3, 4, 6])
        )
        np.testing.assert_array_equal(params["Dense_1"]["kernel"], kept["Dense_1"]["kernel"])
    np.testing.assert_array_equal(trace["Dense_1"]["kernel"][[1, 2, 5]], 0)
    np.testing.assert_array_equal(trace["Dense_1"]["kernel"][3], GRADS["params"]["Dense_1"]["kernel"][3])  # a donor's


def test_split_keeps_the_function():
    params, _ = replaced(functools.partial(split, noise=0.0))
    want = NET.apply({"params": removed()}, X)
    np.testing.assert_allclose(NET.apply({"params": params}, X), want, rtol=1e-4, atol=1e-5)
    # Unit 2 of the convolution has no finite utility, so there is no donor for the second replaced unit.
    np.testing.assert_allclose(columns(params["Conv_0"]["kernel"], 3), columns(params["Conv_0"]["kernel"], 1))
    assert np.abs(params["Dense_0"]["kernel"].reshape(-1, 4, 7)[:, 0, [0, 3, 4, 6]]).max() == 0
    for unit, donor in ((1, 3), (2, 4), (5, 0)):
        half = PARAMS["params"]["Dense_1"]["kernel"][donor] / 2
        np.testing.assert_allclose(params["Dense_1"]["kernel"][unit], half, rtol=1e-5)
        np.testing.assert_allclose(params["Dense_1"]["kernel"][donor], half, rtol=1e-5)
        np.testing.assert_allclose(
            params["Dense_0"]["bias"][unit], PARAMS["params"]["Dense_0"]["bias"][donor], rtol=1e-5
        )


@pytest.mark.slow
def test_split_without_a_living_unit_draws_weights():
    everyone = lambda group: list(range(group.size))
    drawn, halves = replaced("resample", everyone)[0], replaced("split", everyone)[0]
    jax.tree.map(np.testing.assert_array_equal, drawn, halves)


def test_rewind_and_resample_both():
    params, _ = replaced("rewind")
    for layer, units in (("Conv_0", [3, 0]), ("Dense_0", [1, 2, 5])):
        start = jax.tree.map(np.asarray, INITIAL["params"][layer])
        np.testing.assert_allclose(columns(params[layer]["kernel"], units), columns(start["kernel"], units), atol=1e-6)
        np.testing.assert_allclose(params[layer]["bias"][units], start["bias"][units], atol=1e-6)
    both, resampled = replaced("resample_both")[0], replaced("resample")[0]
    np.testing.assert_allclose(columns(both["Dense_0"]["kernel"], 1), columns(resampled["Dense_0"]["kernel"], 1))
    fresh = both["Dense_1"]["kernel"][[1, 2, 5]]
    assert 0 < np.abs(fresh).min() and np.abs(fresh).max() <= np.sqrt(6 / 7)  # he_uniform with a fan-in of 7


def test_orthogonal_and_regrow():
    drawn, straight, grown = (replaced(name)[0] for name in ("resample", "orthogonal", "regrow"))
    before, grads = removed()["Dense_0"]["kernel"], GRADS["params"]["Dense_0"]["kernel"]
    living, length = before[:, [0, 3, 4, 6]], lambda x: np.linalg.norm(x, axis=0)
    for params in (straight, grown):
        for layer, units in (("Conv_0", [3, 0]), ("Dense_0", [1, 2, 5])):
            got, want = (columns(tree[layer]["kernel"], units) for tree in (params, drawn))
            np.testing.assert_allclose(length(got), length(want), rtol=1e-5)
    got = straight["Dense_0"]["kernel"][:, [1, 2, 5]]
    assert np.abs(living.T @ got).max() < 1e-4
    # The drawn vector is projected on the orthogonal complement of the others.
    basis = np.linalg.svd(living)[0][:, 4:]
    want = basis @ (basis.T @ drawn["Dense_0"]["kernel"][:, [1, 2, 5]])
    np.testing.assert_allclose(got / length(got), want / length(want), atol=1e-4)
    way = np.stack([grads[:, [0, 3, 4, 6]].sum(1), grads[:, 2], grads[:, 5]], 1)  # unit 1 is dead
    got = grown["Dense_0"]["kernel"][:, [1, 2, 5]]
    np.testing.assert_allclose(got / length(got), -way / length(way), atol=1e-5)


def test_a_users_function():
    ones = lambda new: Fresh(tuple(jnp.ones_like(rows) for rows in new.drawn))
    np.testing.assert_allclose(columns(replaced(ones)[0]["Dense_0"]["kernel"], [1, 5]), 1.0, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"<lambda> must give incoming of group 'params/Conv_0' the shapes .*, got \[\]"
    ):
        replaced(lambda new: Fresh(()))
    with pytest.raises(ValueError, match="must return a Fresh, got tuple"):
        replaced(lambda new: new.drawn)
    with pytest.raises(ValueError, match=r"must be a callable or one of \['orthogonal', .*, got 'best'"):
        get_reinitialization("best")


def test_split_needs_utilities():
    policy = cbp_jax.Policy(lambda view, memory: cbp_jax.Choice(jnp.array([0])))
    tx = cbp_jax.replace_units(optax.sgd(0.1), UNITS, policy, reinitialization="split")
    with pytest.raises(ValueError, match=r"the policy must give Choice\(utility=\.\.\.\)"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), PARAMS)


def test_initial_parameters_are_kept_in_the_state():
    """It is a copy, so that params and state can both be donated. Only `rewind` needs it."""
    make = lambda name: cbp_jax.continual_backprop(optax.sgd(0.1), UNITS, reinitialization=name)
    state = make("rewind").init(INITIAL)
    assert sorted(state.initial) == [
        f"params/{layer}/{leaf}" for layer in ("Conv_0", "Dense_0") for leaf in ("bias", "kernel")
    ]
    kernel, kept = INITIAL["params"]["Conv_0"]["kernel"], state.initial["params/Conv_0/kernel"]
    np.testing.assert_array_equal(kept, kernel)
    assert kept.unsafe_buffer_pointer() != kernel.unsafe_buffer_pointer()
    assert not make("split").init(INITIAL).initial


@pytest.mark.slow
def test_wrapping_transformations_accept_the_kept_initial_parameters():
    tx = cbp_jax.continual_backprop(optax.sgd(0.1), UNITS, reinitialization="rewind")
    mask = cbp_jax.tickets.random_mask_like(cbp_jax.tickets.full_mask(INITIAL), jax.random.key(0))
    for around in (
        cbp_jax.tickets.masked(tx, mask),
        cbp_jax.shrink_and_perturb(tx, 0.1, 0.1),
    ):
        features = jax.eval_shape(cbp_jax.with_features(NET.apply, UNITS), INITIAL, X)[1]
        jax.eval_shape(lambda p, f, tx=around: tx.update(p, tx.init(p), p, features=f), INITIAL, features)


@pytest.mark.slow
@pytest.mark.parametrize("name", REINITIALIZATIONS)
def test_compensation_adds_the_removed_contribution_to_the_bias(name):
    """With every reinitialization, the mean contribution of the replaced unit is added to the bias."""
    _, features = cbp_jax.with_features(NET.apply, UNITS)(PARAMS, X)

    def biases(compensate):
        tx = cbp_jax.continual_backprop(
            optax.sgd(0.0),
            UNITS[1:],
            reinitialization=name,
            compensate_bias=compensate,
            maturity_threshold=0,
            replacement_rate=0.3,
        )
        update = jax.jit(lambda p, f: tx.update(p, tx.init(p), p, features=f))
        updates, state = update(PARAMS, features)
        return updates["params"]["Dense_1"]["bias"], state.replaced["params/Dense_0"]

    (plain, replaced), (compensated, same) = biases(False), biases(True)
    np.testing.assert_array_equal(replaced, same)
    gave = np.where(replaced, features["params/Dense_0"].mean(0), 0.0) @ PARAMS["params"]["Dense_1"]["kernel"]
    np.testing.assert_allclose(compensated - plain, gave, rtol=1e-4, atol=1e-6)


def test_further_random_numbers_are_not_those_of_the_weights():
    def telling(new):
        """New weights are 1 if the key for further numbers is also a key of weights, otherwise 0."""
        same = [(jax.random.key_data(new.key) == jax.random.key_data(key)).all() for key in new.keys]
        return Fresh([jnp.full_like(drawn, jnp.stack(same).any()) for drawn in new.drawn])

    params, _ = replaced(telling)
    assert (columns(params["Conv_0"]["kernel"], [3, 0]) == 0).all()
    assert (columns(params["Dense_0"]["kernel"], [1, 2, 5]) == 0).all()
