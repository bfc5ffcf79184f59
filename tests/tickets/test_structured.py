import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cbp_jax
from cbp_jax import nets
from cbp_jax.tickets import apply_mask, full_mask, masked, prune_units, shrink_batch_stats, shrink_params, unit_mask

RNG = np.random.default_rng(0)


def network(net, *shape):
    """Return random variables, an input, and the units."""
    x = jnp.asarray(RNG.normal(size=(3, *shape)), jnp.float32)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(RNG.uniform(0.2, 1.0, leaf.shape) * RNG.choice([1, 1, -1], leaf.shape), jnp.float32),
        jax.eval_shape(net.init, jax.random.key(0), x),
    )
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])  # variances
    return variables, x, cbp_jax.discover_units(net.apply, variables, x, check=True)


def some(units, counts):
    """Choose so many units of each group at random."""
    return {
        group.name: jnp.asarray(RNG.permutation(group.size) < count) for group, count in zip(units, counts, strict=True)
    }


def assert_same_outputs(net, smaller, variables, x, units, keep):
    mask, apply = unit_mask(variables, units, keep), jax.jit(net.apply)
    expected = apply(apply_mask(variables, mask), x)
    small = shrink_params(variables, units, keep)
    found = jax.jit(smaller.apply)(small, x)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    assert (np.abs(np.asarray(apply(variables, x)) - expected) > 1e-3).any()  # removed units mattered
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert size(small) < size(variables)
    return small


def test_a_multilayer_perceptron():
    net = nets.MLP((8, 6), 3, activation="sigmoid")  # its activation is not 0 at 0
    variables, x, units = network(net, 5)
    small = assert_same_outputs(
        net, nets.MLP((5, 2), 3, activation="sigmoid"), variables, x, units, some(units, (5, 2))
    )
    assert small["params"]["Dense_1"]["kernel"].shape == (5, 2)


def test_convolutions_in_front_of_dense_layers():
    net = nets.ConvNet(3, channels=(4, 5), kernel_sizes=(3, 3), hidden=(7,), padding="SAME")
    variables, x, units = network(net, 8, 8, 2)
    smaller = nets.ConvNet(3, channels=(3, 2), kernel_sizes=(3, 3), hidden=(4,), padding="SAME")
    small = assert_same_outputs(net, smaller, variables, x, units, some(units, (3, 2, 4)))
    assert small["params"]["Dense_0"]["kernel"].shape == (2 * 2 * 2, 4)


@pytest.mark.slow
def test_a_residual_network_with_running_statistics():
    net = nets.ResNet(3, widths=(4, 6), blocks=(1, 1))
    variables, x, units = network(net, 6, 6, 2)
    keep = some(units, [3 if group.size == 4 else 4 for group in units])
    small = assert_same_outputs(net, nets.ResNet(3, widths=(3, 4), blocks=(1, 1)), variables, x, units, keep)
    assert small["batch_stats"]["stem_norm"]["mean"].shape == (3,)
    # The same if statistics are not part of the params.
    apply = lambda params, stats, x: net.apply({"params": params, "batch_stats": stats}, x)
    params, stats = variables["params"], variables["batch_stats"]
    apart = cbp_jax.discover_units(apply, params, stats, x)
    keep = {name.removeprefix("params/"): each for name, each in keep.items()}
    found = {"params": shrink_params(params, apart, keep), "batch_stats": shrink_batch_stats(stats, apart, keep)}
    jax.tree.map(np.testing.assert_array_equal, found, small)


def attention(params, x):
    """Compute attention by hand; the number of heads is that of its parameters."""
    query, key, value = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", query, key))
    return jnp.einsum("bhts,bshk,hkd->btd", weights, value, params["o"])


def test_attention_heads():
    shapes = {"q": (6, 4, 3), "k": (6, 4, 3), "v": (6, 4, 3), "o": (4, 3, 6)}
    params = {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(RNG.normal(size=(2, 5, 6)), jnp.float32)
    units = cbp_jax.discover_units(attention, params, x)
    (group,) = units
    assert (group.kind, group.size) == ("head", 4)
    keep = {group.name: jnp.array([True, False, False, True])}
    small = shrink_params(params, units, keep)
    assert {name: leaf.shape for name, leaf in small.items()} == {
        **dict.fromkeys("qkv", (6, 2, 3)), "o": (2, 3, 6)
    }  # fmt: skip
    expected = attention(apply_mask(params, unit_mask(params, units, keep)), x)
    np.testing.assert_allclose(attention(small, x), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=12)
@given(data=st.data())
@pytest.mark.slow
def test_random_networks(data):
    """Networks with layers of any size and concatenated inputs, from which any units are removed."""
    sizes = data.draw(st.tuples(*[st.integers(2, 4)] * 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    a, b, c = sizes
    params = {"a": normal(3, a), "b": normal(3, b), "bias": normal(b), "c": normal(a + b, c), "out": normal(c, 2)}

    def apply(params, x):
        h = jnp.concatenate([jnp.tanh(x @ params["a"]), jax.nn.relu(x @ params["b"] + params["bias"])], -1)
        return jnp.cos(h @ params["c"]) @ params["out"]

    x = normal(4, 3)
    units = cbp_jax.discover_units(apply, params, x)
    keep = {}
    for group in units:
        kept = data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size).filter(any))
        keep[group.name] = np.asarray(kept)
    expected = apply(apply_mask(params, unit_mask(params, units, keep)), x)
    small = shrink_params(params, units, keep)
    np.testing.assert_allclose(apply(small, x), expected, rtol=1e-4, atol=1e-5)
    assert small["c"].shape == (keep["a"].sum() + keep["b"].sum(), keep["c"].sum())


NET = nets.MLP((8, 6), 3)
VARIABLES, X, UNITS = network(NET, 5)
NAMES = [group.name for group in UNITS]


def test_exactly_the_given_fraction_of_units_of_least_utility_is_pruned():
    utility = {NAMES[0]: jnp.array([3.0, 1, 1, 1, 9, 0, 1, 2]), NAMES[1]: jnp.array([5.0, 4, 3, 2, 1, 0])}
    keep = prune_units(VARIABLES, UNITS, 0.5, utility=utility)
    assert keep[NAMES[0]].tolist() == [True, False, False, False, True, False, True, True]
    assert keep[NAMES[1]].tolist() == [True, True, True, False, False, False]
    again = prune_units(VARIABLES, UNITS, 0.5, keep=keep, utility=utility)
    assert again[NAMES[0]].tolist() == [True, False, False, False, True, False, False, False]
    assert again[NAMES[1]].tolist() == [True, False, False, False, False, False]  # round(1.5) is 2
    everywhere = prune_units(VARIABLES, UNITS, 0.5, utility=utility, scope="global")
    assert sum(int(each.sum()) for each in everywhere.values()) == 7
    assert everywhere[NAMES[0]].tolist() == [True, False, False, False, True, False, False, True]


def test_utilities_by_name_are_those_of_continual_backpropagation():
    _, features = cbp_jax.with_features(NET.apply, UNITS)(VARIABLES, X)
    kernels = [np.asarray(VARIABLES["params"][f"Dense_{n}"]["kernel"], np.float64) for n in range(3)]
    for number, name in enumerate(NAMES):
        h = np.asarray(features[name], np.float64)
        expected = {
            "contribution": np.abs(h).mean(0) * np.abs(kernels[number + 1]).sum(1),
            "zero_contribution": np.abs(h - h.mean(0)).mean(0) * np.abs(kernels[number + 1]).sum(1),
            "weight": np.abs(kernels[number + 1]).sum(1),
            "adaptation": 1 / np.abs(kernels[number]).sum(0),
        }
        for utility, values in expected.items():
            keep = prune_units(VARIABLES, UNITS, 0.5, utility=utility, features=features)[name]
            gone = np.argsort(values, kind="stable")[: values.size // 2]
            assert sorted(np.flatnonzero(~np.asarray(keep))) == sorted(gone), utility
    by_gradient = lambda view: sum(part.sum(jnp.abs(view.grads[part.path])).sum(0) for part in view.group.incoming)
    grads = jax.tree.map(jnp.zeros_like, VARIABLES)
    grads["params"]["Dense_0"]["kernel"] = jnp.ones((5, 8)) * jnp.arange(8)[::-1]
    keep = prune_units(VARIABLES, UNITS, 0.5, utility=by_gradient, grads=grads)[NAMES[0]]
    assert keep.tolist() == [True] * 4 + [False] * 4
    keys = [prune_units(VARIABLES, UNITS, 0.5, utility="random", key=key)[NAMES[0]].tolist() for key in range(5)]
    assert len(set(map(tuple, keys))) > 1


@pytest.mark.parametrize(
    ("utility", "words"),
    [
        ("zero_contribution", "features must hold the activations of group"),
        ("taylor", "this utility needs gradients: prune_units"),
        ("gradient", "this utility needs gradients: prune_units"),
        ("upgd_second_order", "utility must not need curvature, .* got 'upgd_second_order'"),
    ],
)
def test_what_a_utility_needs_is_named(utility, words):
    with pytest.raises(ValueError, match=words):
        prune_units(VARIABLES, UNITS, 0.5, utility=utility)


def test_under_vmap():
    utilities = {group.name: jnp.asarray(RNG.normal(size=(3, group.size))) for group in UNITS}
    together = jax.jit(jax.vmap(lambda utility: prune_units(VARIABLES, UNITS, 0.3, utility=utility)))(utilities)
    for row in range(3):
        alone = prune_units(VARIABLES, UNITS, 0.3, utility={name: each[row] for name, each in utilities.items()})
        jax.tree.map(lambda a, b, row=row: np.testing.assert_array_equal(a[row], b), together, alone)


def test_training_under_a_mask_of_units_and_removing_them_afterwards():
    keep = prune_units(VARIABLES, UNITS, 0.5)
    mask = unit_mask(VARIABLES, UNITS, keep)
    assert jax.tree.structure(mask) == jax.tree.structure(full_mask(VARIABLES))
    assert all(mask["params"][layer]["bias"].all() for layer in mask["params"])
    tx = masked(optax.adam(0.05), mask)
    params, state = apply_mask(VARIABLES, mask), tx.init(VARIABLES)
    step = jax.jit(lambda p, s: tx.update(jax.grad(lambda p: jnp.sum(NET.apply(p, X) ** 2))(p), s, p))
    for _ in range(5):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    smaller = nets.MLP((4, 3), 3)
    found = smaller.apply(shrink_params(params, UNITS, keep), X)
    np.testing.assert_allclose(found, NET.apply(params, X), rtol=1e-4, atol=1e-4)


def test_bad_input():
    keep = prune_units(VARIABLES, UNITS, 0.5, utility="weight")
    with pytest.raises(ValueError, match="scope must be 'layer' or 'global', got 'unit'"):
        prune_units(VARIABLES, UNITS, 0.5, scope="unit")
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 1"):
        prune_units(VARIABLES, UNITS, 1)
    with pytest.raises(ValueError, match="leaves no unit of group"):
        prune_units(VARIABLES, UNITS, 0.95, utility="weight")
    with pytest.raises(ValueError, match="features must hold the activations of group"):
        prune_units(VARIABLES, UNITS, 0.5, utility="contribution")
    with pytest.raises(ValueError, match="utility must be a callable, its path"):
        prune_units(VARIABLES, UNITS, 0.5, utility="worth")
    with pytest.raises(ValueError, match="utility must have an array for each group; it has none for"):
        prune_units(VARIABLES, UNITS, 0.5, utility={NAMES[0]: jnp.ones(8)})
    with pytest.raises(ValueError, match=r"must be of shape \(6,\), got \(8,\)"):
        prune_units(VARIABLES, UNITS, 0.5, utility={name: jnp.ones(8) for name in NAMES})
    with pytest.raises(ValueError, match="keep must be of the groups"):
        shrink_params(VARIABLES, UNITS, {"Dense_9": jnp.ones(8, bool)})
    with pytest.raises(ValueError, match=r"must be bool of shape \(8,\), got float32\[8\]"):
        shrink_params(VARIABLES, UNITS, {NAMES[0]: jnp.ones(8)})
    with pytest.raises(ValueError, match="has no unit left"):
        shrink_params(VARIABLES, UNITS, {NAMES[0]: jnp.zeros(8, bool)})
    with pytest.raises(ValueError, match="must not be traced"):
        jax.jit(lambda keep: shrink_params(VARIABLES, UNITS, keep))(keep)
    with pytest.raises(ValueError, match="units do not match the params"):
        shrink_params({"w": jnp.ones((2, 2))}, UNITS, keep)
    normalized = nets.MLP((8,), 3, normalization="layer")
    variables, _, units = network(normalized, 5)
    with pytest.raises(ValueError, match="are normalized together"):
        shrink_params(variables, units, {units[0].name: jnp.arange(8) < 4})


def test_what_is_left_must_be_an_array():
    part = cbp_jax.ParamSlice("w", (0, 1), np.array([[0, 3]]), 4)
    rest = [cbp_jax.ParamSlice.whole_axis("v", 0, 2)]
    group = cbp_jax.UnitGroup("g", 2, (part,), (), tuple(cbp_jax.Consumer(each) for each in rest))
    params = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="units of group 'g' cannot be cut out of 'w': what is left is no array"):
        shrink_params(params, [group], {"g": jnp.array([True, False])})
