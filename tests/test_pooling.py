"""Pooling with another derivative: the same outputs and gradients as XLA's pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cbp_jax
from cbp_jax import curvature

RNG = np.random.default_rng(0)
OPERATIONS = {"max": (jax.lax.max, -jnp.inf), "min": (jax.lax.min, jnp.inf), "add": (jax.lax.add, 0.0)}


def ties(*shape, dtype=jnp.float32):
    """Draw from few values, so that most windows have several maxima."""
    return jnp.asarray(RNG.integers(-1, 2, shape), dtype)


def pooling(window, strides, padding="VALID", operation="max", **options):
    function, start = OPERATIONS[operation]
    return lambda x: jax.lax.reduce_window(x, start, function, window, strides, padding, **options)


def both(function):
    """Make a function of inputs and output gradients that returns outputs and input gradients."""

    def run(x, grads):
        out, transpose = jax.vjp(function, x)
        return out, transpose(grads)[0]

    return jax.jit(run)


def gradient(function, x):
    """Return the jaxpr equations of a gradient."""
    return str(jax.make_jaxpr(jax.grad(lambda x: jnp.square(function(x)).sum()))(x))


IMAGE, MARGINS = (2, 7, 6, 3), ((0, 0), (2, 1), (1, 3), (0, 0))
SLOW = {"max": "select_and_scatter_add", "min": "select_and_scatter_add", "add": "reduce_window_sum"}
POOLINGS = {
    "apart": (IMAGE, (1, 2, 2, 1), (1, 2, 2, 1)),
    "apart, padded": (IMAGE, (1, 2, 3, 1), (1, 2, 3, 1), "SAME"),
    "with gaps": (IMAGE, (1, 2, 1, 1), (1, 3, 2, 1)),
    "overlapping": (IMAGE, (1, 3, 2, 1), (1, 1, 1, 1)),
    "overlapping, padded": (IMAGE, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
    "unevenly": (IMAGE, (1, 4, 3, 1), (1, 3, 2, 1), MARGINS),
    "one axis": ((9, 4), (3, 1), (2, 1), "SAME"),
    "channels": ((2, 8), (1, 3), (1, 2)),
    "min": (IMAGE, (1, 3, 2, 1), (1, 2, 2, 1), "SAME", "min"),
    "sum": (IMAGE, (1, 2, 3, 1), (1, 2, 3, 1), "SAME", "add"),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_values_and_gradients_are_those_of_xla(name):
    shape, *options = POOLINGS[name]
    dtype = jnp.bfloat16 if name == "overlapping, padded" else jnp.float32
    x, function = ties(*shape, dtype=dtype), pooling(*options)
    other = cbp_jax.contract_convolutions(function)
    slow = SLOW[options[3] if len(options) > 3 else "max"]
    assert gradient(other, x).count(slow) == gradient(function, x).count(slow) - 1
    grads = jnp.asarray(RNG.normal(size=function(x).shape), x.dtype)
    got, want = both(other)(x, grads), both(function)(x, grads)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))
    # Forward mode is the transpose of reverse mode.
    tangent = jnp.asarray(RNG.normal(size=shape), x.dtype)
    _, moved = jax.jit(lambda x, t: jax.jvp(other, (x,), (t,)))(x, tangent)
    close = {"rtol": 1e-2 if dtype == jnp.bfloat16 else 1e-4, "atol": 0.3 if dtype == jnp.bfloat16 else 1e-4}
    dot = lambda a, b: float((a.astype(jnp.float32) * b.astype(jnp.float32)).sum())
    np.testing.assert_allclose(dot(moved, grads), dot(got[1], tangent), **close)


@pytest.mark.parametrize(
    "function, x",
    [
        (pooling((2, 1), (1, 1), window_dilation=(2, 1)), ties(6, 2)),
        (pooling((2, 1), (1, 1), base_dilation=(2, 1)), ties(6, 2)),
        (pooling((30, 1), (1, 1)), ties(40, 2)),
        (pooling((3, 1), (1, 1), operation="add"), ties(6, 2)),
        (lambda x: jax.lax.reduce_window(x, 0, jax.lax.max, (2, 1), (2, 1), "VALID"), ties(6, 2, dtype=jnp.int32)),
    ],
    ids=["dilated windows", "dilated image", "very many overlap", "overlapping sums", "integers"],
)
def test_other_poolings_stay_as_they_are(function, x):
    other = cbp_jax.contract_convolutions(function)
    assert str(jax.make_jaxpr(other)(x)) == str(jax.make_jaxpr(function)(x))


def test_special_values():
    x = jnp.asarray([[0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0], [-jnp.inf] * 2, [jnp.inf, jnp.inf], [jnp.nan, 1.0]])
    function = pooling((1, 2), (1, 2), ((0, 0), (1, 1)))
    grads = jnp.arange(1.0, 13.0).reshape(6, 2)
    got, want = (both(f)(x, grads) for f in (cbp_jax.contract_convolutions(function), function))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.signbit(got[0]), np.signbit(want[0]))
    apart = cbp_jax.contract_convolutions(pooling((1, 2), (1, 2)))
    out, grad = both(apart)(jnp.asarray([[jnp.nan, 1.0], [1.0, jnp.nan]]), jnp.ones((2, 1)))
    assert np.isnan(out).all()
    np.testing.assert_array_equal(grad, [[1, 0], [0, 1]])


@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_the_gradient_goes_to_the_first_maximum(data):
    number = lambda low, high: data.draw(st.integers(low, high))
    size, strides = (number(1, 4), number(1, 3)), (number(1, 3), number(1, 2))
    low, high = number(0, 2), number(0, 2)
    x = np.float32(data.draw(st.lists(st.integers(-1, 1), min_size=28, max_size=28))).reshape(7, 4)
    x[0, 0] = 5
    padded = np.pad(x, ((low, high), (0, 0)), constant_values=-np.inf)
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(padded.shape, size, strides, strict=True))
    grads, expected, out = RNG.normal(size=(rows, columns)).astype(np.float32), np.zeros_like(padded), []
    for row, column in np.ndindex(rows, columns):
        places = [(row * strides[0] + i, column * strides[1] + j) for i, j in np.ndindex(size)]
        best = max(places, key=lambda place: padded[place])  # the first maximum
        expected[best] += grads[row, column]
        out.append(padded[best])
    run = both(cbp_jax.contract_convolutions(pooling(size, strides, ((low, high), (0, 0)))))
    got, back = run(jnp.asarray(x), jnp.asarray(grads))
    np.testing.assert_array_equal(got, np.reshape(out, (rows, columns)))
    np.testing.assert_array_equal(back, expected[low : low + len(x)])


@pytest.mark.slow
def test_under_vmap_in_a_scan_and_in_calls():
    x = ties(3, 2, 6, 6, 2)
    pool = lambda x: nn.max_pool(x, (2, 2), (2, 2))
    calls = jax.checkpoint(jax.jit(pool))
    function = lambda x: jax.lax.scan(lambda total, image: (total + calls(image).sum(), calls(image)), 0.0, x)
    other = cbp_jax.contract_convolutions(function)
    loss = lambda function: lambda x: sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(function(x)))
    assert "select_and_scatter_add" not in str(jax.make_jaxpr(jax.grad(loss(other)))(x))
    want = jax.jit(jax.grad(loss(function)))(x)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss(other)))(x), want)
    alone = cbp_jax.contract_convolutions(pool)
    over_rows = lambda function, axis: jax.jit(
        jax.vmap(jax.grad(lambda x: jnp.square(function(x)).sum()), in_axes=axis, out_axes=axis)
    )
    for axis in (0, 3):
        images = x[:, 0] if axis == 0 else jnp.moveaxis(x[:, 0], 0, axis)
        np.testing.assert_array_equal(over_rows(alone, axis)(images), over_rows(pool, axis)(images))


def test_second_derivatives():
    function = lambda x: pooling((2, 3), (2, 3), "SAME")(jnp.tanh(x))
    x, direction = ties(5, 6), jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)

    def product(function):
        loss = lambda x: jnp.sin(function(x)).sum()
        return jax.jit(lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))[1])(x, direction)

    want = product(function)
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(product(cbp_jax.contract_convolutions(function)), want, rtol=1e-5, atol=1e-7)


def test_hesscale_follows():
    def apply(params, x):
        x = nn.max_pool(jnp.tanh(x * params["scale"]), (3, 3), (2, 2), "SAME")
        return nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1) @ params["w"]

    x, y = ties(3, 8, 8, 2), jnp.asarray([0, 1, 1])
    params = {"scale": jnp.asarray([0.5, 1.5]), "w": jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32)}
    other = cbp_jax.contract_convolutions(apply)
    assert str(jax.make_jaxpr(other)(params, x)).count("name=pooled") == 2
    run = lambda apply: jax.jit(lambda params: curvature.hesscale(apply, params, x, y))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(other), run(apply))
