"""Gradients enter a `cond` in the memory order of parameters."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import cbp_jax
from cbp_jax.numerics.layout import in_row_major
from cbp_jax.numerics.periods import when_due

PARAMS = {"w1": jnp.ones((70, 50)), "w2": jnp.ones((50, 60))}
X = jnp.linspace(-1, 1, 70)[None]

TRANSFORMATIONS = {
    "replace_units": lambda units: cbp_jax.redo(optax.sgd(0.1), units, every=100),
    "when_due": lambda units: cbp_jax.fire(optax.sgd(0.1), every=100),
    "periodic_reset": lambda units: cbp_jax.periodic_reset(
        optax.sgd(0.1), lambda key: jax.tree.map(jnp.ones_like, PARAMS), every=100
    ),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only asked for on a CPU")
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_no_gradient_is_stored_in_transposed_order(name):
    def apply(params, x):
        return jax.nn.relu(x @ params["w1"]) @ params["w2"]

    units = cbp_jax.discover_units(apply, PARAMS, X, check=False)
    featured = cbp_jax.with_features(apply, units)
    tx = optax.with_extra_args_support(TRANSFORMATIONS[name](units))

    def step(carry, x):
        params, state = carry
        summed = lambda params: (lambda outputs, features: (jnp.sum(outputs**2), features))(*featured(params, x))
        grads, features = jax.grad(summed, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, features=features)
        return (optax.apply_updates(params, updates), state), None

    carry = (PARAMS, tx.init(PARAMS))
    text = jax.jit(lambda carry: jax.lax.scan(step, carry, X[None])[0]).lower(carry).compile().as_text()
    entering = re.findall(r"conditional\(.*|\S+ = \(.*\) tuple\(.*", text)
    kernels = re.findall(r"f32\[(?:70,50|50,60)\]\{[\d,]+\}", "\n".join(entering))
    assert kernels
    assert all(kernel.endswith("{1,0}") for kernel in kernels)


def test_values_are_the_same_compiled_or_not_and_for_rows():
    tree = {"w": jnp.arange(24.0).reshape(2, 3, 4), "b": jnp.arange(3), "s": jnp.float32(1)}
    for got in (in_row_major(tree), jax.jit(in_row_major)(tree)):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, tree))
    rows = jax.jit(jax.vmap(in_row_major, in_axes=2, out_axes=1))(tree["w"])
    assert (rows == tree["w"].transpose(0, 2, 1)).all()


def test_gradients_pass():
    scale = lambda x, due: jnp.sum(when_due(due, lambda x: 3 * x, x.T * 2.0))
    grads = jax.jit(jax.grad(scale))(jnp.ones((2, 3)), jnp.array(True))
    assert (grads == 6).all()
