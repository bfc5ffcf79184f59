"""Utilities from gradients: what they mean in a network, and their values without a gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import units as units_lib
from cbp_jax.replacement import UTILITIES, needs_curvature
from cbp_jax.replacement.views import UpdatedParams

OF_GRADIENTS = ("taylor", "taylor_second_order", "fisher", "snip", "gradient", "upgd", "upgd_second_order")


class Net(nn.Module):
    """A network in which units of a convolution have several outgoing rows; all units have gates."""

    @nn.compact
    def __call__(self, x, gates=(1.0, 1.0)):
        x = nn.tanh(nn.Conv(3, (2, 2))(x)) * gates[0]
        x = nn.tanh(nn.Dense(4)(x.reshape(len(x), -1))) * gates[1]
        return nn.Dense(2)(x)


NET, X = Net(), jax.random.normal(jax.random.key(0), (5, 3, 2, 1))
PARAMS = jax.jit(NET.init)(jax.random.key(1), X)
UNITS = cbp_jax.discover_units(NET.apply, PARAMS, X)


def loss(params, gates=(1.0, 1.0)):
    return jnp.mean(jnp.square(NET.apply(params, X, gates) - 1.0))


def view_of(group, grads, hessian_diag=None):
    """Return the view of a group after an update that changes weights strongly."""
    leaves = units_lib.leaves_by_path(PARAMS)
    after = UpdatedParams(leaves, jax.tree.map(lambda w: w + 100.0, leaves))
    diagonal = None if hessian_diag is None else units_lib.leaves_by_path(hessian_diag)
    grads = units_lib.leaves_by_path(grads)
    return cbp_jax.GroupView(group, None, after, grads, jax.random.key(0), jnp.int32(1), hessian_diag=diagonal)


def test_the_slope_is_that_of_a_gate():
    def utilities(params):
        grads = jax.grad(loss)(params)
        squares = jax.tree.map(jnp.square, grads)
        return [{name: UTILITIES[name](view_of(group, grads, squares)) for name in OF_GRADIENTS} for group in UNITS]

    gates = [jnp.ones(group.size) for group in UNITS]
    found, slopes = jax.jit(lambda p: (utilities(p), jax.grad(loss, 1)(p, gates)))(PARAMS)
    for utility, slope in zip(found, slopes, strict=True):
        np.testing.assert_allclose(utility["upgd"], -slope, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(utility["taylor"], jnp.abs(slope), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(utility["fisher"], slope**2, rtol=1e-4, atol=1e-6)
        assert np.all(utility["snip"] >= utility["taylor"] * (1 - 1e-5))
        np.testing.assert_allclose(np.mean(utility["gradient"]), 1.0, rtol=1e-5)
        np.testing.assert_allclose(utility["taylor_second_order"], jnp.abs(utility["upgd_second_order"]))
        assert np.all(utility["upgd_second_order"] > utility["upgd"])


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_without_a_gradient_the_utility_is_zero(name):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for group in UNITS:
        np.testing.assert_array_equal(UTILITIES[name](view_of(group, zeros, zeros)), np.zeros(group.size))


def test_which_utilities_need_curvature():
    assert [name for name in UTILITIES if needs_curvature(name)] == ["taylor_second_order", "upgd_second_order"]
    with pytest.raises(ValueError, match=r"diagonal of the Hessian.*hessian_diag=\.\.\..*got None"):
        UTILITIES["taylor_second_order"](view_of(UNITS[0], PARAMS))


def test_curvature_is_an_argument_of_update():
    """It is an extra argument, which is checked and passed to the inner optimizer."""
    tx = cbp_jax.continual_backprop(optax.sgd(0.1), UNITS, utility="upgd_second_order")
    features = jax.eval_shape(cbp_jax.with_features(NET.apply, UNITS), PARAMS, X)[1]
    update = lambda diagonal: jax.eval_shape(
        lambda p, f: tx.update(p, tx.init(p), p, features=f, hessian_diag=diagonal), PARAMS, features
    )
    assert update(PARAMS)[1].utility["params/Dense_0"].shape == (4,)
    with pytest.raises(ValueError, match="hessian_diag must be a tree of the gradients' shapes"):
        update({"w": jnp.ones(3)})
