"""Sums over units and state: which sums are normalizations, and which states are running statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cbp_jax
from cbp_jax.units import LeftOutKind


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32) for shape in shapes]


first, scale, last = draw(0, (3, 6), (6,), (6, 2))
PARAMS = {"first": first, "scale": scale, "gate": scale[:1], "last": last}
X = draw(1, (4, 3))[0]


def find(construct):
    apply_fn = lambda p, x: construct(jnp.tanh(x @ p["first"]), p) @ p["last"]
    return cbp_jax.discover_units(apply_fn, PARAMS, X)


def mean(x, axis=-1):
    return jnp.mean(x, axis, keepdims=True)


def without_parameters(module):
    variables = jax.jit(module.init)(jax.random.key(0), jnp.ones((4, 6)))
    return lambda h, p: module.apply(variables, h)


def equinox_layer_norm(h, p):
    def row(x):
        centered = jnp.mean(x, keepdims=True)
        variance = jnp.maximum(jnp.var(x, keepdims=True), 0.0)
        return (x - centered) * jax.lax.rsqrt(variance + 1e-5) * p["scale"]

    return jax.vmap(row)(h)


def haiku_layer_norm(h, p):
    inverse = p["scale"] * jax.lax.rsqrt(jnp.var(h, -1, keepdims=True) + 1e-5)
    return inverse * (h - mean(h)) + 0.5


def annotated_transformer(h, p):
    return p["scale"] * (h - mean(h)) / (jnp.std(h, -1, keepdims=True, ddof=1) + 1e-6)


def grouped(h, p):
    parts = h.reshape(-1, 2, 3)
    parts = (parts - mean(parts)) / jnp.sqrt(mean(jnp.square(parts - mean(parts))) + 1e-5)
    return parts.reshape(h.shape) * p["scale"]


def safe_norm(h, p):
    length = jnp.sqrt(jnp.sum(h**2, -1, keepdims=True))
    return h / jnp.where(length == 0, 1.0, length)


def half(h, p):
    wide = h.astype(jnp.bfloat16).astype(jnp.float32)
    variance = mean(wide**2) - mean(wide) ** 2
    return ((wide - mean(wide)) * jax.lax.rsqrt(variance + 1e-3)).astype(jnp.bfloat16)


def dense_of_ones(h, p):
    return h - h.sum(-1, keepdims=True) * np.float32(1 / 6)


NORMALIZATIONS = {
    "flax layer norm": without_parameters(nn.LayerNorm()),
    "flax layer norm in two passes": without_parameters(nn.LayerNorm(use_fast_variance=False)),
    "flax rms norm": without_parameters(nn.RMSNorm()),
    "flax group norm": without_parameters(nn.GroupNorm(2)),
    "nnx layer norm": lambda h, p: nnx.LayerNorm(6, rngs=nnx.Rngs(0))(h),
    "nnx group norm": lambda h, p: nnx.GroupNorm(6, 3, rngs=nnx.Rngs(0))(h),
    "standardize": lambda h, p: jax.nn.standardize(h),
    "equinox layer norm": equinox_layer_norm,
    "haiku layer norm": haiku_layer_norm,
    "annotated transformer": annotated_transformer,
    "groups by hand": grouped,
    "half precision": half,
    "centered": lambda h, p: h - mean(h),
    "centered by a sum": dense_of_ones,
    "centered by adding": lambda h, p: h + -mean(h),
    "statistics that are constants": lambda h, p: h - jax.lax.stop_gradient(mean(h)),
    "length": lambda h, p: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "bounded length": lambda h, p: h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-6),
    "safe length": safe_norm,
    "scaled length": lambda h, p: p["gate"] * h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "power of -1/2": lambda h, p: h * (mean(h**2) + 1e-6) ** -0.5,
    "one over the root": lambda h, p: h * (1.0 / jnp.sqrt(mean(h**2) + 1e-6)),
    "scaled before": lambda h, p: (h * p["scale"]) * jax.lax.rsqrt(mean(h**2) + 1e-6),
    "dropout of it": lambda h, p: nn.Dropout(0.5).apply(
        {}, h - mean(h), deterministic=False, rngs={"dropout": jax.random.key(0)}
    ),
    "transposed": lambda h, p: (h.T / jnp.sqrt((h.T**2).mean(0) + 1e-6)).T,
}


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalizations_keep_their_units_and_mark_them(name):
    units = find(NORMALIZATIONS[name])
    assert [(group.name, group.size, group.exact) for group in units] == [("first", 6, False)]
    assert "but for its normalization" in str(units)


DECEPTIVE = {
    "part of the sum": lambda h, p: jax.nn.relu(h - 0.3 * h.sum(-1, keepdims=True)),
    "twice the mean": lambda h, p: h - 2 * mean(h),
    "the mean added": lambda h, p: h + mean(h),
    "softmax by hand": lambda h, p: jnp.exp(h) / jnp.exp(h).sum(-1, keepdims=True),
    "log softmax by hand": lambda h, p: h - jnp.log(jnp.exp(h).sum(-1, keepdims=True)),
    "logsumexp": lambda h, p: h - jax.nn.logsumexp(h, -1, keepdims=True),
    "gate of the sum": lambda h, p: h * jax.nn.sigmoid(h.sum(-1, keepdims=True)),
    "square of the sum": lambda h, p: h - jax.nn.relu(h.sum(-1, keepdims=True)) ** 2,
    "share of the sum": lambda h, p: h / h.sum(-1, keepdims=True),
    "share of the absolute sum": lambda h, p: h / jnp.abs(h).sum(-1, keepdims=True),
    "one over the sum": lambda h, p: h * (1 / (1 + h.sum(-1, keepdims=True))),
    "divided by the squares": lambda h, p: h / (h**2).sum(-1, keepdims=True),
    "multiplied by the length": lambda h, p: h * jnp.linalg.norm(h, axis=-1, keepdims=True),
    "root of the sum": lambda h, p: h / jnp.sqrt(jnp.abs(h).sum(-1, keepdims=True)),
    "no variance": lambda h, p: h / jnp.sqrt(1 + mean(h**2) - 0.5 * mean(h) ** 2),
    "mean of others": lambda h, p: h - mean(h[:, :3]),
    "length of others": lambda h, p: jnp.tile(h[:, :3] / jnp.linalg.norm(h[:, 3:], axis=-1, keepdims=True), 2),
    "length of a function": lambda h, p: jnp.sin(h) / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "groups that are swapped": lambda h, p: (
        h.reshape(-1, 2, 3) - mean(h.reshape(-1, 2, 3))[:, ::-1]
    ).reshape(h.shape),
    "mean as a unit": lambda h, p: jnp.concatenate([h[:, :5], mean(h)], -1),
    "inverse added": lambda h, p: h + jax.lax.rsqrt(mean(h**2) + 1e-6),
    "response normalization": lambda h, p: h * (1 + p["scale"] * h / (mean(h) + 1e-6)),
}  # fmt: skip


@pytest.mark.parametrize("name", DECEPTIVE)
def test_units_in_other_sums_are_left_out(name):
    apart = {"mean of others": [3, 4, 5], "length of others": [0, 1, 2]}.get(name)
    if apart:  # units that are in no sum are kept
        (group,) = find(DECEPTIVE[name])
        assert group.incoming[0].index.tolist() == [apart]
    else:
        with pytest.raises(ValueError, match="first"):
            find(DECEPTIVE[name])


def test_squeeze_and_excite_is_exact():
    params = dict(zip(["conv", "down", "up", "out"], draw(0, (3, 6), (6, 2), (2, 6), (6, 2)), strict=True))

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["conv"])
        gate = jax.nn.sigmoid(jnp.tanh(h.mean(1) @ p["down"]) @ p["up"])
        return (h * gate[:, None]).mean(1) @ p["out"]

    units = cbp_jax.discover_units(apply_fn, params, jnp.ones((2, 5, 3)))
    assert [(group.name, group.size, group.exact) for group in units] == [("conv", 6, True), ("down", 2, True)]
    assert "exact" not in str(units)


# ------------------------------------------------------------------------------------------ carries and statistics

CARRIES = {
    "leaky": lambda p, h, x: 0.5 * h + x @ p["wi"],
    "gated": lambda p, h, x: h * jax.nn.sigmoid(x @ p["wi"]),
    "difference": lambda p, h, x: x @ p["wi"] - 0.5 * h,
    "recurrent": lambda p, h, x: jnp.tanh(h @ p["wh"] + x @ p["wi"]),
    "reduced": lambda p, h, x: 0.9 * h + 0.1 * (x @ p["wi"]).mean(0, keepdims=True),
}


@pytest.mark.parametrize("name", CARRIES)
@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_a_recurrent_carry_is_not_a_running_statistic(name, shape):
    if name == "reduced" and len(shape) == 1:
        return
    params = dict(zip(["wi", "wh", "wo", "wp"], draw(0, (3, 5), (5, 5), (5, 4), (4, 2)), strict=True))
    x = jnp.ones(shape)
    carry = jnp.ones((*shape[:-1], 5))

    def step(p, carry, x):
        h = CARRIES[name](p, carry["h"], x)
        return {"h": h}, jnp.tanh(h @ p["wo"]) @ p["wp"]

    units = cbp_jax.discover_units(step, params, {"h": carry}, x)
    assert [group.name for group in units] == ["wo"]
    assert {item.name: item.kind for item in units.left_out}["wi"] is LeftOutKind.OUTPUT
    assert not any(group.statistics for group in units)


def test_statistics_with_any_name_are_recognized_by_their_use():
    params = dict(zip(["a", "b"], draw(0, (3, 5), (5, 2)), strict=True))
    state = {"first": jnp.zeros(5), "second": jnp.ones(5)}

    def apply_fn(p, state, x, train):
        h = x @ p["a"]
        mu, var = (h.mean(0), h.var(0)) if train else (state["first"], state["second"])
        new = {"first": 0.9 * state["first"] + 0.1 * mu, "second": state["second"] + 0.1 * (var - state["second"])}
        return jax.nn.relu((h - mu) / jnp.sqrt(var + 1e-5)) @ p["b"], new

    for train in (True, False):
        units = cbp_jax.discover_units(lambda p, s, x, train=train: apply_fn(p, s, x, train), params, state, X)
        assert [group.name for group in units] == ["a"] and units[0].exact
        paths = [part.path for part in units[0].statistics]
        assert set(paths) == {"first", "second"}


OTHER_STATE = {
    "offset": lambda h, s: h + s,
    "difference": lambda h, s: s - h,
    "part of a mean": lambda h, s: h - 0.5 * s,
    "gate": lambda h, s: h * s,
    "quotient": lambda h, s: h / s,
}


@pytest.mark.parametrize("name", OTHER_STATE)
def test_other_state_is_data(name):
    """An input with a number for each unit is not a statistic, unless it is used as one."""
    params = dict(zip(["a", "b"], draw(0, (3, 5), (5, 2)), strict=True))
    apply_fn = lambda p, state, x: jnp.tanh(OTHER_STATE[name](x @ p["a"], state["s"])) @ p["b"]
    (group,) = cbp_jax.discover_units(apply_fn, params, {"s": jnp.ones(5)}, X)
    assert group.name == "a" and not group.statistics


READ_AGAIN = {
    "by a kernel": lambda p, h, new: jnp.tanh(h) @ p["b"] + new @ p["b"],
    "by a gate": lambda p, h, new: jnp.tanh(h * jax.nn.sigmoid(new)) @ p["b"],
    "by a sum": lambda p, h, new: jnp.tanh(h + new) @ p["b"],
}


@pytest.mark.parametrize("name", READ_AGAIN)
def test_an_average_that_is_read_again_is_a_carry(name):
    """It is updated from a sum over the batch and returned by its name, but it has another use, too."""
    params = dict(zip(["a", "b"], draw(0, (3, 5), (5, 2)), strict=True))

    def apply_fn(p, state, x):
        h = x @ p["a"]
        new = 0.9 * state["s"] + 0.1 * h.mean(0)
        return READ_AGAIN[name](p, h, new), {"s": new}

    with pytest.raises(ValueError, match="a: it is part of the network's output"):
        cbp_jax.discover_units(apply_fn, params, {"s": jnp.ones(5)}, X)


@pytest.mark.slow
def test_replacing_a_normalized_unit_changes_others_only_through_its_statistics():
    """With constant statistics, the gradient of fresh incoming weights is 0, as `UnitGroup.exact` says."""
    frozen = []

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["first"])
        statistics = frozen[0] if frozen else (mean(h), jnp.var(h, -1, keepdims=True))
        return (h - statistics[0]) * jax.lax.rsqrt(statistics[1] + 1e-3) @ p["last"]

    units = cbp_jax.discover_units(apply_fn, PARAMS, X)
    tx = cbp_jax.continual_backprop(optax.sgd(0.0), units, replacement_rate=0.5, maturity_threshold=0)
    _, features = cbp_jax.with_features(apply_fn, units)(PARAMS, X)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS, features=features)
    params, fresh = optax.apply_updates(PARAMS, updates), np.asarray(state.replaced["first"])
    gradient = lambda p: jax.grad(lambda p: jnp.sin(apply_fn(p, X)).sum())(p)["first"][:, fresh]
    assert fresh.sum() == 3 and np.abs(gradient(params)).max() > 0
    h = jnp.tanh(X @ params["first"])
    frozen.append((mean(h), jnp.var(h, -1, keepdims=True)))
    assert np.all(np.asarray(gradient(params)) == 0)
