"""Properties that optax's contrib tests check for optimizers and test_common.py does not.

Unknown extra arguments, `optax.tree.map_params`, schedules, float16 and float64, sharded parameters, convergence.
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cbp_jax
from cbp_jax.replacement import UTILITIES, replaced_units

PARAMS = {"w1": jnp.linspace(-1.0, 1.0, 32).reshape(4, 8), "w2": jnp.linspace(1.0, -1.0, 16).reshape(8, 2)}
X = jnp.linspace(0.0, 1.0, 12).reshape(3, 4)


def apply_fn(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


def objective(params):
    return jnp.mean(apply_fn(params, X) ** 2)


UNITS = cbp_jax.discover_units(apply_fn, PARAMS, X)
APPLY = cbp_jax.with_features(apply_fn, UNITS)


def by_units(factory, *args, **kwargs):
    """Make a transformation that takes activations, which do not matter here."""
    return factory(optax.sgd(0.1, momentum=0.9), UNITS, *args, **kwargs)


OPTIMIZERS = {
    "adam": lambda rate=0.1: cbp_jax.adam(rate),
    "scale_by_upgd": lambda rate=0.1: optax.chain(cbp_jax.scale_by_upgd(), optax.scale_by_learning_rate(rate)),
    "upgd": lambda rate=0.1: cbp_jax.upgd(rate, weight_decay=0.1),
    "upgd of units": lambda rate=0.1: cbp_jax.upgd(rate, units=UNITS),
    "adaptive_upgd": lambda rate=0.1: cbp_jax.adaptive_upgd(rate),
    "ewc": lambda rate=0.1: cbp_jax.ewc(rate, strength=0.1),
    "shrink_and_perturb": lambda rate=0.1: cbp_jax.shrink_and_perturb(optax.sgd(rate), 1e-3, 1e-3, 0),
    "continual_backprop": lambda rate=0.1: by_units(
        cbp_jax.continual_backprop, maturity_threshold=0, max_replacements=1
    ),
    "rewinding continual_backprop": lambda rate=0.1: by_units(cbp_jax.continual_backprop, reinitialization="rewind"),
    "redo": lambda rate=0.1: by_units(cbp_jax.redo, every=2),
}
WITH_SCHEDULE = ("adam", "scale_by_upgd", "upgd", "upgd of units", "adaptive_upgd", "ewc")

optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@optimizer
def test_unknown_extra_arguments_are_ignored(make):
    """A chain passes every extra argument to every part."""
    tx = make()
    grads, (_, features) = jax.grad(objective)(PARAMS), APPLY(PARAMS, X)
    update = jax.jit(lambda state, **extra: tx.update(grads, state, PARAMS, features=features, **extra))
    plain = update(tx.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, update(tx.init(PARAMS), unexpected=1), plain)


@optimizer
def test_map_params(make):
    """optax.tree.map_params finds the leaves of a state that belong to parameters, with `init` on placeholders."""
    tx = make()
    state = tx.init(PARAMS)
    same = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize("name", ["scale_by_upgd", "upgd", "adaptive_upgd", "continual_backprop"])
def test_map_params_reaches_what_is_kept_for_each_parameter(name):
    tx = OPTIMIZERS[name]()
    marked = optax.tree.map_params(
        tx, lambda leaf: "of params", tx.init(PARAMS), transform_non_params=lambda _: "other"
    )
    part = marked if name == "continual_backprop" else marked[0]
    if name == "continual_backprop":
        assert part.inner_state[0].trace == {"w1": "of params", "w2": "of params"}
        assert part.age == part.utility == {"w1": "other"}
    else:
        assert part.utility == {"w1": "of params", "w2": "of params"} and part.count == "other"


@pytest.mark.parametrize("name", WITH_SCHEDULE)
def test_a_constant_schedule_is_a_constant(name):
    tx, scheduled = OPTIMIZERS[name](0.01), OPTIMIZERS[name](optax.constant_schedule(0.01))
    states, grads = [tx.init(PARAMS), scheduled.init(PARAMS)], jax.grad(objective)(PARAMS)
    for _ in range(3):
        updates, states[0] = tx.update(grads, states[0], PARAMS)
        by_schedule, states[1] = scheduled.update(grads, states[1], PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), by_schedule, updates)


@optimizer
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_types_are_stable(make, dtype):
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), dtype), PARAMS)
        x = jnp.asarray(np.asarray(X), dtype)
        tx = make()
        state = jax.eval_shape(tx.init, params)
        _, features = jax.eval_shape(APPLY, params, x)
        updates, after = jax.eval_shape(
            lambda state, features: tx.update(params, state, params, features=features), state, features
        )
        kind = lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type)
        assert jax.tree.map(kind, after) == jax.tree.map(kind, state)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {dtype}


@functools.cache
def deep():
    """Return the parameters, units and activations of a network with a group that reads another one."""
    apply = lambda params, x: jax.nn.relu(apply_fn(params, x)) @ params["w3"]
    params = PARAMS | {"w3": jnp.ones((2, 3))}
    units = cbp_jax.discover_units(apply, params, X)
    return params, units, cbp_jax.with_features(apply, units)(params, X)[1]


@pytest.mark.parametrize("utility", UTILITIES)
def test_every_utility_keeps_its_type_where_float64_is_the_default(utility):
    params, units, features = deep()
    with jax.enable_x64(True):
        tx = cbp_jax.continual_backprop(optax.sgd(0.1), units, utility=utility, max_replacements=1)

        def update(params):
            state = tx.init(params)
            _, after = tx.update(params, state, params, features=features, hessian_diag=params)
            return state, after, replaced_units(after), replaced_units(())

        before, after, *replaced = jax.eval_shape(update, params)
    kind = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(kind, after) == jax.tree.map(kind, before)
    assert [each.dtype for each in replaced] == [jnp.float32] * 2


def test_hyperparameters_may_be_of_low_precision():
    """optax.inject_hyperparams gives them the type of the parameters."""
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    state = optax.inject_hyperparams(cbp_jax.adam)(0.5, b1=0.5, b2=0.75).init(params)
    assert state.hyperparams["learning_rate"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\), got 1.0"):  # 0.999 in bfloat16
        optax.inject_hyperparams(cbp_jax.adam)(0.5).init(params)
    optax.inject_hyperparams(cbp_jax.adam, hyperparam_dtype=jnp.float32)(0.5).init(params)


@pytest.mark.parametrize("name", ["upgd", "adaptive_upgd", "ewc", "rwalk"])
def test_a_mask_may_leave_no_parameter(name):
    optimizers = OPTIMIZERS | {"rwalk": cbp_jax.rwalk}
    tx = optax.partition({"none": optimizers[name](0.1), "all": optax.sgd(0.5)}, {"w1": "all", "w2": "all"})
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["w2"], -0.5 * PARAMS["w2"])


def test_an_extra_argument_for_each_parameter_is_masked_if_optax_is_told():
    masked = lambda **extra: optax.masked(cbp_jax.upgd(0.1, order=2), {"w1": True, "w2": False}, **extra)
    told, untold = masked(mask_compatible_extra_args=True), masked()
    updates, _ = told.update(PARAMS, told.init(PARAMS), PARAMS, hessian_diag=PARAMS)
    assert (updates["w1"] != PARAMS["w1"]).all() and (updates["w2"] == PARAMS["w2"]).all()
    with pytest.raises(
        ValueError, match=r"hessian_diag must .*; pass mask_compatible_extra_args=True to optax\.masked"
    ):
        untold.update(PARAMS, untold.init(PARAMS), PARAMS, hessian_diag=PARAMS)


@pytest.mark.parametrize("name", [*WITH_SCHEDULE, "shrink_and_perturb"])
def test_with_explicit_axes_updates_are_sharded_as_the_parameters(name):
    """jax.make_mesh makes explicit axes, where the sharding is part of an array's type."""
    tx, mesh = OPTIMIZERS[name](), jax.make_mesh((1,), ("units",), axis_types=(AxisType.Explicit,))
    split = {"w1": PartitionSpec(None, "units"), "w2": PartitionSpec("units", None)}
    params = {path: jax.device_put(w, NamedSharding(mesh, split[path])) for path, w in PARAMS.items()}
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(lambda params, state: tx.update(params, state, params), params, state)
    assert {path: update.sharding.spec for path, update in updates.items()} == split


# Two devices of the host, which must be requested before JAX starts.
SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax, sys
from jax.sharding import AxisType, NamedSharding, PartitionSpec
sys.path.insert(0, {folder!r})
import test_optax_behavior as tests

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("units",), axis_types=(AxisType.Auto,))
split = {{"w1": NamedSharding(mesh, PartitionSpec(None, "units")), "w2": NamedSharding(mesh, PartitionSpec("units"))}}
whole = NamedSharding(mesh, PartitionSpec())
params = jax.tree.map(jax.device_put, tests.PARAMS, split)
_, features = tests.APPLY(params, tests.X)
grads = jax.grad(tests.objective)(params)
for name in ("scale_by_upgd", "upgd", "upgd of units", "adaptive_upgd", "continual_backprop"):
    tx = tests.OPTIMIZERS[name]()
    # As an optax user shards a state: the arrays of each parameter are sharded like the parameter.
    state = tx.init(params)
    layout = optax.tree.map_params(
        tx, lambda _, sharding: sharding, state, split, transform_non_params=lambda _: whole
    )
    state = jax.tree.map(jax.device_put, state, layout)
    step = jax.jit(lambda grads, state, features: tx.update(grads, state, params, features=features))
    updates, after = step(grads, state, features)
    for key, update in updates.items():
        assert update.sharding.is_equivalent_to(split[key], update.ndim), (name, key, update.sharding)
    alone = jax.grad(tests.objective)(tests.PARAMS)
    plain, _ = tx.update(alone, tx.init(tests.PARAMS), tests.PARAMS, features=features)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jax.device_get(updates), plain)
print("sharded")
"""


@pytest.mark.slow
def test_parameters_sharded_over_two_devices(tmp_path):
    program = tmp_path / "sharded.py"
    program.write_text(SHARDED.format(folder=str(pathlib.Path(__file__).parent)))
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, program], env={**os.environ, **flags}, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "sharded\n", done.stderr


# ------------------------------------------------------------------------------------------------------- convergence


def parabola():
    return jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0]), lambda w, end: jnp.sum((w - end) ** 2)


def rosenbrock():
    a, b = 1.0, 100.0
    return jnp.zeros(2), jnp.array([a, a**2]), lambda w, end: (a - w[0]) ** 2 + b * (w[1] - w[0] ** 2) ** 2


def tree_of_parabolas():
    start = {"matrix": jnp.zeros((2, 2)), "vector": jnp.zeros(3)}
    end = {"matrix": jnp.array([[3.0, -2.0], [1.0, 4.0]]), "vector": jnp.array([1.0, -1.0, 2.0])}
    return start, end, lambda w, end: sum(jnp.sum((w[name] - end[name]) ** 2) for name in w)


@pytest.mark.parametrize("target", [parabola, rosenbrock, tree_of_parabolas])
@pytest.mark.parametrize(
    "tx",
    [
        cbp_jax.adam(1e-2),
        optax.chain(cbp_jax.scale_by_upgd(), optax.scale_by_learning_rate(2e-3)),
        cbp_jax.upgd(2e-3, scope="local"),
        cbp_jax.adaptive_upgd(1e-2),
    ],
    ids=["adam", "scale_by_upgd", "upgd, local", "adaptive_upgd"],
)
def test_convergence(tx, target):
    start, end, loss = target()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, end), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=30_000)[0][0])
    jax.tree.map(lambda w, wanted: np.testing.assert_allclose(w, wanted, rtol=3e-2, atol=3e-2), run(start), end)
