"""Kernels with low-rank changes, applied in factors: the same outputs, and no product of a kernel's full size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.factored import apply_in_factors

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "W": draw(6, 5),
    "A": draw(6, 2),
    "B": draw(2, 5),
    "C": draw(5, 3),
    "D": draw(3, 6),
    "conv": draw(3, 3, 2, 4),
    "conv_A": draw(3, 3, 2, 1),
    "conv_B": draw(1, 4),
    "heads": draw(6, 2, 3),
    "heads_B": draw(2, 2, 3),
}
X, IMAGES = draw(4, 6), draw(2, 5, 5, 2)
DIMS = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel, **options):
    return jax.lax.conv_general_dilated(x, kernel, (2, 1), "SAME", dimension_numbers=DIMS, **options)


# Each with the shape of the full kernel, which no product may have when factors are applied separately.
FOLLOWED = {
    "dense": lambda p: X @ (p["W"] + 0.5 * p["A"] @ p["B"]),
    "subtracted": lambda p: X @ (p["W"] - p["A"] @ p["B"] / 3),
    "two changes": lambda p: X @ (p["W"] + (p["A"] @ p["B"] + (p["C"] @ p["D"]).T)),
    "transposed": lambda p: X[:, :5] @ (p["W"] + p["A"] @ p["B"]).T,
    "kernel first": lambda p: (p["W"] + p["A"] @ p["B"]).T @ X.T,
    "factors in a call": lambda p: X @ jax.jit(lambda w, a, b: w + 2 * (a @ b))(p["W"], p["A"], p["B"]),
    "cast and frozen": lambda p: X @ (jax.lax.stop_gradient(p["W"]) + p["A"] @ p["B"]).astype(jnp.float32),
    "of a constant": lambda p: X @ (RNG_W + p["A"] @ p["B"]),
    "of a number that is traced": lambda p: X @ (p["W"] + p["A"][0, 0] * (p["A"] @ p["B"])),
    "heads": lambda p: jnp.einsum("bi,ihd->bhd", X, p["heads"] + jnp.tensordot(p["A"], p["heads_B"], 1)),
    "convolution": lambda p: convolve(IMAGES, p["conv"] + jnp.tensordot(p["conv_A"], p["conv_B"], 1)),
}
RNG_W = draw(6, 5)

MULTIPLIED_OUT = {
    "entries": lambda p: jnp.tanh(p["W"] + p["A"] @ p["B"]),
    "looked up": lambda p: (p["W"] + p["A"] @ p["B"])[jnp.array([2, 0])],
    "in a loop": lambda p: jax.lax.scan(lambda c, x: (c, x @ c), p["W"] + p["A"] @ p["B"], X)[1],
    "checkpointed": lambda p: jax.checkpoint(lambda w: jnp.sin(X @ w))(p["W"] + p["A"] @ p["B"]),
    "grouped": lambda p: convolve(
        IMAGES, p["conv"][:, :, :1] + jnp.tensordot(p["conv_A"][:, :, :1], p["conv_B"], 1), feature_group_count=2
    ),
    "halves": lambda p: jnp.einsum("bi,ihd->bhd", X, p["heads"] + jnp.tensordot(p["A"], p["heads_B"], 1)),
    "some axes": lambda p: jnp.einsum("bh,ihd->bid", X[:, :2], p["heads"] + jnp.tensordot(p["A"], p["heads_B"], 1)),
    "activations of parameters": lambda p: jnp.tanh(p["A"] @ p["B"] + p["C"][:, 0]) @ p["C"],
    "a product alone": lambda p: X @ (p["A"] @ p["B"]),
    "no factors": lambda p: X @ p["W"],
}


def sizes_of_products(function):
    jaxpr = jax.make_jaxpr(function)(PARAMS).jaxpr

    def products(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                yield eqn.outvars[0].aval.size
            for body in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from products(body)

    return sorted(products(jaxpr))


@pytest.mark.parametrize("name", [*FOLLOWED, *MULTIPLIED_OUT])
def test_outputs_and_gradients_are_the_same(name):
    function = (FOLLOWED | MULTIPLIED_OUT)[name]
    factored = apply_in_factors(function)
    loss = lambda f: jax.jit(jax.value_and_grad(lambda p: jnp.sin(f(p)).sum()))(PARAMS)
    np.testing.assert_allclose(jax.jit(factored)(PARAMS), jax.jit(function)(PARAMS), rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), loss(factored), loss(function))


@pytest.mark.parametrize("name", FOLLOWED)
def test_no_product_of_factors_is_made(name):
    kernel = {"heads": 36, "convolution": 72}.get(name, 30)
    assert kernel in sizes_of_products(FOLLOWED[name])
    assert kernel not in sizes_of_products(apply_in_factors(FOLLOWED[name]))


def test_seeds_and_keyword_arguments():
    function = lambda p, x, *, power: (x @ (p["W"] + p["A"] @ p["B"])) ** power
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    found = jax.vmap(lambda p: apply_in_factors(function)(p, X, power=2))(many)
    for seed in range(2):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], many)
        np.testing.assert_allclose(found[seed], function(one, X, power=2), rtol=1e-4, atol=1e-4)


def test_a_network_in_half_precision():
    net = nn.Dense(5, dtype=jnp.bfloat16)
    function = lambda p: net.apply({"params": {"kernel": p["W"] + p["A"] @ p["B"], "bias": p["B"][0]}}, X)
    assert apply_in_factors(function)(PARAMS).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        apply_in_factors(function)(PARAMS).astype(jnp.float32), function(PARAMS).astype(jnp.float32), rtol=0.1, atol=0.1
    )
