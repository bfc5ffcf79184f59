"""Ensembles made by `vmap`: units are numbered by member and column."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resets
from flax import nnx

import cbp_jax

pytestmark = pytest.mark.slow  # each network takes long to compile

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


class Critic(nn.Module):
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5)(x))
        if self.norm:
            x = nn.LayerNorm()(x)
        return nn.Dense(1)(nn.tanh(nn.Dense(4)(x)))


def linen(**options):
    members = nn.vmap(
        Critic, in_axes=None, out_axes=0, axis_size=2, variable_axes={"params": 0}, split_rngs={"params": True}
    )
    net = members(**options)
    return net.apply, jax.jit(net.init)(jax.random.key(0), X)


def by_hand():
    one = Critic()
    params = jax.vmap(lambda key: one.init(key, X))(jax.random.split(jax.random.key(0)))
    return lambda params, x: jax.vmap(one.apply, (0, None))(params, x).min(0), params


def of_nnx():
    class Member(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)
            self.c = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.c(nnx.tanh(self.b(nnx.tanh(self.a(x)))))

    members = nnx.vmap(Member, in_axes=0, out_axes=0)(nnx.Rngs(0).fork(split=2))
    graphdef, params = nnx.split(members, nnx.Param)
    call = nnx.vmap(lambda model, x: model(x), in_axes=(0, None), out_axes=0)
    return lambda params, x: call(nnx.merge(graphdef, params), x), params


def of_equinox():
    make = eqx.filter_vmap(lambda key: eqx.nn.MLP(3, 1, 5, 2, activation=jnp.tanh, key=key))
    params, static = eqx.partition(make(jax.random.split(jax.random.key(0))), eqx.is_inexact_array)

    def apply_fn(params, x):
        one = lambda member: jax.vmap(member)(x)
        return eqx.filter_vmap(one)(eqx.combine(params, static))

    return apply_fn, params


ENSEMBLES = {
    "linen": linen,
    "by hand": by_hand,
    "nnx": of_nnx,
    "equinox": of_equinox,
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_twin_critics(name):
    apply_fn, params = ENSEMBLES[name]()
    units = cbp_jax.discover_units(apply_fn, params, X)
    assert [group.size for group in units] == [10, 10 if name == "equinox" else 8]
    assert all(group.exact for group in units) and len(units.left_out) == 1
    apply = cbp_jax.with_features(apply_fn, units)
    _, features = apply(params, X)
    assert [features[group.name].shape for group in units] == [(6, group.size) for group in units]
    resets.check_resets(units, params, lambda p: (lambda out, f: (jnp.ravel(out), f))(*apply(p, X)), rtol=1e-3)


def test_units_are_of_one_member():
    apply_fn, params = by_hand()
    units = cbp_jax.discover_units(apply_fn, params, X)
    first = units[0]
    kernel, reader = first.incoming[0], first.outgoing[0].kernel
    assert (kernel.axes, reader.axes) == ((0, 2), (0, 1))
    new = resets.make_reset(units)(params, {first.name: [7]})  # the third column of the second member
    changed = np.asarray(new["params"]["Dense_0"]["kernel"] != params["params"]["Dense_0"]["kernel"])
    assert changed[1, :, 2].all() and changed.sum() == 3
    assert np.flatnonzero((np.asarray(new["params"]["Dense_2"]["kernel"]) == 0).all(2)).tolist() == [7]


def test_normalization_is_by_member():
    apply_fn, params = linen(norm=True)
    units = cbp_jax.discover_units(apply_fn, params, X)
    assert [(group.size, group.exact) for group in units] == [(10, False), (8, True)]
    assert [part.axes for part in units[0].scales] == [(0, 1)]


def test_members_that_share_a_trunk():
    params = {"trunk": (3, 5), "heads": (2, 5, 4), "out": (2, 4, 1)}
    params = {name: jnp.float32(np.random.default_rng(1).normal(size=shape)) for name, shape in params.items()}

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["trunk"])
        head = lambda kernel, out: jnp.tanh(h @ kernel) @ out
        return jax.vmap(head)(p["heads"], p["out"])

    units = cbp_jax.discover_units(apply_fn, params, X)
    assert [(group.name, group.size) for group in units] == [("trunk", 5), ("heads", 8)]
    resets.check_resets(units, params, lambda p: (apply_fn(p, X), None))


@pytest.mark.parametrize(
    "name", ["by hand", *(pytest.param(n, marks=pytest.mark.slow) for n in ("linen", "nnx", "equinox"))]
)
def test_an_ensemble_trains_with_replacements(name):
    apply_fn, params = ENSEMBLES[name]()
    units = cbp_jax.discover_units(apply_fn, params, X)
    apply = cbp_jax.with_features(apply_fn, units)
    losses, replaced = resets.train(units, params, lambda p: apply(p, X), X[:, :1])
    assert losses[-1] < 0.5 * losses[0] and all(count >= 10 for count in replaced.values())


JOINS = {
    "mean of members": lambda p, x: jax.vmap(lambda a, b: jnp.tanh(x @ a) @ b)(p["a"], p["b"]).mean(0),
    "least of members": lambda p, x: jax.vmap(lambda a, b: jnp.tanh(x @ a) @ b)(p["a"], p["b"]).min(0),
    "maxout": lambda p, x: (x @ p["c"]).reshape(-1, 4, 2).max(-1),
    "sums of pairs": lambda p, x: jnp.tanh((x @ p["c"]).reshape(-1, 4, 2).sum(-1)),
}


@pytest.mark.parametrize("name", JOINS)
def test_units_that_are_joined_across_members_or_pairs_are_one_group(name):
    shapes = {"a": (2, 3, 5), "b": (2, 5, 4), "c": (3, 8), "out": (4, 2)}
    params = {name: jnp.float32(np.random.default_rng(1).normal(size=shape)) for name, shape in shapes.items()}
    apply_fn = lambda p, x: jnp.tanh(JOINS[name](p, x)) @ p["out"]
    units = cbp_jax.discover_units(apply_fn, params, X)
    members = "members" in name
    assert [(g.name, g.size) for g in units] == ([("a", 10), ("b", 4)] if members else [("c", 4)])
    assert units[-1].incoming[0].positions == 2
    resets.check_resets(units, params, lambda p: (apply_fn(p, X), None))
