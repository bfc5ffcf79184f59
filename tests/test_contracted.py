"""Convolutions as matrix products: the same outputs and gradients as XLA's convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbp_jax
from cbp_jax import nets

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


CONVOLUTIONS = {
    "same": (draw(2, 7, 6, 3), draw(3, 3, 3, 5), {"padding": "SAME"}),
    "many channels": (draw(2, 7, 6, 20), draw(3, 2, 20, 5), {"padding": "SAME"}),
    "valid": (draw(2, 7, 6, 3), draw(2, 3, 3, 5), {"padding": "VALID"}),
    "one by one": (draw(2, 7, 6, 3), draw(1, 1, 3, 5), {"padding": "VALID", "window_strides": (2, 2)}),
    "strided": (draw(2, 7, 6, 17), draw(3, 3, 17, 5), {"padding": "SAME", "window_strides": (2, 3)}),
    "dilated": (draw(2, 9, 8, 3), draw(3, 3, 3, 5), {"padding": "SAME", "rhs_dilation": (2, 1)}),
    "padded unevenly": (draw(2, 7, 6, 3), draw(3, 3, 3, 5), {"padding": ((0, 3), (2, -1))}),
    "grouped": (draw(2, 7, 6, 4), draw(3, 3, 2, 6), {"padding": "SAME", "feature_group_count": 2}),
    "depthwise": (draw(2, 7, 6, 4), draw(3, 3, 1, 8), {"padding": "SAME", "feature_group_count": 4}),
    "transposed": (draw(2, 5, 4, 3), draw(3, 3, 3, 5), {"padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 2)}),
    "channels first": (
        draw(2, 3, 7, 6), draw(5, 3, 3, 3), {"padding": "SAME", "dimension_numbers": ("NCHW", "OIHW", "NCHW")}
    ),
    "one axis": (draw(2, 9, 3), draw(4, 3, 5), {"padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")}),
    "three axes": (
        draw(2, 5, 4, 3, 2), draw(2, 2, 2, 2, 3), {"padding": "SAME", "dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients(name):
    image, kernel, options = CONVOLUTIONS[name]
    options = {"window_strides": (1,) * (image.ndim - 2), "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    network = lambda image, kernel: jax.lax.conv_general_dilated(image, kernel, **options)
    contracted = cbp_jax.contract_convolutions(network)
    loss = lambda function: jax.value_and_grad(lambda *args: jnp.sin(function(*args)).sum(), (0, 1))
    assert "conv_general_dilated" in str(jax.make_jaxpr(network)(image, kernel))
    assert ("conv_general_dilated" in str(jax.make_jaxpr(contracted)(image, kernel))) == (name == "transposed")
    np.testing.assert_allclose(contracted(image, kernel), network(image, kernel), rtol=1e-4, atol=1e-4)
    got, want = jax.jit(loss(contracted))(image, kernel), jax.jit(loss(network))(image, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


def test_accelerators_keep_their_convolutions(monkeypatch):
    image, kernel, _ = CONVOLUTIONS["same"]
    network = nn.Conv(5, (3, 3))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run = cbp_jax.contract_convolutions(network.apply)
    assert "conv_general_dilated" in str(
        jax.make_jaxpr(run)({"params": {"kernel": kernel, "bias": jnp.zeros(5)}}, image)
    )


class Wrapped(nn.Module):
    """A network with convolutions in calls, under `remat` and in a scan."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.remat(nn.Conv)(4, (3, 3))(x))
        kernels = self.param("kernels", nn.initializers.normal(0.2), (2, 3, 3, 4, 4))
        dims = ("NHWC", "HWIO", "NHWC")
        convolve = jax.jit(lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims))
        x, _ = jax.lax.scan(lambda x, w: (nn.relu(convolve(x, w)), None), x, kernels)
        return nn.Dense(2)(x.mean((1, 2)))


@pytest.mark.slow
def test_whole_networks_with_features():
    residual = nets.ResNet(3, widths=(4, 6), blocks=(1, 1))
    pooled = nets.ConvNet(3, (4, 6), (3, 3), (5,), padding="SAME")
    for net, options in ((residual, {"train": False}), (Wrapped(), {}), (pooled, {})):
        x = draw(2, 8, 8, 3)
        variables = jax.jit(net.init)(jax.random.key(0), x)
        apply_fn = lambda variables, x, net=net, options=options: net.apply(variables, x, **options)
        units = cbp_jax.discover_units(apply_fn, variables, x)
        apply = cbp_jax.with_features(apply_fn, units)
        contracted = cbp_jax.contract_convolutions(apply)
        assert "conv_general_dilated" not in str(jax.make_jaxpr(contracted)(variables, x))
        loss = lambda variables, x, apply=contracted: apply(variables, x)[0].sum()
        assert "select_and_scatter" not in str(jax.make_jaxpr(jax.grad(loss))(variables, x))
        got, want = jax.jit(contracted)(variables, x), jax.jit(apply)(variables, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
