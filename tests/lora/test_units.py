"""Rank-one components of adapters are units: algorithms that replace or protect units apply to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import lora

RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in {"w1": (4, 6), "w2": (6, 3)}.items()
}
X, Y = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((8, 4), (8, 3)))


def network(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


def adapted(adapter, x):
    return network(lora.apply(PARAMS, adapter), x)


ADAPTER = jax.tree.map(
    lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32), lora.init(PARAMS, 0, rank=3, alpha=6)
)
UNITS = cbp_jax.discover_units(adapted, ADAPTER, X)
A, B = "factors/w1/lora_A", "factors/w1/lora_B"


def test_a_component_is_a_column_of_a_and_a_row_of_b():
    assert {group.name: group.size for group in UNITS} == {A: 3, "factors/w2/lora_A": 3}
    (incoming,), (consumer,) = UNITS[0].incoming, UNITS[0].outgoing
    assert (incoming.path, incoming.axes, consumer.kernel.path, consumer.kernel.axes) == (A, (1,), B, (0,))


def test_its_activation_is_the_projection_of_the_input_on_its_column():
    outputs, features = cbp_jax.with_features(adapted, UNITS)(ADAPTER, X)
    np.testing.assert_allclose(outputs, adapted(ADAPTER, X), rtol=1e-5, atol=1e-5)
    read = np.asarray(X) @ np.asarray(ADAPTER.factors["w1"]["lora_A"])
    np.testing.assert_allclose(features[A], ADAPTER.scaling * read, rtol=1e-5, atol=1e-5)


def test_units_of_the_network_and_of_its_adapter_together():
    both = lambda trees, x: network(lora.merge(*trees), x)
    units = {group.name: group for group in cbp_jax.discover_units(both, (PARAMS, ADAPTER), X)}
    paths = lambda parts: sorted(getattr(part, "kernel", part).path for part in parts)
    hidden = units["0/w1"]
    assert hidden.size == 6 and units[f"1/{A}"].size == 3
    assert paths(hidden.incoming) == ["0/w1", f"1/{B}"]
    assert paths(hidden.outgoing) == ["0/w2", "1/factors/w2/lora_A"]


def replaced_by(name):
    tx = {
        "continual_backprop": cbp_jax.continual_backprop(
            optax.sgd(0.0), UNITS, replacement_rate=0.34, maturity_threshold=0
        ),
        "redo": cbp_jax.redo(optax.sgd(0.0), UNITS, threshold=0.5, every=1),
    }[name]
    weak = jax.tree.map(lambda leaf: leaf, ADAPTER)
    # The second component has almost no activation.
    weak.factors["w1"] = {
        "lora_A": ADAPTER.factors["w1"]["lora_A"].at[:, 1].mul(1e-3),
        "lora_B": ADAPTER.factors["w1"]["lora_B"],
    }
    apply = cbp_jax.with_features(adapted, UNITS)

    def loss(adapter):
        outputs, features = apply(adapter, X)
        return jnp.square(outputs - Y).mean(), features

    @jax.jit
    def step(adapter):
        grads, features = jax.grad(loss, has_aux=True)(adapter)
        updates, state = tx.update(grads, tx.init(adapter), adapter, features=features)
        return optax.apply_updates(adapter, updates), state

    return weak, *step(weak)


@pytest.mark.parametrize("name", ["continual_backprop", "redo"])
def test_the_least_used_component_is_replaced(name):
    before, after, state = replaced_by(name)
    assert state.replaced[A].tolist() == [False, True, False]
    a, b = after.factors["w1"]["lora_A"], after.factors["w1"]["lora_B"]
    assert not b[1].any() and jnp.abs(a[:, 1]).max() > 0.01
    kept = np.array([0, 2])
    np.testing.assert_array_equal(a[:, kept], before.factors["w1"]["lora_A"][:, kept])
    np.testing.assert_array_equal(b[kept], before.factors["w1"]["lora_B"][kept])


def test_upgd_protects_components():
    tx = cbp_jax.upgd(0.1, units=UNITS, sigma=0.1)
    grads, features = jax.tree.map(jnp.ones_like, ADAPTER), {group.name: jnp.ones((8, 3)) for group in UNITS}
    updates, _ = jax.jit(lambda adapter: tx.update(grads, tx.init(adapter), adapter, features=features))(ADAPTER)
    assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(updates))
