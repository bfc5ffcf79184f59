"""Experts, graphs, devices, shared heads, shortcuts, computed kernels: found groups, and reasons for the others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resets

import cbp_jax

RNG = np.random.default_rng(0)
SHAPES = {
    **{"a": (3, 4), "b": (4, 4), "out": (4, 2), "router": (4, 3), "up": (3, 4, 5), "down": (3, 5, 4), "scale": (4,)},
    **{"low": (4, 2), "high": (2, 4), "q": (4, 8), "k": (4, 4), "v": (4, 4), "o": (8, 4), "first": (3, 3, 3, 4)},
    **{"wide": (3, 3, 4, 6), "top": (6, 2)},
}
PARAMS = {name: jnp.float32(RNG.normal(size=shape)) for name, shape in SHAPES.items()}
ROWS, SEQUENCE, IMAGES = (jnp.float32(RNG.normal(size=shape)) for shape in ((6, 3), (2, 5, 3), (2, 8, 8, 3)))


def soft_experts(p, x):
    h = jnp.tanh(x @ p["a"])
    made = jnp.einsum("beh,ehd->bed", jnp.tanh(jnp.einsum("bd,edh->beh", h, p["up"])), p["down"])
    return jnp.tanh(jnp.einsum("be,bed->bd", jax.nn.softmax(h @ p["router"]), made)) @ p["out"]


def chosen_experts(p, x):
    h = jnp.tanh(x @ p["a"])
    expert = jnp.argmax(h @ p["router"], -1)
    h = jnp.einsum("bh,bhd->bd", jnp.tanh(jnp.einsum("bd,bdh->bh", h, p["up"][expert])), p["down"][expert])
    return jnp.tanh(h) @ p["out"]


def graph(p, x):
    h = jnp.tanh(x @ p["a"])
    received = jax.ops.segment_sum(h[jnp.array([0, 1, 2, 3])], jnp.array([1, 2, 3, 0]), 6)
    return jnp.tanh(received @ p["b"] + h) @ p["out"]


def devices(p, x):
    def one(row):
        h = row @ p["a"]
        return jnp.tanh(h - jax.lax.pmean(h, "batch")) @ p["out"]

    return jax.vmap(one, axis_name="batch")(x)


def multi_query(p, x):
    h = jnp.tanh(x @ p["a"])
    weights = jax.nn.softmax(jnp.einsum("bqhe,bke->bhqk", (h @ p["q"]).reshape(2, 5, 2, 4), h @ p["k"]))
    return jnp.einsum("bhqk,bke->bqhe", weights, h @ p["v"]).reshape(2, 5, 8) @ p["o"] @ p["out"]


def single_head(p, x):
    h = jnp.tanh(x @ p["a"])
    return jax.nn.softmax((h @ p["b"]) @ (h @ p["k"]).swapaxes(1, 2)) @ (h @ p["v"]) @ p["out"]


def padded_shortcut(p, x):
    conv = lambda x, kernel, stride: jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jnp.tanh(conv(x, p["first"], 1))
    shortcut = jnp.pad(h[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1)))
    return jnp.tanh(conv(h, p["wide"], 2) + shortcut).mean((1, 2)) @ p["top"]


def behind(kernel):
    return lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ kernel(p)) @ p["out"]


def low_rank(p, x):
    return behind(lambda p: p["b"] + 0.5 * p["low"] @ p["high"])(p, x)


FOUND = {
    soft_experts: (ROWS, {"a": 4, "up": 15, "down": 4}, {"router": "reduce_max"}),
    chosen_experts: (ROWS, {"down": 4}, {"router": "argmax", "a": "weighs other", "up": "weighs other"}),
    graph: (ROWS, {"a": 4}, {}),
    devices: (ROWS, {"a": 4}, {}),
    low_rank: (ROWS, {"a": 4, "b": 4, "low": 2}, {}),
    multi_query: (SEQUENCE, {"a": 4, "v": 4, "o": 4}, {"q": "weighs other", "k": "weighs other"}),
    single_head: (SEQUENCE, {"a": 4, "v": 4}, {"b": "weighs other", "k": "weighs other"}),
    padded_shortcut: (IMAGES, {"first": 4, "wide": 2}, {}),
}


@pytest.mark.parametrize("network", FOUND, ids=lambda network: network.__name__)
def test_what_is_found_and_why_the_rest_is_left_out(network):
    x, sizes, reasons = FOUND[network]
    units = cbp_jax.discover_units(network, PARAMS, x)
    assert {group.name: group.size for group in units} == sizes
    left = {item.name: item.reason for item in units.left_out if "output" not in item.reason}
    assert left.keys() == reasons.keys() and all(text in left[name] for name, text in reasons.items())
    resets.check_resets(units, PARAMS, lambda p: (network(p, x), None))


COMPUTED = {
    "weight normalization": lambda p: p["b"] / jnp.linalg.norm(p["b"], axis=0) * p["scale"],
    "standardized": lambda p: (p["b"] - p["b"].mean(0)) / p["b"].std(0),
    "noisy": lambda p: p["b"] + 0.1 * jax.random.normal(jax.random.key(0), (4, 4)),
    "spectral": lambda p: p["b"] / jnp.linalg.norm(p["b"], 2),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_kernels_are_left_out(name):
    with pytest.raises(ValueError, match=r"a: a kernel is computed(.|\n)*b: it is used in"):
        cbp_jax.discover_units(behind(COMPUTED[name]), PARAMS, ROWS)


class Decoder(nn.Module):
    """Apply tied embeddings, a recurrent cell, and layers stacked for `scan`."""

    @nn.compact
    def __call__(self, tokens):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = nn.relu(nn.Dense(12, name="up")(nn.RMSNorm()(x)))
                return x + nn.Dense(8, name="down")(h), None

        table = nn.Embed(11, 8, name="table")
        x = table(tokens)
        x = x + nn.Dense(8)(nn.RNN(nn.OptimizedLSTMCell(6))(x))
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="stack")(x, None)
        return table.attend(x)


@pytest.mark.slow
def test_a_decoder_of_all_these_trains_with_replacements():
    net, tokens = Decoder(), jnp.arange(24).reshape(4, 6) % 11
    params = jax.jit(net.init)(jax.random.key(0), tokens)
    units = cbp_jax.discover_units(net.apply, params, tokens)
    assert [(group.size, group.exact) for group in units] == [(8, False), (6, True), (12, True), (12, True)]
    apply = cbp_jax.with_features(net.apply, units)
    tx = cbp_jax.continual_backprop(cbp_jax.adam(1e-2), units, replacement_rate=0.01, maturity_threshold=10)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry

            def loss(params):
                logits, features = apply(params, tokens)
                return -jnp.take_along_axis(
                    jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1
                ).mean(), features

            (value, features), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params, features=features)
            params = jax.tree.map(jnp.add, params, updates)
            return (params, state), (value, state.replaced)

        return jax.lax.scan(step, (params, state), None, 100)

    _, (losses, replaced) = run(params, tx.init(params))
    assert losses[-1] < 0.7 * losses[0] and all(mask.sum() >= 5 for mask in replaced.values())
