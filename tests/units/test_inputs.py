"""Inputs of any form are data, except running statistics; units are followed through stacked and split arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resets

import cbp_jax

RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"a": (4, 6), "b": (4, 6), "c": (6, 6), "out": (6, 2), "other": (6, 2)}.items()
}
X = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
TOKENS = jnp.asarray(RNG.normal(size=(5, 3, 4)), jnp.float32)


def mlp(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["c"]) @ params["out"]


INPUTS = {
    "dict": (lambda p, batch: mlp(p, batch["image"]), {"image": X}),
    "scaled": (lambda p, batch: mlp(p, (batch["image"] - 0.5) / 0.3), {"image": X}),
    "tuple": (lambda p, batch: mlp(p, batch[0]), (X, X)),
    "mask": (lambda p, batch: mlp(p, batch["x"] * batch["mask"][:, None]), {"x": X, "mask": jnp.ones(5)}),
    "context": (
        lambda p, batch: jnp.tanh(jnp.tanh(batch["x"] @ p["a"] + batch["context"]) @ p["c"]) @ p["out"],
        {"x": X, "context": jnp.ones((5, 6))},
    ),
    "numbers": (
        lambda p, batch: jnp.tanh(jnp.tanh(X @ p["a"])[batch["rows"]] @ p["c"]) @ p["out"],
        {"rows": jnp.arange(5)},
    ),
    "dropout": (
        lambda p, keys: (
            jnp.tanh(jnp.where(jax.random.bernoulli(keys["dropout"], 0.5, (5, 6)), X @ p["a"], 0) @ p["c"]) @ p["out"]
        ),
        {"dropout": jax.random.key(0)},
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_trees_of_inputs_are_data(name):
    apply_fn, batch = INPUTS[name]
    units = cbp_jax.discover_units(apply_fn, PARAMS, batch)
    assert {group.name: group.size for group in units} == {"a": 6, "c": 6}
    assert all(not group.statistics for group in units)
    output, features = cbp_jax.with_features(apply_fn, units)(PARAMS, batch)
    np.testing.assert_array_equal(output, apply_fn(PARAMS, batch))
    assert {group: array.shape for group, array in features.items()} == {"a": (5, 6), "c": (5, 6)}


def test_statistics_among_data_are_recognized_by_their_use():
    def apply_fn(params, given):
        h = jnp.tanh(given["x"] @ params["a"] + given["context"])
        return (h - given["mean"]) / jnp.sqrt(given["var"] + 1e-5) @ params["out"]

    given = {"x": X, "context": jnp.ones((5, 6)), "mean": jnp.full(6, 7.0), "var": jnp.full(6, 7.0)}
    units = cbp_jax.discover_units(apply_fn, PARAMS, given)
    assert [(part.path, part.reset) for part in units[0].statistics] == [("mean", 0.0), ("var", 1.0)]
    stats = {"mean": given["mean"], "var": given["var"]}
    stats = cbp_jax.reset_batch_stats(stats, units, {"a": jnp.arange(6) == 2})
    assert stats["mean"].tolist() == [7, 7, 0, 7, 7, 7] and stats["var"].tolist() == [7, 7, 1, 7, 7, 7]


def rotated(h):
    """Rotate pairs of features, interleaved as in rotary embeddings."""
    pairs = h.reshape(*h.shape[:-1], 3, 2)
    return jnp.stack([pairs[..., 0] - pairs[..., 1], pairs[..., 0] + pairs[..., 1]], -1).reshape(h.shape)


STACKS = {  # the network, and the size of the group that `a` writes
    "branches": (lambda p, x: jnp.stack([jnp.tanh(x @ p["a"]), jnp.sin(x @ p["b"])]).mean(0) @ p["out"], 6),
    "a new last axis": (lambda p, x: jnp.stack([jnp.tanh(x @ p["a"]), x @ p["b"]], -1).max(-1) @ p["out"], 6),
    "positions": (lambda p, x: sum(jnp.unstack(jnp.tanh(x @ p["a"]), axis=1)) @ p["out"], 6),
    "units": (lambda p, x: jnp.stack(jnp.unstack(jnp.tanh(x @ p["a"]), axis=-1)[::-1], -1) @ p["out"], 6),
    "pairs": (lambda p, x: rotated(jnp.tanh(x @ p["a"])) @ p["out"], 3),
    "heads": (lambda p, x: jnp.stack([jnp.tanh(x @ p["a"]) @ p["out"], jnp.sin(x @ p["b"]) @ p["other"]]), 6),
    "nothing beside it": (
        lambda p, x: (lambda h: jnp.concatenate([h[:, :0], h], 1))(jnp.tanh(x @ p["a"])) @ p["out"],
        6,
    ),
    "an associative scan": (
        lambda p, x: jax.lax.associative_scan(jnp.add, jnp.tanh(x @ p["a"]), axis=1) @ p["out"],
        6,
    ),
    "a sum of gradients": (
        lambda p, x: jax.grad(lambda h: jnp.sum(jnp.tanh(h) * jnp.sin(h)))(jnp.tanh(x @ p["a"])) @ p["out"],
        6,
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_units_are_followed_through_stacks(name):
    apply_fn, size = STACKS[name]
    units = cbp_jax.discover_units(apply_fn, PARAMS, TOKENS)
    assert units[0].name == "a" and units[0].size == size
    resets.check_resets(units, PARAMS, lambda params: cbp_jax.with_features(apply_fn, units)(params, TOKENS))


def test_stacked_outputs_are_outputs():
    apply_fn = lambda p, x: jnp.stack([jnp.tanh(x @ p["a"]) @ p["out"], jnp.tanh(x @ p["a"]) @ p["other"]])
    left = {item.name: item.reason for item in cbp_jax.discover_units(apply_fn, PARAMS, X).left_out}
    assert left["out"] == left["other"] == "it is part of the network's output"
