"""Networks that a user has sharded over devices with `NamedSharding`."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import cbp_jax
from cbp_jax.numerics import sharding as sharding_lib

SIZES = (8, 16, 24, 8)
NAMES = ("first", "second", "third")
AXES = ("data", "model")
# Shardings of kernel and bias of each layer.
LAYOUTS = {
    # Columns, then rows: the second layer reads the first on the same device. XLA would shard the biases further.
    "columns and rows": ((2, 4), [((None, "model"), ()), (("model", None), ()), ((), ())]),
    "all columns": ((1, 8), [((None, "model"), ("model",))] * 3),
    "rows": ((1, 8), [(("model", None), ())] * 3),
    "one layer": ((1, 8), [((), ()), ((None, "model"), ()), ((), ())]),
    "two axes": ((2, 4), [((None, "model"), ("model",)), (("model", None), ()), (("data", "model"), ("model",))]),
}


def network(params, x):
    for name in NAMES[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params[NAMES[-1]]["kernel"] + params[NAMES[-1]]["bias"]


def start():
    rng = np.random.default_rng(0)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(fan_in, size)) / np.sqrt(fan_in), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=size) / 10, jnp.float32),
        }
        for name, (fan_in, size) in zip(NAMES, itertools.pairwise(SIZES), strict=True)
    }


def transformations(units):
    rates = {"replacement_rate": 0.1, "maturity_threshold": 1}
    return {
        "continual_backprop": cbp_jax.continual_backprop(optax.sgd(0.1), units, **rates),
        "continual_backprop of adam": cbp_jax.continual_backprop(
            cbp_jax.adam(0.01), units, max_replacements=1, compensate_bias=True, **rates
        ),
        "upgd": cbp_jax.upgd(0.01, sigma=0.01, weight_decay=0.01),
        "local upgd": cbp_jax.upgd(0.01, sigma=0.01, scope="local"),
        "upgd of units": cbp_jax.upgd(0.01, sigma=0.01, units=units),
    }


def check(name, layout):
    """Run in a separate process, because the number of devices is fixed when JAX starts."""
    shape, axes = LAYOUTS[layout]
    mesh = Mesh(np.asarray(jax.devices()).reshape(shape), AXES)
    sharding = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
    places = {
        layer: {"kernel": sharding(kernel), "bias": sharding(bias)}
        for layer, (kernel, bias) in zip(NAMES, axes, strict=True)
    }
    params = start()
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32), jnp.asarray(rng.integers(0, 8, 8))
    units = cbp_jax.discover_units(network, params, x)
    with_features = cbp_jax.with_features(network, units)
    tx = optax.with_extra_args_support(transformations(units)[name])

    def loss(params):
        outputs, features = with_features(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean(), features

    gradients = jax.jit(jax.grad(loss, has_aux=True))
    step = lambda grads, state, params, features: tx.update(grads, state, params, features=features)
    update = jax.jit(step)
    # XLA is asked to keep updates where params are. Without this feature of jax, output shardings are given.
    sharded_update = jax.jit(step) if sharding_lib.shard_alike else jax.jit(step, out_shardings=(places, None))
    sharded, init = jax.device_put(params, places), jax.jit(tx.init)
    state, sharded_state = init(params), init(sharded)
    apply = jax.jit(optax.apply_updates)
    replaced = 0.0
    for _ in range(4):
        updates, state = update(*reorder(gradients(params), state, params))
        sharded_updates, sharded_state = sharded_update(*reorder(gradients(sharded), sharded_state, sharded))
        for (path, found), expected, place in zip(
            jax.tree_util.tree_leaves_with_path(sharded_updates),
            jax.tree.leaves(updates),
            jax.tree.leaves(places),
            strict=True,
        ):
            assert found.sharding.is_equivalent_to(place, found.ndim), (jax.tree_util.keystr(path), found.sharding)
            # Sums over several devices have another order.
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))
        params, sharded = apply(params, updates), apply(sharded, sharded_updates)
        replaced += float(cbp_jax.replacement.replaced_units(state))
        assert cbp_jax.replacement.replaced_units(sharded_state) == cbp_jax.replacement.replaced_units(state)
    assert (replaced > 0) == name.startswith("continual")


def reorder(found, state, params):
    grads, features = found
    return grads, state, params, features


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["continual_backprop", "continual_backprop of adam", "upgd", "local upgd", "upgd of units"]
)
def test_updates_of_sharded_params_have_the_same_sharding_and_values(name, layout):
    script = f"import runpy; runpy.run_path({__file__!r})['check']({name!r}, {layout!r})"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=240)


def test_units_are_not_replaced_over_explicit_axes():
    params = start()
    units = cbp_jax.discover_units(network, params, jnp.ones((2, 8)))
    places = NamedSharding(jax.make_mesh((1, 1), AXES), PartitionSpec(None, "model"))
    params["first"]["kernel"] = jax.device_put(params["first"]["kernel"], places)
    with pytest.raises(ValueError, match=r"axes of type Auto; \['first'\]\['kernel'\] is over explicit ones"):
        transformations(units)["continual_backprop"].init(params)


def test_one_device_needs_no_sharding_constraint():
    traced = str(jax.make_jaxpr(sharding_lib.sharded_alike)(jnp.ones(2), jnp.ones(2)))
    assert ("shard_alike" in traced) == (jax.device_count() > 1 and sharding_lib.shard_alike is not None)
