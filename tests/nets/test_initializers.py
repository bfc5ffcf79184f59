import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.nets import fan_in_uniform, kaiming_uniform


def check_uniform(weights, bound):
    assert 0.99 * bound < jnp.abs(weights).max() <= bound
    np.testing.assert_allclose(jnp.var(weights), bound**2 / 3, rtol=0.05)


@pytest.mark.parametrize(
    ("activation", "gain"),
    [
        ("identity", 1.0),
        ("sigmoid", 1.0),
        ("tanh", 5 / 3),
        ("relu", 2**0.5),
        ("leaky_relu", (2 / 1.0001) ** 0.5),
        ("elu", 2**0.5),
        ("swish", 2**0.5),
    ],
)
def test_gains(activation, gain):
    check_uniform(kaiming_uniform(activation)(jax.random.key(0), (50, 400)), gain * (3 / 50) ** 0.5)


def test_relus_is_the_usual_one():
    key, shape = jax.random.key(0), (7, 5)
    usual = jax.nn.initializers.he_uniform()(key, shape)
    np.testing.assert_allclose(kaiming_uniform("relu")(key, shape), usual, rtol=1e-6)


def test_fan_in_of_a_convolution():
    check_uniform(fan_in_uniform()(jax.random.key(0), (5, 5, 4, 200)), 0.1)


def test_an_activation_without_a_gain():
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'gelu'"):
        kaiming_uniform("gelu")
