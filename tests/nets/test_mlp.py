import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.nets import MLP
from cbp_jax.units import discover_units

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)


def test_computes_what_it_says():
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
    dropped = net.apply(params, ones, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert abs((dropped == 0).mean() - 0.25) < 0.03
    np.testing.assert_allclose(dropped[dropped != 0], 6 / 0.75, rtol=1e-6)
    other = net.apply(params, ones, deterministic=False, rngs={"dropout": jax.random.key(2)})
    assert (dropped != other).any()


@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_its_units_are_found(dropout_rate):
    net = MLP(hidden=(5, 4), num_outputs=3, dropout_rate=dropout_rate)
    params = net.init(jax.random.key(0), X)
    apply_fn = lambda params, x: net.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    units = discover_units(apply_fn, params, X)
    assert [(group.name, group.size) for group in units] == [("params/Dense_0", 5), ("params/Dense_1", 4)]


def test_bad_settings():
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\), got 1.0"):
        MLP(hidden=(5,), num_outputs=3, dropout_rate=1.0)
    with pytest.raises(ValueError, match=r"activation must be .* got 'rleu'"):
        MLP(hidden=(5,), num_outputs=3, activation="rleu")
