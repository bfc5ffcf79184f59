import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbp_jax.experiments.learners import make_learner, parse_method
from cbp_jax.nets import ConvNet
from cbp_jax.units import discover_units

SMALL = {"channels": (3, 4), "kernel_sizes": (3, 2), "hidden": (5,)}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 10, 3)), jnp.float32)


def shapes(net, image):
    params = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image), jnp.float32))
    return {name: layer["kernel"].shape for name, layer in params["params"].items()}


def test_the_papers_sizes_by_default():
    assert shapes(ConvNet(num_outputs=2), (32, 32, 3)) == {
        "Conv_0": (5, 5, 3, 32),
        "Conv_1": (3, 3, 32, 64),
        "Conv_2": (3, 3, 64, 128),
        "Dense_0": (2 * 2 * 128, 128),
        "Dense_1": (128, 128),
        "Dense_2": (128, 2),
    }


def test_same_padding_fits_small_images():
    assert shapes(ConvNet(num_outputs=10, padding="SAME"), (8, 8, 1))["Dense_0"] == (128, 128)


def test_outputs_against_numpy():
    net = ConvNet(num_outputs=2, **SMALL, activation="tanh")
    params = net.init(jax.random.key(0), X)
    layers = params["params"]
    h = np.asarray(X)
    for name, size in (("Conv_0", 3), ("Conv_1", 2)):
        windows = np.lib.stride_tricks.sliding_window_view(h, (size, size), axis=(1, 2))
        h = np.tanh(np.einsum("nhwcij,ijco->nhwo", windows, layers[name]["kernel"]) + layers[name]["bias"])
        n, height, width, c = h.shape
        h = h[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, c).max((2, 4))
    h = np.tanh(h.reshape(2, -1) @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"])
    expected = h @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
    np.testing.assert_allclose(net.apply(params, X), expected, rtol=1e-4, atol=1e-5)


def test_weights_and_biases_are_initialized_as_in_the_papers_program():
    net = ConvNet(num_outputs=50, channels=(30, 40), kernel_sizes=(3, 2), hidden=(60,))
    layers = net.init(jax.random.key(0), X)["params"]
    for name, layer in layers.items():
        fan_in = np.prod(layer["kernel"].shape[:-1])
        for what in ("kernel", "bias"):
            largest = float(np.abs(layer[what]).max()) * fan_in**0.5
            assert 0.8 < largest <= 1, (name, what)


def test_replaced_units_are_initialized_like_the_others():
    net = functools.partial(ConvNet, channels=(40,), kernel_sizes=(3,))
    method = parse_method("cbp:replacement_rate=1,maturity_threshold=0")
    learner = make_learner([method], (30,), "relu", X.shape[1:], 2, network=net)
    params = jax.jit(learner.init)(jax.random.key(0))

    @jax.jit
    def update(params, numbers):
        tx = learner.optimizer(numbers, jax.random.key(1))
        _, features = learner.predict(params, X)
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, features=features)[0]

    updates = update(params, dict(method.hyperparameters))
    layers = optax.apply_updates(params, updates)["params"]
    for name in ("Conv_0", "Dense_0"):
        kernel = np.asarray(layers[name]["kernel"])
        assert not np.isclose(kernel, params["params"][name]["kernel"]).all()
        drawn = kernel[kernel != 0]  # weights between new units are drawn for the later layer
        assert 0.9 < np.abs(drawn).max() * np.prod(kernel.shape[:-1]) ** 0.5 <= 1
        assert not layers[name]["bias"].any()


def test_convolutions_may_have_another_activation():
    net, same = ConvNet(num_outputs=2, **SMALL, conv_activation="identity"), ConvNet(num_outputs=2, **SMALL)
    params = net.init(jax.random.key(0), X)
    layers = params["params"]
    linear = {**layers, "Conv_0": {"kernel": -layers["Conv_0"]["kernel"], "bias": layers["Conv_0"]["bias"] - 100}}
    linear["Conv_1"] = {"kernel": -layers["Conv_1"]["kernel"], "bias": layers["Conv_1"]["bias"]}
    assert np.ptp(net.apply({"params": linear}, X), axis=0).all()  # a negative channel still carries information
    assert not np.ptp(same.apply({"params": linear}, X), axis=0).any()


def test_dropout_is_off_by_default():
    net = ConvNet(num_outputs=2, **SMALL, dropout_rate=0.5)
    params = net.init(jax.random.key(0), X)
    plain = ConvNet(num_outputs=2, **SMALL).apply(params, X)
    np.testing.assert_array_equal(net.apply(params, X), plain)
    trained = net.apply(params, X, train=True, rngs={"dropout": jax.random.key(1)})
    assert (trained != plain).any()


def test_the_network_conv_2_of_the_lottery_tickets():
    net = ConvNet(10, (64, 64), (3, 3), (256, 256), "SAME", pool_every=2)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    kernels = [layer["kernel"].shape for layer in params.values()]
    assert kernels == [(3, 3, 3, 64), (3, 3, 64, 64), (16 * 16 * 64, 256), (256, 256), (256, 10)]
    # 4.3M weights, as in the paper; 38k of them are in convolutions.
    assert round(sum(np.prod(shape) for shape in kernels) / 1e6, 1) == 4.3


def test_its_units_are_found():
    net = ConvNet(num_outputs=2, **SMALL)
    units = discover_units(net.apply, net.init(jax.random.key(0), X), X)
    expected = [("params/Conv_0", 3), ("params/Conv_1", 4), ("params/Dense_0", 5)]
    assert [(group.name, group.size) for group in units] == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"padding": "CIRCULAR"}, "padding must be 'VALID' or 'SAME', got 'CIRCULAR'"),
        ({"channels": (3, 4, 5)}, "channels and kernel_sizes must be of one length"),
        ({"dropout_rate": -0.1}, r"dropout_rate must be in \[0, 1\), got -0.1"),
        ({"activation": "rleu"}, "activation must be .* got 'rleu'"),
        ({"conv_activation": "rleu"}, "activation must be .* got 'rleu'"),
        ({"bias_init": 0.0}, "bias_init must be a function or 'fan_in', got 0.0"),
        ({"pool_every": 3}, "pool_every must divide the number of convolutions, 2, got 3"),
        ({"pool_every": 0}, "pool_every must divide the number of convolutions, 2, got 0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        ConvNet(num_outputs=2, **{**SMALL, **settings})


def test_bad_images():
    net = ConvNet(num_outputs=2)
    with pytest.raises(ValueError, match="images of 8x8 are too small"):
        net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(ValueError, match=r"x must be images .* got shape \(1, 784\)"):
        net.init(jax.random.key(0), jnp.zeros((1, 784)))
