import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.nets import get_activation

X = np.linspace(-3, 3, 13)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", np.maximum(X, 0)),
        ("leaky_relu", np.where(X > 0, X, 0.01 * X)),
        ("tanh", np.tanh(X)),
        ("sigmoid", 1 / (1 + np.exp(-X))),
        ("silu", X / (1 + np.exp(-X))),
        ("swish", X / (1 + np.exp(-X))),
        ("crelu", np.concatenate([np.maximum(X, 0), np.maximum(-X, 0)])),
        ("fourier", np.concatenate([np.sin(X), np.cos(X)])),
        ("softplus", np.log1p(np.exp(X))),
        ("elu", np.where(X > 0, X, np.expm1(X))),
        ("identity", X),
    ],
)
def test_names(name, expected):
    np.testing.assert_allclose(get_activation(name)(jnp.asarray(X)), expected, atol=1e-6)


def test_functions_pass_through():
    assert get_activation(jnp.sin) is jnp.sin


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"activation must be .*'relu'.* got 'rleu'"):
        get_activation("rleu")
