import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax.replacement import Choice, Policy
from cbp_jax.tickets import apply_mask, full_mask, masked, prune

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_dead_weights_and_moments_are_0_after_a_thousand_updates": ("momentum", "cbp"),
    "test_living_weights_follow_the_inner_optimizer_on_the_masked_network": ("adam",),
}

OPTIMIZED = True  # bits are compared

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)


def apply_fn(params, x):
    h = jax.nn.relu(x @ params["a"]["w"] + params["a"]["b"])
    return jax.nn.relu(h @ params["b"]["w"] + params["b"]["b"]) @ params["c"]


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
    return {"a": {"w": normal(6, 8), "b": normal(8)}, "b": {"w": normal(8, 7), "b": normal(7)}, "c": normal(7, 2)}


PARAMS = make_params()
UNITS = cbp_jax.discover_units(apply_fn, PARAMS, X)
MASK = jax.jit(lambda: prune(PARAMS, full_mask(PARAMS), 0.4))()
FEATURES = cbp_jax.with_features(apply_fn, UNITS)
# Without LLVM's fused multiply-add, which differs between programs with the same arithmetic.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jax.jit  # a separate program, so that compared runs get the same gradients
def gradient(params):
    def loss(params):
        output, features = FEATURES(params, X)
        return jnp.mean((output - Y) ** 2), features

    return jax.grad(loss, has_aux=True)(params)


def train(tx, params, steps, between=lambda params: params, compiled=jax.jit):
    """Train with gradients of all weights, dead or not."""

    @compiled
    def step(params, state, grads, features):
        updates, state = tx.update(grads, state, params, features=features)
        return between(optax.apply_updates(params, updates)), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, *gradient(params))
    return params, state


def of_weights(state):
    """Return the arrays of an optimizer's state with a weight's name and shape, each with that weight's mask."""
    masks = {tuple(jax.tree_util.keystr((key,)) for key in path): leaf
             for path, leaf in jax.tree_util.tree_leaves_with_path(MASK)}  # fmt: skip
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = tuple(jax.tree_util.keystr((key,)) for key in path)
        for name, mask in masks.items():
            if names[-len(name) :] == name and leaf.shape == mask.shape:
                yield leaf, mask


CBP = functools.partial(
    cbp_jax.continual_backprop, units=UNITS, replacement_rate=0.02, maturity_threshold=1, max_replacements=1
)
INNER = {  # the transformation, and the number of arrays per parameter in its state
    "sgd": (optax.sgd(0.05), 0),
    "momentum": (optax.sgd(0.02, 0.9), 1),
    "optax.adam": (optax.adam(0.01), 2),
    "adam": (cbp_jax.adam(0.01), 3),
    "adamw": (optax.adamw(0.01, weight_decay=0.1), 2),
    "upgd": (cbp_jax.upgd(0.05, sigma=0.1, weight_decay=0.01), 1),
    "local upgd": (cbp_jax.upgd(0.05, sigma=0.1, scope="local"), 1),
    "adaptive upgd": (cbp_jax.adaptive_upgd(0.01, sigma=0.1), 4),
    "cbp": (CBP(optax.sgd(0.05)), 0),
    "cbp of adam": (CBP(cbp_jax.adam(0.01)), 3),
    "cbp of upgd": (CBP(cbp_jax.upgd(0.05, sigma=0.1)), 1),
    "redo": (cbp_jax.redo(optax.sgd(0.05, 0.9), UNITS, every=3), 1),
    "shrink and perturb of momentum": (cbp_jax.shrink_and_perturb(optax.sgd(0.02, 0.9), 1e-3, 0.01), 1),
    "noise into momentum": (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.02, 0.9)), 1),
    "l2 init": (optax.chain(cbp_jax.add_l2_init(0.1), optax.adagrad(0.1)), 2),
    "clipped": (optax.chain(optax.clip_by_global_norm(0.1), optax.scale_by_adam(), optax.scale(-0.01)), 2),
    "synaptic intelligence": (cbp_jax.synaptic_intelligence(0.05, strength=0.1), 4),
}


START = apply_mask(PARAMS, MASK)


def of_all(*quick):
    """Parametrize a test; cases are slow that take long to compile or are similar to others."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in INNER]
    )


@of_all("momentum", "cbp")
def test_dead_weights_and_moments_are_0_after_a_thousand_updates(name):
    inner, kept = INNER[name]
    params, state = train(masked(inner, MASK), START, 1000)
    for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(MASK), strict=True):
        assert (leaf[~mask] == 0).all() and (leaf[mask] != 0).any() and jnp.isfinite(leaf).all()
    found = list(of_weights(state))
    assert len(found) >= kept * len(jax.tree.leaves(PARAMS))
    for leaf, mask in found:
        assert (leaf[~mask] == 0).all()


@of_all("momentum", "adam", "noise into momentum", "l2 init")
def test_living_weights_follow_the_inner_optimizer_on_the_masked_network(name):
    inner = optax.with_extra_args_support(INNER[name][0])

    def update_fn(grads, state, params, **extra_args):
        return inner.update(apply_mask(grads, MASK), state, params, **extra_args)

    # By hand: gradients of living weights only, and dead weights set to 0 after each step. Without jit, because
    # compilers fuse multiplications and additions differently in each program.
    by_hand = optax.GradientTransformationExtraArgs(inner.init, update_fn)
    expected, _ = train(by_hand, START, 6, lambda params: apply_mask(params, MASK), compiled=lambda step: step)
    params, _ = train(masked(inner, MASK), START, 6, compiled=lambda step: step)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert (params["c"] != START["c"]).any()


def test_against_numpy():
    """Momentum with decay on a masked linear model, in plain loops."""
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=(4, 3)), rng.normal(size=(10, 4)), rng.normal(size=(10, 3))
    mask = rng.random((4, 3)) < 0.5
    tx = masked(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, 0.9)), {"w": jnp.asarray(mask)})
    params = {"w": jnp.asarray(w, jnp.float32)}
    state = tx.init(params)
    w, trace = w * mask, np.zeros((4, 3))
    params = apply_mask(params, {"w": mask})
    for _ in range(20):
        grads = jax.grad(lambda p: jnp.sum((jnp.asarray(x, jnp.float32) @ p["w"] - y) ** 2) / 10)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        trace = 0.9 * trace + mask * (2 / 10 * x.T @ (x @ w - y)) + 0.1 * w
        w = w - 0.05 * trace
    np.testing.assert_allclose(params["w"], w, atol=1e-5)
    np.testing.assert_array_equal(params["w"] == 0, ~mask)


@pytest.mark.slow
def test_vmap_over_masks():
    keys = jax.random.split(jax.random.key(0), 3)
    masks = jax.vmap(lambda key: cbp_jax.tickets.random_mask_like(MASK, key))(keys)
    grads, _ = gradient(PARAMS)

    def run(mask):
        tx = masked(cbp_jax.upgd(0.1, sigma=0.1), mask)

        def step(carry, n):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda g: g * jnp.cos(n), grads), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jnp.arange(30))[0]

    together, alone = jit(jax.vmap(run))(masks), jit(run)
    for i in range(3):
        at = lambda tree, i=i: jax.tree.map(lambda leaf: leaf[i], tree)
        jax.tree.map(np.testing.assert_array_equal, at(together), alone(at(masks)))
    assert (together[0]["a"]["w"][0] != together[0]["a"]["w"][1]).any()


def test_fresh_weights_of_a_replaced_unit_appear_only_where_the_mask_is_true():
    policy = Policy(lambda view, memory: Choice(jnp.array([2])))
    inner = cbp_jax.replace_units(optax.sgd(0.1), UNITS, policy)
    params = apply_mask(PARAMS, MASK)
    grads, features = gradient(params)

    def after(tx):
        updates, state = jax.jit(lambda grads: tx.update(grads, tx.init(params), params, features=features))(grads)
        assert all(bool(replaced[2]) for replaced in state.replaced.values())
        return optax.apply_updates(params, updates)

    unmasked, found = after(inner), after(masked(inner, MASK))
    fresh = unmasked["b"]["w"][:, 2]
    assert (fresh != 0).all() and not MASK["b"]["w"][:, 2].all() and MASK["b"]["w"][:, 2].any()
    np.testing.assert_array_equal(found["b"]["w"][:, 2], jnp.where(MASK["b"]["w"][:, 2], fresh, 0))
    assert (found["c"][2] == 0).all() and found["b"]["b"][2] == 0


def test_dead_weights_that_are_not_0_yet_become_so_in_the_first_update():
    params = {"w": jnp.full((2, 2), 3.0, jnp.bfloat16)}
    mask = {"w": jnp.array([[True, False], [False, True]])}
    tx = masked(optax.adam(0.5), mask)
    state = tx.init(params)
    updates, _ = tx.update({"w": jnp.ones((2, 2), jnp.bfloat16)}, state, params)
    assert optax.apply_updates(params, updates)["w"].tolist() == [[2.5, 0.0], [0.0, 2.5]]
    # Gradients may have less precision than the weights.
    params = {"w": jnp.full((2, 2), 1 / 3)}
    updates, _ = tx.update({"w": jnp.ones((2, 2), jnp.bfloat16)}, tx.init(params), params)
    assert (optax.apply_updates(params, updates)["w"][~mask["w"]] == 0).all()


def test_states_of_dead_weights_are_0_from_the_start():
    params, mask = {"w": jnp.ones((2, 2))}, {"w": jnp.array([[True, False], [True, True]])}
    state = masked(optax.chain(cbp_jax.add_l2_init(0.1), optax.adagrad(0.1)), mask).init(params)
    assert state[0].initial["w"].tolist() == [[1, 0], [1, 1]]
    assert float(state[1][0].sum_of_squares["w"][0, 1]) == 0 < float(state[1][0].sum_of_squares["w"][0, 0])


def test_a_full_mask_changes_nothing():
    inner = cbp_jax.adam(0.01)
    expected = train(optax.with_extra_args_support(inner), PARAMS, 50, compiled=jit)
    found = train(masked(inner, full_mask(PARAMS)), PARAMS, 50, compiled=jit)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_mask_on_some_of_the_params():
    """Parameters that `optax.masked` or `optax.partition` hide have no state."""
    labels = {"a": "adam", "b": "adam", "c": "sgd"}
    tx = optax.partition({"adam": masked(optax.adam(0.01), MASK), "sgd": optax.sgd(0.01)}, labels)
    params, _ = train(tx, PARAMS, 3)
    assert (params["a"]["w"][~MASK["a"]["w"]] == 0).all() and (params["c"] != 0).all()


def test_arrays_that_are_not_pruned_train_completely():
    mask = prune(PARAMS, full_mask(PARAMS, ["a", "c"]), 0.5)
    assert mask["b"]["w"].shape == ()
    params, _ = train(masked(cbp_jax.adam(0.01), mask), apply_mask(PARAMS, mask), 5)
    assert (params["b"]["w"] != 0).all() and (params["b"]["w"] != PARAMS["b"]["w"]).mean() > 0.5
    assert ((params["a"]["w"] == 0) == ~mask["a"]["w"]).all()


def test_bad_input():
    params, tx = {"w": jnp.ones((2, 2))}, optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"mask must be a tree of bool arrays, got \{'w': 'float32'\}"):
        masked(tx, {"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"nothing for \['w'\]"):
        masked(tx, {"v": jnp.ones((2, 2), bool)}).init(params)
    with pytest.raises(ValueError, match=r"mask of 'w' must be of its shape \(2, 2\)"):
        masked(tx, {"w": jnp.ones((2, 3), bool)}).init(params)
    tx = masked(tx, {"w": jnp.ones((2, 2), bool)})
    with pytest.raises(ValueError, match="masked needs the params"):
        tx.update(params, tx.init(params))
