import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.nets import MLP, fan_in_uniform
from cbp_jax.units import discover_units, with_features

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)


def test_outputs_against_numpy():
    net = MLP(hidden=(5, 4), num_outputs=3, activation="tanh")
    params = net.init(jax.random.key(0), X)
    h = X
    for name in ("Dense_0", "Dense_1"):
        layer = params["params"][name]
        h = jnp.tanh(h @ layer["kernel"] + layer["bias"])
    head = params["params"]["Dense_2"]
    np.testing.assert_allclose(net.apply(params, X), h @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-6)


def test_kaiming_uniform_and_zero_biases():
    params = MLP(hidden=(400,), num_outputs=10).init(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    for layer, fan_in in ((params["Dense_0"], 100), (params["Dense_1"], 400)):
        assert (layer["bias"] == 0).all()
        bound = np.sqrt(6 / fan_in)
        assert 0.99 * bound < jnp.abs(layer["kernel"]).max() <= bound
        np.testing.assert_allclose(jnp.var(layer["kernel"]), bound**2 / 3, rtol=0.05)


def test_no_hidden_layer_is_linear():
    params = MLP(hidden=(), num_outputs=2).init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, params) == {"params": {"Dense_0": {"bias": (2,), "kernel": (6, 2)}}}


def test_dropout():
    net = MLP(hidden=(200,), num_outputs=200, dropout_rate=0.25, kernel_init=jax.nn.initializers.ones)
    params = net.init(jax.random.key(0), X)  # no dropout key is needed for this
    params["params"]["Dense_1"]["kernel"] = jnp.eye(200)  # the output is the hidden layer
    ones = jnp.ones((50, 6))
    kept = net.apply(params, ones)
    assert (kept == 6).all()
    dropped = net.apply(params, ones, train=True, rngs={"dropout": jax.random.key(1)})
    assert abs((dropped == 0).mean() - 0.25) < 0.03
    np.testing.assert_allclose(dropped[dropped != 0], 6 / 0.75, rtol=1e-6)
    other = net.apply(params, ones, train=True, rngs={"dropout": jax.random.key(2)})
    assert (dropped != other).any()


@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_its_units_are_found(dropout_rate):
    net = MLP(hidden=(5, 4), num_outputs=3, dropout_rate=dropout_rate)
    params = net.init(jax.random.key(0), X)
    apply_fn = lambda params, x: net.apply(params, x, train=True, rngs={"dropout": jax.random.key(1)})
    units = discover_units(apply_fn, params, X)
    assert [(group.name, group.size) for group in units] == [("params/Dense_0", 5), ("params/Dense_1", 4)]


def test_layer_normalization_comes_before_the_activation():
    net = MLP(hidden=(5, 4), num_outputs=3, normalization="layer")
    params = net.init(jax.random.key(0), X)
    layers = jax.tree.map(np.asarray, params["params"])
    assert sorted(layers) == ["Dense_0", "Dense_1", "Dense_2", "LayerNorm_0", "LayerNorm_1"]
    layers["LayerNorm_1"] = {"scale": np.arange(4.0), "bias": -np.arange(4.0)}
    h = np.asarray(X)
    for i in range(2):
        h = h @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)
        h = np.maximum(h * layers[f"LayerNorm_{i}"]["scale"] + layers[f"LayerNorm_{i}"]["bias"], 0)
    expected = h @ layers["Dense_2"]["kernel"] + layers["Dense_2"]["bias"]
    np.testing.assert_allclose(net.apply({"params": layers}, X), expected, rtol=1e-4, atol=1e-5)


def test_concatenated_relu_gives_a_unit_two_positions():
    net = MLP(hidden=(5, 4), num_outputs=3, activation="crelu")
    params = net.init(jax.random.key(0), X)
    assert [params["params"][f"Dense_{i}"]["kernel"].shape for i in range(3)] == [(6, 5), (10, 4), (8, 3)]
    units = discover_units(net.apply, params, X)
    assert [(group.name, group.size) for group in units] == [("params/Dense_0", 5), ("params/Dense_1", 4)]
    assert units[0].outgoing[0].kernel.index.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    _, features = with_features(net.apply, units)(params, X)
    first = X @ params["params"]["Dense_0"]["kernel"]
    expected = np.stack([np.maximum(first, 0), np.maximum(-first, 0)], axis=1)
    np.testing.assert_allclose(features["params/Dense_0"], expected, rtol=1e-5, atol=1e-6)


def test_deep_fourier_features_give_a_unit_a_sine_and_a_cosine():
    net = MLP(hidden=(5, 4), num_outputs=3, activation="fourier")
    params = net.init(jax.random.key(0), X)
    units = discover_units(net.apply, params, X, check=True)
    assert [(group.name, group.size) for group in units] == [("params/Dense_0", 5), ("params/Dense_1", 4)]
    assert units[1].outgoing[0].kernel.index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    _, features = with_features(net.apply, units)(params, X)
    first = X @ params["params"]["Dense_0"]["kernel"]
    expected = np.stack([np.sin(first), np.cos(first)], axis=1)
    np.testing.assert_allclose(features["params/Dense_0"], expected, rtol=1e-5, atol=1e-6)


def test_initial_weights_of_pytorch():
    net = MLP((400,), 300, kernel_init=fan_in_uniform(), bias_init="fan_in", output_init=jax.nn.initializers.ones)
    params = net.init(jax.random.key(0), jnp.zeros((1, 25)))["params"]
    for array, fan_in in (
        (params["Dense_0"]["kernel"], 25),
        (params["Dense_0"]["bias"], 25),
        (params["Dense_1"]["bias"], 400),
    ):
        assert 0.98 / fan_in**0.5 < jnp.abs(array).max() <= 1 / fan_in**0.5
        np.testing.assert_allclose(jnp.var(array), 1 / fan_in / 3, rtol=0.15)
    assert (params["Dense_1"]["kernel"] == 1).all()


def test_bad_settings():
    with pytest.raises(
        ValueError, match=r"normalization must be None or one of \['layer', 'online', 'bare_layer'\], got 'batch'"
    ):
        MLP(hidden=(5,), num_outputs=3, normalization="batch")
    with pytest.raises(ValueError, match="bias_init must be a function or 'fan_in', got 'fan_out'"):
        MLP(hidden=(5,), num_outputs=3, bias_init="fan_out")
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\), got 1.0"):
        MLP(hidden=(5,), num_outputs=3, dropout_rate=1.0)
    with pytest.raises(ValueError, match=r"activation must be .* got 'rleu'"):
        MLP(hidden=(5,), num_outputs=3, activation="rleu")


def test_bare_layer_normalization_has_no_parameters():
    net = MLP((6,), 2, activation="identity", normalization="bare_layer")
    x = jnp.array([[1.0, -2.0, 3.0]])
    params = net.init(jax.random.key(0), x)
    first, last = params["params"]["Dense_0"], params["params"]["Dense_1"]
    assert set(params["params"]) == {"Dense_0", "Dense_1"}
    h = np.asarray(x @ first["kernel"], np.float64)
    h = (h - h.mean()) / np.sqrt(h.var() + 1e-5)
    np.testing.assert_allclose(net.apply(params, x), h @ last["kernel"], rtol=1e-4, atol=1e-5)
