import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.nets import fan_in_uniform, kaiming_uniform, sparse


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


def test_the_gain_of_relu_is_the_usual_one():
    key, shape = jax.random.key(0), (7, 5)
    usual = jax.nn.initializers.he_uniform()(key, shape)
    np.testing.assert_allclose(kaiming_uniform("relu")(key, shape), usual, rtol=1e-6)


def test_fan_in_of_a_convolution():
    check_uniform(fan_in_uniform()(jax.random.key(0), (5, 5, 4, 200)), 0.1)


def test_an_activation_without_a_gain():
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'gelu'"):
        kaiming_uniform("gelu")


@pytest.mark.parametrize(("shape", "zeros"), [((4, 300), 3), ((25, 300), 23), ((3, 3, 5, 300), 41)])
def test_sparse_leaves_few_weights_of_each_unit(shape, zeros):
    weights = np.asarray(sparse(0.9)(jax.random.key(0), shape)).reshape(-1, 300)
    alive = weights != 0
    inputs = len(weights)
    np.testing.assert_array_equal(alive.sum(0), inputs - zeros)
    check_uniform(weights[alive], inputs**-0.5)
    share = alive.mean(1)  # all positions are equally likely
    np.testing.assert_allclose(share, 1 - zeros / inputs, atol=0.1)
    assert len(np.unique(alive, axis=1).T) > 3 or inputs == 4


def test_sparse_with_another_initializer():
    ones = sparse(0.5, jax.nn.initializers.ones)(jax.random.key(0), (10, 3), jnp.bfloat16)
    assert ones.dtype == jnp.bfloat16 and ones.sum(0).tolist() == [5, 5, 5]
    np.testing.assert_array_equal(sparse(0.0, jax.nn.initializers.ones)(jax.random.key(0), (3, 2)), np.ones((3, 2)))


def test_sparse_refuses_bad_arguments():
    for fraction in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"fraction must be in \[0, 1\), got {fraction}"):
            sparse(fraction)
    with pytest.raises(ValueError, match=r"shape must be that of a kernel.*got \(3,\)"):
        sparse()(jax.random.key(0), (3,))
