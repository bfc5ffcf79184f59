import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import injection
from cbp_jax.training import reset_layers

RNG = np.random.default_rng(0)
SHAPES = {"encoder": (3, 6), "hidden": (6, 5), "out": (5, 2)}
HEAD = ("hidden", "out")
PARAMS, FRESH, LATER = ({name: RNG.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(3))
X, Y = RNG.normal(size=(7, 3)), RNG.normal(size=(7, 2))


def apply_fn(params, x):
    return jnp.tanh(jnp.tanh(x @ params["encoder"]) @ params["hidden"]) @ params["out"]


def numpy_outputs(encoder, heads):
    """Return the sum of signed heads on one encoder, and the activations that gradients need."""
    z = np.tanh(X @ encoder)
    parts = [(sign, head, np.tanh(z @ head["hidden"])) for sign, head in heads]
    return z, parts, sum(sign * h @ head["out"] for sign, head, h in parts)


def numpy_gradients(encoder, heads):
    """Compute gradients of the mean squared error for the encoder and the first head, by hand."""
    z, parts, outputs = numpy_outputs(encoder, heads)
    error = 2 * (outputs - Y) / Y.size
    back, first = 0.0, None
    for sign, head, h in parts:
        inner = sign * error @ head["out"].T * (1 - h**2)
        back = back + inner @ head["hidden"].T
        first = first or {"hidden": z.T @ inner, "out": h.T @ (sign * error)}
    return {"encoder": X.T @ (back * (1 - z**2)), **first}


def loss(params, frozen, x, y):
    return jnp.mean((injection.with_injection(apply_fn)(params, frozen, x) - y) ** 2)


def test_outputs_do_not_change_and_gradients_equal_those_of_numpy():
    params, fresh, later, x, y = jax.tree.map(jnp.float32, (PARAMS, FRESH, LATER, X, Y))
    new, frozen = injection.inject(params, fresh, HEAD)
    np.testing.assert_array_equal(new["encoder"], params["encoder"])
    np.testing.assert_array_equal(new["out"], fresh["out"])
    before = apply_fn(params, x)
    np.testing.assert_allclose(injection.with_injection(apply_fn)(new, frozen, x), before, rtol=1e-5, atol=1e-5)

    trained = {**new, "hidden": new["hidden"] + 0.3, "encoder": new["encoder"] - 0.2}
    grads, of_frozen = jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, frozen, x, y)
    moved = {**FRESH, "hidden": FRESH["hidden"] + 0.3}
    heads = [(1, moved), (1, PARAMS), (-1, FRESH)]
    expected = numpy_gradients(PARAMS["encoder"] - 0.2, heads)
    for name in SHAPES:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-3, atol=1e-5)
    assert not any(leaf.any() for leaf in of_frozen.values())

    again, more = injection.inject(trained, later, HEAD, frozen)
    _, _, outputs = numpy_outputs(PARAMS["encoder"] - 0.2, [*heads[1:], (1, moved), (-1, LATER), (1, LATER)])
    np.testing.assert_allclose(injection.with_injection(apply_fn)(again, more, x), outputs, rtol=1e-3, atol=1e-4)
    assert more["out"].shape == (4, 5, 2)


def test_a_head_of_one_linear_layer_learns_as_without_injection():
    params, fresh, x, y = jax.tree.map(jnp.float32, (PARAMS, FRESH, X, Y))
    new, frozen = injection.inject(params, fresh, ["out"])
    plain = jax.grad(lambda params: jnp.mean((apply_fn(params, x) - y) ** 2))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), jax.grad(loss)(new, frozen, x, y), plain
    )


def test_the_optimizer_continues_with_the_new_head():
    params, fresh = jax.tree.map(jnp.float32, (PARAMS, FRESH))
    tx = cbp_jax.adam(0.1)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    new, _ = injection.inject(params, fresh, HEAD)
    same, state = reset_layers(tx, params, state, HEAD, fresh)
    jax.tree.map(np.testing.assert_array_equal, new, same)
    (mu,) = (found for path, found in optax.tree_utils.tree_get_all_with_path(state, "mu"))
    assert not mu["out"].any() and mu["encoder"].any()


def test_the_encoder_is_computed_once():
    params, fresh = jax.tree.map(jnp.float32, (PARAMS, FRESH))
    new, frozen = injection.inject(params, fresh, HEAD)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(new, frozen, jnp.float32(X), jnp.float32(Y))
    shapes = [eqn.outvars[0].aval.shape for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "tanh"]
    assert sorted(map(np.prod, shapes)) == [7 * 6, 3 * 7 * 5]  # products of the encoder and of three heads


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="the parameters have no layer 'heads'"):
        injection.inject(PARAMS, FRESH, ["heads"])
    with pytest.raises(ValueError, match=r"fresh must have 'out' in the shape \(5, 2\), got nothing"):
        injection.inject(PARAMS, {"hidden": FRESH["hidden"]}, HEAD)
    _, frozen = injection.inject(PARAMS, FRESH, ["out"])
    with pytest.raises(ValueError, match="frozen must be heads of the same layers"):
        injection.inject(PARAMS, FRESH, HEAD, frozen)
