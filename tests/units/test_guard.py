"""The check by evaluation: even if a rule is wrong, `discover_units` returns no wrong group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbp_jax
from cbp_jax.units import LeftOutKind, guard, moments, rules


def params_of(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


PARAMS = params_of(good=(3, 4), bad=(4, 5), last=(5, 2))
X = jnp.ones((6, 3))


def network(construct):
    return lambda p, x: construct(jnp.tanh(jnp.tanh(x @ p["good"]) @ p["bad"])) @ p["last"]


# Constructs that mix or move units; a wrong rule takes them for elementwise maps.
WRONG_RULES = {
    "cumsum": lambda h: jnp.cumsum(h, -1),
    "rev": lambda h: h[:, ::-1],
    "sort": lambda h: jnp.sort(h, -1),
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_wrong_rules_are_refuted(name, monkeypatch):
    monkeypatch.setitem(rules.LABEL_RULES, name, lambda eqn, ids: ids)
    apply_fn = network(WRONG_RULES[name])
    unchecked = cbp_jax.discover_units(apply_fn, PARAMS, X, check=False)
    assert "bad" in [group.name for group in unchecked]
    units = cbp_jax.discover_units(apply_fn, PARAMS, X)
    assert [group.name for group in units] == ["good"]
    assert {item.name: item.kind for item in units.left_out}["bad"] is LeftOutKind.REFUTED
    assert "report" in str(units)


@pytest.mark.parametrize("check", [None, True])
def test_sums_that_pass_for_normalizations_are_refuted(check, monkeypatch):
    """Frozen statistics hide dependencies through them, but other dependencies are detected."""
    monkeypatch.setattr(moments, "normalizes", lambda *args: True)

    apply_fn = network(lambda h: h + jnp.roll(h, 1, -1) / h.sum(-1, keepdims=True))
    units = cbp_jax.discover_units(apply_fn, PARAMS, X, check=check)
    assert [group.name for group in units] == ["good"]


def test_large_networks_are_checked_on_request(monkeypatch):
    calls = []
    monkeypatch.setattr(guard, "refuted", lambda *args: calls.append(1) or set())
    params = {"a": jax.ShapeDtypeStruct((1000, 2000), jnp.float32), "b": jax.ShapeDtypeStruct((2000, 2), jnp.float32)}
    apply_fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    x = jax.ShapeDtypeStruct((1, 1000), jnp.float32)
    for check, count in ((None, 0), (False, 0), (True, 1)):
        calls.clear()
        cbp_jax.discover_units(apply_fn, params, x, check=check)
        assert len(calls) == count
    calls.clear()
    cbp_jax.discover_units(network(jnp.sin), PARAMS, X)
    assert len(calls) == 1


def test_discovery_accepts_shapes_keys_and_integers(monkeypatch):
    params = {"table": jax.ShapeDtypeStruct((7, 4), jnp.float32), "out": jax.ShapeDtypeStruct((4, 2), jnp.float32)}

    def apply_fn(p, tokens, key, mask):
        h = jnp.tanh(p["table"][tokens])
        return jnp.where(mask, h * jax.random.bernoulli(key, 0.5, h.shape), 0) @ p["out"]

    structs = [jax.ShapeDtypeStruct((3,), jnp.int32), jax.random.key(0), jax.ShapeDtypeStruct((3, 1), bool)]
    units = cbp_jax.discover_units(apply_fn, params, *structs, check=True)
    assert [group.name for group in units] == ["table"]


def test_discovery_inside_of_jit():
    """A network with traced constants cannot be run, so it is only traced."""

    @jax.jit
    def run(factor):
        units = cbp_jax.discover_units(lambda p, x: factor * network(jnp.sin)(p, x), PARAMS, X, check=True)
        plain = cbp_jax.discover_units(network(jnp.sin), PARAMS, X, check=True)
        assert [g.name for g in units] == [g.name for g in plain] == ["good", "bad"]
        return factor

    run(1.0)


def test_networks_that_overflow_are_not_refuted():
    params = params_of(a=(3, 4), b=(4, 2))
    units = cbp_jax.discover_units(lambda p, x: jnp.exp(1e3 + jnp.exp(x @ p["a"])) @ p["b"], params, X)
    assert [group.name for group in units] == ["a"]
