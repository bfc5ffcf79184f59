"""A user's program that the type checker must accept, and the types that it must infer. It is checked, not run."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

import cbp_jax
from cbp_jax import lora, metrics, tickets


def apply_fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


def recycle(view: cbp_jax.GroupView, memory: dict[str, Any]) -> cbp_jax.Choice:
    return cbp_jax.Choice(jnp.argmin(view.outgoing_sum(jnp.abs, view.params))[None], memory)


def new_weights(new: cbp_jax.NewUnits) -> cbp_jax.Fresh:
    return cbp_jax.Fresh(tuple(jnp.zeros((4, 1)) for _ in new.group.incoming))


def train(params: dict[str, jax.Array], x: jax.Array) -> optax.Params:
    units = cbp_jax.discover_units(apply_fn, params, x)
    assert_type(units, cbp_jax.Units)
    assert_type(units[0], cbp_jax.UnitGroup)
    assert_type(units[0].name, str)
    tx = cbp_jax.continual_backprop(optax.adam(1e-3), units, replacement_rate=1e-4, key=0)
    assert_type(tx, optax.GradientTransformationExtraArgs)
    apply = cbp_jax.with_features(apply_fn, units)
    state = tx.init(params)
    _, features = apply(params, x)
    grads = jax.grad(lambda p: jnp.sum(apply_fn(p, x)))(params)
    updates, state = tx.update(grads, state, params, features=features)
    assert_type(metrics.dormant_fraction(features, 0.1), jax.Array)
    assert_type(metrics.weight_magnitude(params), jax.Array)
    return optax.apply_updates(params, updates)


def transformations(units: cbp_jax.Units, schedule: optax.Schedule) -> None:
    gate: optax.GradientTransformationExtraArgs = cbp_jax.upgd(schedule, units=units, key=jax.random.key(1))
    cbp_jax.redo(optax.sgd(0.1), units, threshold=0.1, every=100)
    cbp_jax.shrink_and_perturb(gate, 1e-3, 1e-2, 0)
    cbp_jax.replace_units(optax.sgd(0.1), units, cbp_jax.Policy(recycle), reinitialization=new_weights)
    optax.chain(cbp_jax.add_l2_init(0.1), cbp_jax.adam(schedule))
    optax.multi_transform({"a": cbp_jax.upgd(0.1), "b": cbp_jax.ewc(0.1)}, {"w1": "a", "w2": "b"})


def masks(params: dict[str, jax.Array], key: jax.Array) -> None:
    mask = tickets.prune(params, tickets.full_mask(params), 0.2)
    tickets.density(mask)
    tickets.masked(optax.sgd(0.1), mask)
    adapter = lora.init(params, 0, rank=2)
    assert_type(adapter, lora.Adapter)
    lora.init(params, key, rank=2, target_modules="w1")
    assert_type(lora.l1(adapter), jax.Array)
    lora.merge(params, adapter)
