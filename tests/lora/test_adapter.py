import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import lora


class Network(nn.Module):
    """A network of a convolution, attention and dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 2), name="conv")(x)).reshape(x.shape[0], -1, 6)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(7, name="up")(x)).mean(1))


NET = Network()
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
PARAMS = jax.jit(NET.init)(jax.random.key(0), X)
KERNELS = {
    "params/attention/key/kernel": ((6,), (2, 3)),
    "params/attention/out/kernel": ((2, 3), (6,)),
    "params/attention/query/kernel": ((6,), (2, 3)),
    "params/attention/value/kernel": ((6,), (2, 3)),
    "params/conv/kernel": ((3, 2, 3), (6,)),
    "params/head/kernel": ((7,), (3,)),
    "params/up/kernel": ((6,), (7,)),
}


def filled(adapter, seed=0):
    """Return the adapter with random factors, as if it had been trained."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), adapter)


def numpy_change(adapter, path):
    """Compute alpha / rank * A B as a product of matrices, in float64, in the kernel's shape."""
    a, b = (np.asarray(adapter.factors[path][name], np.float64) for name in ("lora_A", "lora_B"))
    product = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
    return adapter.alpha / a.shape[-1] * product.reshape(*a.shape[:-1], *b.shape[1:])


def test_factors_are_matrices_of_what_kernels_read_and_make():
    adapter = lora.init(PARAMS, jax.random.key(1), rank=2)
    found = {path: (f["lora_A"].shape, f["lora_B"].shape) for path, f in adapter.factors.items()}
    assert found == {path: ((*inside, 2), (2, *outside)) for path, (inside, outside) in KERNELS.items()}
    assert (adapter.rank, adapter.alpha, adapter.scaling) == (2, 2.0, 1.0)
    assert lora.init(PARAMS, 1, rank=4, alpha=8).scaling == 2.0


def test_a_new_adapter_changes_nothing():
    adapter = lora.init(PARAMS, jax.random.key(1), rank=2, alpha=16)
    jax.tree.map(np.testing.assert_array_equal, lora.apply(PARAMS, adapter), PARAMS)
    for path, (inside, _) in KERNELS.items():
        factors, bound = adapter.factors[path], np.prod(inside) ** -0.5
        assert not factors["lora_B"].any()
        assert 0.5 * bound < jnp.abs(factors["lora_A"]).max() <= bound
    wide = lora.init({"w": jnp.ones((2000, 2))}, 0, rank=5, init_lora_weights="gaussian").factors["w"]["lora_A"]
    np.testing.assert_allclose([wide.mean(), wide.std()], [0, 1 / 5], atol=0.01)


def test_another_choice_of_kernels_draws_the_same_factors():
    one = lora.init(PARAMS, jax.random.key(1), rank=2, target_modules="up")
    every = lora.init(PARAMS, jax.random.key(1), rank=2)
    jax.tree.map(np.testing.assert_array_equal, one.factors, {"params/up/kernel": every.factors["params/up/kernel"]})
    other = lora.init(PARAMS, jax.random.key(2), rank=2, target_modules="up")
    assert (one.factors["params/up/kernel"]["lora_A"] != other.factors["params/up/kernel"]["lora_A"]).all()


def test_the_merged_network_is_the_adapted_one():
    """Dense layers, attention and convolutions agree with NumPy's matrices and with factors applied in turn."""
    adapter = filled(lora.init(PARAMS, jax.random.key(1), rank=2, alpha=3))
    merged = lora.merge(PARAMS, adapter)
    before, after = (cbp_jax.units.leaves_by_path(tree) for tree in (PARAMS, merged))
    for path, leaf in after.items():
        change = numpy_change(adapter, path) if path in KERNELS else 0
        np.testing.assert_allclose(leaf, np.asarray(before[path], np.float64) + change, atol=1e-5)
    adapted = lambda adapter, x: NET.apply(lora.apply(PARAMS, adapter), x)
    outputs = jax.jit(NET.apply)(merged, X)
    assert jnp.abs(outputs - NET.apply(PARAMS, X)).max() > 0.1
    np.testing.assert_allclose(jax.jit(adapted)(adapter, X), outputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lora.factored(adapted))(adapter, X), outputs, rtol=1e-5, atol=1e-5)


def test_unmerged_params_are_what_they_were():
    adapters = [filled(lora.init(PARAMS, jax.random.key(n), rank=n), n) for n in (1, 2)]
    there = lora.unmerge(lora.merge(PARAMS, adapters), adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), there, PARAMS)
    same = lora.unmerge(lora.merge(PARAMS, adapters[1]), lora.init(PARAMS, 0, rank=2))
    assert jnp.abs(same["params"]["up"]["kernel"] - PARAMS["params"]["up"]["kernel"]).max() > 0.1


def test_changes_of_several_adapters_add_up():
    adapters = [filled(lora.init(PARAMS, n, rank=n, target_modules=t), n) for n, t in ((1, "up"), (2, "*"))]
    total = lora.delta(adapters)
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(leaves[0] + leaves[1], leaves[2], atol=1e-6),
                 *map(lora.delta, adapters), total)  # fmt: skip
    jax.tree.map(
        lambda *leaves: np.testing.assert_allclose(leaves[0] + leaves[1], leaves[2], atol=1e-6),
        *(PARAMS, total, lora.apply(PARAMS, adapters)),
    )
    assert not total["params"]["up"]["bias"].any()


def test_a_traced_number_chooses_one_of_several_adapters():
    adapters = [filled(lora.init(PARAMS, n, rank=2), n) for n in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    chosen = jax.jit(lambda n: lora.apply(PARAMS, jax.tree.map(lambda leaf: leaf[n], stacked)))(2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), chosen, lora.apply(PARAMS, adapters[2]))


def test_gradients_reach_only_the_adapter():
    adapter = lora.init(PARAMS, jax.random.key(1), rank=2, target_modules=["conv", "attention/*/kernel"])
    loss = lambda params, adapter: jnp.square(NET.apply(lora.apply(params, adapter), X)).sum()
    of_params, of_adapter = jax.jit(jax.grad(loss, (0, 1)))(PARAMS, adapter)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_params))
    for factors in of_adapter.factors.values():
        assert factors["lora_B"].any() and not factors["lora_A"].any()  # B is 0
    tx = optax.adam(0.01)
    step = lambda: optax.apply_updates(adapter, tx.update(of_adapter, tx.init(adapter), adapter)[0])
    moved = jax.jit(step)()
    values_and_grads = jax.jit(jax.value_and_grad(loss, 1))
    (before, _), (after, grads) = (values_and_grads(PARAMS, each) for each in (adapter, moved))
    assert after < before and all(leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_seeds_are_independent():
    adapters = jax.vmap(lambda key: lora.init(PARAMS, key, rank=2))(jax.random.split(jax.random.key(0), 2))
    outputs = jax.vmap(lambda adapter: NET.apply(lora.apply(PARAMS, adapter), X))(filled(adapters))
    one = NET.apply(lora.apply(PARAMS, jax.tree.map(lambda leaf: leaf[1], filled(adapters))), X)
    np.testing.assert_allclose(outputs[1], one, rtol=1e-5, atol=1e-5)
    a = adapters.factors["params/up/kernel"]["lora_A"]
    assert (a[0] != a[1]).all()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["query", "value"], ["params/attention/query/kernel", "params/attention/value/kernel"]),
        ("attention/*", [path for path in KERNELS if "attention" in path]),
        (["params/up"], ["params/up/kernel"]),
        (["*/up/kernel", "head"], ["params/head/kernel", "params/up/kernel"]),
    ],
)
def test_patterns(patterns, expected):
    assert list(lora.init(PARAMS, 0, rank=1, target_modules=patterns).factors) == expected


def test_axes_of_other_frameworks_and_of_stacked_kernels():
    rng = np.random.default_rng(0)
    params = {"weight": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), "stack": jnp.zeros((4, 3, 5))}
    adapter = lora.init(params, 0, rank=2, axes={"weight": ((-1,), (0,)), "stack": ((1,), (2,))})
    shapes = {path: (f["lora_A"].shape, f["lora_B"].shape) for path, f in adapter.factors.items()}
    assert shapes == {"stack": ((4, 3, 2), (4, 2, 5)), "weight": ((3, 2), (2, 5))}
    adapter = filled(adapter)
    change = lora.delta(adapter)
    np.testing.assert_allclose(change["weight"], numpy_change(adapter, "weight").T, atol=1e-6)
    for layer in range(4):
        one = jax.tree.map(lambda leaf, n=layer: leaf[n], adapter.factors["stack"])
        np.testing.assert_allclose(change["stack"][layer], one["lora_A"] @ one["lora_B"], atol=1e-6)


def test_types():
    params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
    adapter = lora.init(params, 0, rank=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}
    assert lora.apply(params, adapter)["w"].dtype == lora.delta(adapter)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": None}, "rank must be an integer of at least 1, got None"),
        ({"rank": 2, "alpha": -1}, "alpha must be a positive number, got -1"),
        ({"rank": 2, "alpha": "2"}, "alpha must be a positive number, got '2'"),
        ({"rank": 2, "target_modules": ["up", "down"]}, "target_modules: 'down' matches no kernel; the kernels are"),
        ({"rank": 2, "target_modules": ["bias"]}, "target_modules: 'bias' matches no kernel"),
        ({"rank": 2, "target_modules": []}, "target_modules must be one pattern or more"),
        ({"rank": 2, "axes": {"up": ((0,), (2,))}}, r"axes\['up'\] must be different axes of 'params/up/kernel'"),
        ({"rank": 2, "axes": {"down": ((0,), (1,))}}, "axes: 'down' matches no kernel"),
        ({"rank": 2, "init_lora_weights": "olora"}, "init_lora_weights must be 'kaiming' or 'gaussian', got 'olora'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        lora.init(PARAMS, 0, **settings)


def test_params_of_another_network():
    adapter = lora.init({"w": jnp.ones((3, 4))}, 0, rank=1)
    with pytest.raises(ValueError, match=r"kernel 'w' of shape \(3, 4\), .* it has the shape \(4, 3\)"):
        lora.apply({"w": jnp.ones((4, 3))}, adapter)
    with pytest.raises(ValueError, match=r"kernel 'w' .* they have \['v'\]"):
        lora.merge({"v": jnp.ones((3, 4))}, adapter)
    with pytest.raises(ValueError, match="adapter must be an Adapter, or several"):
        lora.apply({"w": jnp.ones((3, 4))}, [])
